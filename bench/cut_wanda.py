"""What does a Wanda cut cost beside a plain forward pass over the same tokens?

    python bench/cut_wanda.py [--quick] [--json FILE]

In one run, on one synthetic Mixtral of at least 300 M parameters: measure (one forward
pass for co-activation) + plan + Wanda cut, and a plain transformers forward of the same
calibration tokens with the model in memory. Then the same with twice the layers.
Claims: at most 3 times the forward's time; peak memory follows a layer, not the model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from synthetic import tensor_bytes, write_mixtral

MIB = 2**20
HIDDEN, WIDTH, EXPERTS, LAYERS = 1024, 2048, 8, 6
COMMON = """
import json, sys, time
from pathlib import Path
import torch
source, samples, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
generator = torch.Generator().manual_seed(0)
ids = torch.randint(0, 1024, (samples, length), generator=generator)
def tell(elapsed):
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"elapsed_s": elapsed, "peak_rss_bytes": peak}))
"""
OURS = """
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.data import Tokens, sha256_of
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.recipes.loading import load_recipe
import transformers.models.mixtral.modeling_mixtral
start = time.monotonic()
tokens = Tokens(ids, "random", sha256_of(ids))
checkpoint, recipe = open_checkpoint(source), load_recipe("stun40-paper")
options = pipeline.RunOptions()
stats = pipeline.measure(checkpoint, recipe, tokens, options)
plan = pipeline.plan(checkpoint, recipe, stats)
pipeline.cut(checkpoint, plan, Path(source + "-out"), options, tokens)
tell(time.monotonic() - start)
"""
PLAIN = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
with torch.no_grad():
    model(ids[:1])
    start = time.monotonic()
    for row in ids.split(4):
        model(row)
tell(time.monotonic() - start)
"""


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few tokens, one round")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    samples = 8 if options.quick else options.samples
    rounds = 1 if options.quick else options.rounds
    figures = {
        str(layers): bench(layers, samples, options.length, rounds)
        for layers in (LAYERS, 2 * LAYERS)
    }
    show(figures, samples * options.length)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def bench(layers: int, samples: int, length: int, rounds: int) -> dict[str, float]:
    """Both sides in turn, A B A B; the median round by ratio."""
    with tempfile.TemporaryDirectory() as temporary:
        source = write_mixtral(
            Path(temporary) / "in",
            layers=layers,
            hidden=HIDDEN,
            width=WIDTH,
            experts=EXPERTS,
        )
        found = []
        for _ in range(rounds):
            plain = child(PLAIN, source, samples, length)
            ours = child(OURS, source, samples, length)
            subprocess.run(["rm", "-rf", f"{source}-out"], check=True)
            found.append(
                {
                    "parameters": tensor_bytes(source) / 2,
                    "plain_s": plain["elapsed_s"],
                    "plain_rss_bytes": plain["peak_rss_bytes"],
                    "cut_s": ours["elapsed_s"],
                    "cut_rss_bytes": ours["peak_rss_bytes"],
                    "ratio": ours["elapsed_s"] / plain["elapsed_s"],
                }
            )
    median = sorted(found, key=lambda item: item["ratio"])[len(found) // 2]
    ratios = [item["ratio"] for item in found]
    return median | {"ratio_min": min(ratios), "ratio_max": max(ratios)}


def child(code: str, source: Path, samples: int, length: int) -> dict[str, float]:
    """Run one side in a process of its own, so that its peak memory is its own."""
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code, str(source), str(samples), str(length)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(figures: dict[str, dict[str, float]], tokens: int) -> None:
    """Print the table."""
    print(f"{tokens} calibration tokens, hidden {HIDDEN}, {EXPERTS} experts of {WIDTH}")
    columns = ("layers", "M params", "plain tok/s", "cut tok/s", "ratio", "cut RSS MiB")
    print("  ".join(f"{name:>12}" for name in columns))
    for layers, row in figures.items():
        cells = (
            layers,
            f"{row['parameters'] / 1e6:.0f}",
            f"{tokens / row['plain_s']:.0f}",
            f"{tokens / row['cut_s']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['cut_rss_bytes'] / MIB:.0f}",
        )
        print("  ".join(f"{cell:>12}" for cell in cells))
    print("claim: ratio <= 3; RSS does not follow the number of layers")


if __name__ == "__main__":
    main()
