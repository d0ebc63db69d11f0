"""How do the decisions scale with the number of experts?

    python bench/decide_scale.py [--experts 8 32 128 256 512] [--json FILE]
    python bench/decide_scale.py --data-free    # without the forward pass

For each number of experts it writes a checkpoint with Arctic's 35 layers and router
rows of 7168, and experts one wide (their weights are not looked at), and takes the
time and the peak memory, each in a process of its own, of

- the data-free path: open the checkpoint, measure its router rows, plan;
- planning from co-activation counts, and the forward passes that measuring those took.

Claim: no forward pass without data, one with, whatever the number of experts; 128
experts x 35 layers planned from router rows in under a minute on 2 cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from synthetic import write_mixtral

HIDDEN, TOKENS = 7168, 64
MIB = 2**20
STEPS = """
import json, sys, time
from pathlib import Path
import torch
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.data import Tokens, sha256_of
from vllm_moe_prune.calibrate.accumulate import measure
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.progress import peak_rss_bytes
from vllm_moe_prune.recipes.schema import ExpertStage, Recipe, SlimStage

started = peak_rss_bytes()
times = [time.monotonic()]
checkpoint = open_checkpoint(Path(sys.argv[1]))
times.append(time.monotonic())
tokens = None
if with_data := sys.argv[2] == "coactivation":
    ids_ST = torch.arange(3, 3 + int(sys.argv[3])).view(1, -1)
    tokens = Tokens(ids_ST, "a row of ids", sha256_of(ids_ST))
stats = measure(checkpoint, weights=False, tokens=tokens)
times.append(time.monotonic())
stage = ExpertStage(
    drop=0.2,
    representative="router-norm",
    coactivation_weight=1.0 if with_data else 0.0,
    reconstruct="never",
)
recipe = Recipe(experts=stage, slim=SlimStage(method="none"))
decided = pipeline.plan(checkpoint, recipe, stats)
times.append(time.monotonic())
kept = sum(len(layer.keep) for layer in decided.layers)
steps = [after - before for before, after in zip(times, times[1:])]
print(json.dumps({
    "open_s": steps[0], "measure_s": steps[1], "plan_s": steps[2],
    "forward_passes": stats.forward_passes, "kept": kept,
    "imports_bytes": started, "peak_rss_bytes": peak_rss_bytes(),
}))
"""


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = (8, 32, 128, 256, 512)
    parser.add_argument("--experts", type=int, nargs="+", default=sizes)
    parser.add_argument("--layers", type=int, default=35)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--data-free", action="store_true", help="no forward pass")
    options = parser.parse_args()
    paths = ["router"] if options.data_free else ["router", "coactivation"]
    rows = [one_size(experts, options.layers, paths) for experts in options.experts]
    show(rows, options.layers)
    if options.json:
        figures = {"layers": options.layers, "hidden": HIDDEN, "rows": rows}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def one_size(experts: int, layers: int, paths: list[str]) -> dict[str, Any]:
    """The paths on a checkpoint that is gone afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        source = write_mixtral(
            Path(temporary) / "in",
            layers=layers,
            hidden=HIDDEN,
            width=1,
            experts=experts,
            heads=2,
            kv_heads=1,
            head_dim=32,
        )
        return {
            "experts": experts,
            **{path: one_path(source, path) for path in paths},
        }


def one_path(source: Path, path: str) -> dict[str, float]:
    """Open, measure and plan in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(source), path, str(TOKENS)],
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def show(rows: list[dict[str, Any]], layers: int) -> None:
    """Print the table."""
    print(f"{layers} layers, router rows of {HIDDEN}")
    print("experts  path            passes      open  measure     plan   memory")
    for row in rows:
        for path in ("router", "coactivation"):
            if path not in row:
                continue
            found = row[path]
            grown = (found["peak_rss_bytes"] - found["imports_bytes"]) / MIB
            print(
                f"{row['experts']:7}  {path:12} {found['forward_passes']:9.0f} "
                f"{found['open_s']:7.2f} s {found['measure_s']:6.2f} s "
                f"{found['plan_s']:6.2f} s {grown:5.0f} MiB"
            )


if __name__ == "__main__":
    main()
