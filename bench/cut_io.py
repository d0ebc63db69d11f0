"""Does a data-free cut run at the speed of copying files, in bounded memory?

    python bench/cut_io.py [--gib 8] [--quick] [--measured] [--json FILE]
        [--keep-in FOLDER]

Writes a synthetic Mixtral-8x7B-shaped checkpoint, cuts a quarter of its experts away,
and beside it, in the same run, reads all the input and writes the output by plain file
copies. Caches are dropped before each part; ``--measured`` cuts by a plan that says
what every weight was, which is compared. Claim: at most 1.3 times that time, and
peak memory of at most 1 GiB + 2 x the largest layer.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from synthetic import tensor_bytes, write_mixtral

GIB = 2**30
CUT = """
import sys, time
from pathlib import Path
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
start = time.monotonic()
execute_plan(open_checkpoint(sys.argv[1]), load_plan(Path(sys.argv[2])),
    Path(sys.argv[3]), max_shard_bytes=2_000_000_000)
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(time.monotonic() - start, peak)
"""


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the input")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small model, one round")
    parser.add_argument("--measured", action="store_true", help="hash what is read")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--keep-in", type=Path, help="work in this folder")
    options = parser.parse_args()
    hidden, width = (1024, 3584) if options.quick else (4096, 14336)
    rounds = 1 if options.quick else options.rounds
    layer_bytes = 8 * 3 * hidden * width * 2
    layers = 4 if options.quick else max(3, -(-int(options.gib * GIB) // layer_bytes))
    with tempfile.TemporaryDirectory(dir=options.keep_in) as temporary:
        work = Path(temporary)
        source = write_mixtral(
            work / "in",
            layers=layers,
            hidden=hidden,
            width=width,
            experts=8,
            heads=hidden // 128,
            layers_per_shard=0.625,
        )
        plan = write_plan(source, work / "plan.json", measured=options.measured)
        results = [one_round(source, plan, work) for _ in range(rounds)]
    figures = summarize(results, layer_bytes)
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def write_plan(source: Path, path: Path, *, measured: bool) -> Path:
    """Keep six of eight experts everywhere; which ones makes no difference here."""
    from vllm_moe_prune import __version__
    from vllm_moe_prune.checkpoint.layer_hashes import layer_hashes
    from vllm_moe_prune.checkpoint.source import open_checkpoint
    from vllm_moe_prune.cut.predict import model_facts
    from vllm_moe_prune.decide.cut_plan import CutPlan, LayerPlan, save_plan
    from vllm_moe_prune.recipes.schema import Recipe

    checkpoint = open_checkpoint(source)
    keep = (0, 1, 3, 4, 6, 7)
    plan = CutPlan(
        tool_version=__version__,
        model=model_facts(checkpoint).model,
        recipe=Recipe(),
        weight_hashes={
            str(layer.index): tuple(layer_hashes(checkpoint, layer.index).values())
            for layer in (checkpoint.layers if measured else ())
        },
        layers=tuple(
            LayerPlan(layer=layer.index, experts=8, keep=keep)
            for layer in checkpoint.layers
        ),
    )
    save_plan(plan, path)
    return path


def one_round(source: Path, plan: Path, work: Path) -> dict[str, float]:
    """The cut, then the plain copies, each from a cold cache."""
    out, copy = work / "out", work / "copy"
    drop_caches(source)
    # VmHWM, not ru_maxrss: that one would count this process's memory before exec.
    done = subprocess.run(
        [sys.executable, "-c", CUT, str(source), str(plan), str(out)],
        stdout=subprocess.PIPE,
        check=True,
    )
    cut_s, peak = map(float, done.stdout.split())
    drop_caches(source)
    start = time.monotonic()
    for path in source.glob("*.safetensors"):
        read_through(path)
    read_s = time.monotonic() - start
    drop_caches(out)
    copy.mkdir()
    start = time.monotonic()
    for path in out.glob("*.safetensors"):
        shutil.copyfile(path, copy / path.name)
        sync(copy / path.name)
    copy_s = time.monotonic() - start
    result = {
        "input_bytes": tensor_bytes(source),
        "output_bytes": tensor_bytes(out),
        "shards_in": len(list(source.glob("*.safetensors"))),
        "cut_s": cut_s,
        "read_s": read_s,
        "copy_s": copy_s,
        "peak_rss_bytes": peak,
    }
    shutil.rmtree(out)
    shutil.rmtree(copy)
    return result


def read_through(path: Path) -> None:
    """Read a file to its end and forget it."""
    buffer = bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def sync(path: Path) -> None:
    """Force a file to disk, as the cut does with every shard."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def drop_caches(folder: Path) -> None:
    """Make the kernel forget a folder's pages, so that reads come from the disk."""
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def summarize(results: list[dict[str, float]], layer_bytes: int) -> dict[str, float]:
    """The round with the median ratio."""
    for result in results:
        result["ratio"] = result["cut_s"] / (result["read_s"] + result["copy_s"])
    median = sorted(results, key=lambda result: result["ratio"])[len(results) // 2]
    limit = GIB + 2 * layer_bytes
    return median | {
        "rounds": len(results),
        "ratio_min": min(result["ratio"] for result in results),
        "ratio_max": max(result["ratio"] for result in results),
        "layer_bytes": layer_bytes,
        "rss_limit_bytes": limit,
    }


def show(figures: dict[str, float]) -> None:
    """Print the table."""
    size, out = figures["input_bytes"] / GIB, figures["output_bytes"] / GIB
    print(f"input {size:.2f} GiB in {figures['shards_in']:.0f} shards -> {out:.2f} GiB")
    print(f"{'cut':32} {figures['cut_s']:8.2f} s")
    print(f"{'plain: read all the input':32} {figures['read_s']:8.2f} s")
    print(f"{'plain: copy the output':32} {figures['copy_s']:8.2f} s")
    print(
        f"{'cut / plain (claim: <= 1.3)':32} {figures['ratio']:8.2f}   "
        f"({figures['ratio_min']:.2f} to {figures['ratio_max']:.2f} "
        f"in {figures['rounds']:.0f} rounds)"
    )
    print(
        f"{'peak RSS':32} {figures['peak_rss_bytes'] / GIB:8.2f} GiB "
        f"(claim: <= {figures['rss_limit_bytes'] / GIB:.2f}; "
        f"largest layer {figures['layer_bytes'] / GIB:.2f})"
    )


if __name__ == "__main__":
    main()
