"""What a search takes and finds: several sizes at once, or each by itself.

    OMP_NUM_THREADS=1 python bench/tune.py examples/demo-mixtral --totals 0.4 0.5 0.65

Times are of the processor, so that other jobs beside it count little. ``--alone``
makes a search for each size, as was needed once: with PYTHONPATH set to a checkout of
that time it measures the search of that time. A killed run continues with ``--work``.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.perplexity import perplexity_of
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.recipes.loading import load_recipe
from vllm_moe_prune.recipes.schema import parse_recipe
from vllm_moe_prune.tune.search import tune

EXAMPLES = Path(__file__).parent.parent / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--totals", type=float, nargs="+", default=[0.4, 0.5, 0.65])
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.model)
    best = load_recipe("best").model_dump(exclude={"calibration"})
    text = {"source": str(EXAMPLES / "calibration.txt"), "samples": args.samples}
    data = {**best, "calibration": {**text, "sequence_length": args.length}}
    recipe = parse_recipe(data, "best")
    options = pipeline.RunOptions()
    result: dict[str, Any] = {
        "model": Path(args.model).name,
        "threads": torch.get_num_threads(),
        "alone": args.alone,
        "searches": [],
    }
    for totals in [[one] for one in args.totals] if args.alone else [args.totals]:
        cpu, wall = time.process_time(), time.monotonic()
        if args.alone:
            asked = recipe.model_copy(update={"total_sparsity": totals[0]})
            found = [tune(checkpoint, asked, options, work=args.work)]
        else:
            from vllm_moe_prune.tune.search import tune_sizes
            from vllm_moe_prune.tune.sizes import Size

            sizes = [Size(total=one) for one in totals]
            found = tune_sizes(checkpoint, recipe, options, sizes, work=args.work)
        row = {
            "totals": totals,
            "cpu_s": round(time.process_time() - cpu, 1),
            "wall_s": round(time.monotonic() - wall, 1),
            "winners": [
                {
                    "name": one.best.name,
                    "perplexity": round(perplexity_of(one.best.loss.mean), 4),
                    "intact": round(perplexity_of(one.intact.loss.mean), 4),
                }
                for one in found
            ],
        }
        result["searches"].append(row)
        shown = {**row, "winners": [one["name"] for one in row["winners"]]}
        print(json.dumps(shown), flush=True)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
