"""Searches and sweeps that cannot be carried out."""

import os

from .case import PAPER, SMALL, Case, holding

TUNE = f"tune ckpt -o best.json --calibration text.txt {SMALL} --heldout 2 --json"
SWEEP = f"plan ckpt --stats stats.safetensors {PAPER} -o plans --json --sweep"

CASES = [
    Case(
        "tune: no such text", TUNE.replace("text.txt", "no.txt"), ("no.txt", "no such")
    ),
    Case(
        "tune: two texts without names",
        f"{TUNE} --calibration no.txt",
        ("text.txt", "--calibration code="),
    ),
    Case(
        "tune: text too short to keep some apart",
        f"{TUNE} --total 0.5 --heldout 100000",
        ("apart to judge on", "longer text"),
    ),
    Case("tune: total of 1", f"{TUNE} --total 1", ("total_sparsity", "less than 1")),
    Case("tune: a size twice", f"{TUNE} --total 0.5,0.5", ("given twice",)),
    Case(
        "tune: sizes of two kinds",
        f"{TUNE} --total 0.5 --bytes 1GB",
        ("--total or --bytes", "not both"),
    ),
    Case(
        "tune: no time",
        f"{TUNE} --total 0.5 --minutes 0",
        ("time was up", "--minutes"),
        leaves=("best.json.work/*",),
    ),
    Case(
        "run: statistics for a recipe that searches",
        "run ckpt new --recipe best --calibration text.txt --stats stats.safetensors",
        ("best", "leave out --stats"),
    ),
    Case("tune: no windows apart", f"{TUNE} --heldout 0", ("heldout", "greater")),
    Case("tune: junk bytes", f"{TUNE} --bytes much", ("'much'", "5GB")),
    Case(
        "tune: a size that nothing reaches",
        f"{TUNE} --bytes 1KB",
        ("no candidate reaches the size", "1,000 bytes"),
        leaves=("best.json.work/*",),  # what was measured serves the next size asked
    ),
    Case("tune: picture of a kind unknown", f"{TUNE} --plot a.doc", ("a.doc", ".png")),
    Case(
        "tune: picture into a pipe",
        f"{TUNE} --total 0.5 --plot pipe.png",
        ("pipe.png: is a FIFO",),
        lambda folder: os.mkfifo(folder / "pipe.png"),
    ),
    Case(
        "tune: the plan would go into the input",
        f"{TUNE} -o ckpt/best.json",
        ("ckpt/best.json",),
    ),
    Case("tune: no such device", f"{TUNE} --device tpu", ("'tpu'", "cpu")),
    Case(
        "tune: a stage that tries nothing",
        f"{TUNE} --recipe tune.yaml --total 0.5",
        ("at least one entry",),
        holding("tune.yaml", "tune: {shares: []}"),
    ),
    Case(
        "plan: of a recipe that searches",
        "plan ckpt --stats stats.safetensors -o p.json --recipe best",
        ("best", "vllm-moe-prune tune"),
    ),
    Case("sweep: junk", f"{SWEEP} total", ("KEY=FIRST:LAST:STEP",)),
    Case("sweep: no number", f"{SWEEP} total=a:b:c", ("KEY=FIRST:LAST:STEP",)),
    Case("sweep: infinite", f"{SWEEP} total=0:inf:1", ("KEY=FIRST:LAST:STEP",)),
    Case("sweep: backwards", f"{SWEEP} total=0.5:0.1:0.1", ("upwards",)),
    Case("sweep: of what cannot be swept", f"{SWEEP} seed=1:2:1", ("moe-count",)),
    Case("sweep: half experts", f"{SWEEP} keep=2:3:0.5", ("whole numbers",)),
    Case(
        "sweep: one value impossible, nothing written",
        f"{SWEEP} keep=2:9:1",
        ("keep",),
    ),
    Case(
        "sweep: a file is where the plans would go",
        SWEEP.replace("-o plans", "-o text.txt") + " total=0.2:0.3:0.1",
        ("text.txt",),
    ),
]
