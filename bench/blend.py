"""Blended calibration against one source: coverage and perplexity of every domain.

    python bench/blend.py examples/demo-mixtral [--drop 0.5] [--samples 60]

The first half of each `examples/heldout/DOMAIN.txt` calibrates, the second half is
judged. One measurement serves all mixes. Experts leave by `--criterion`, ranked over
the whole model.
"""

import argparse
import tempfile
from pathlib import Path

from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.data import load_tokens
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import perplexity_of
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.losses import Text
from vllm_moe_prune.cut.planned import planned_losses
from vllm_moe_prune.recipes.calibration import Calibration, SourceText
from vllm_moe_prune.recipes.schema import Recipe, parse_recipe
from vllm_moe_prune.stages.measure import collect

HELDOUT = Path(__file__).parent.parent / "examples" / "heldout"


def halves(folder: Path) -> tuple[dict[str, SourceText], dict[str, str]]:
    """Files with the first half of every domain, and with the second."""
    first, second = {}, {}
    for path in sorted(HELDOUT.glob("*.txt")):
        text = path.read_text("utf-8")
        at = text.index("\n", len(text) // 2)
        for name, part in (("a", text[:at]), ("b", text[at:])):
            (folder / f"{path.stem}-{name}.txt").write_text(part, "utf-8")
        first[path.stem] = SourceText(text=str(folder / f"{path.stem}-a.txt"))
        second[path.stem] = str(folder / f"{path.stem}-b.txt")
    return first, second


def asking(args: argparse.Namespace, calibration: Calibration, blend: object) -> Recipe:
    """The recipe with another mix of its sources."""
    experts = {
        "method": "score",
        "criterion": args.criterion,
        "drop": args.drop,
        "min_experts": 1,
    }
    data = {
        "experts": experts,
        "slim": {"method": "none"},
        "calibration": calibration.model_dump() | {"blend": blend},
    }
    return parse_recipe(data, "blend")


def main() -> None:
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--drop", type=float, default=0.5)
    parser.add_argument("--criterion", default="total-output")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    checkpoint = open_checkpoint(args.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        first, second = halves(Path(folder))
        calibration = Calibration(
            source=first, samples=args.samples, sequence_length=args.length
        )
        tokens = load_tokens(checkpoint, calibration)
        judged = [
            load_tokens(
                checkpoint,
                calibration.model_copy(
                    update={"source": text, "samples": args.windows}
                ),
            )
            for text in second.values()
        ]
    mixes: dict[str, object] = {f"{name} alone": {name: 1.0} for name in first}
    mixes |= {"blended, equal": dict.fromkeys(first, 1.0), "`maxmin`": "maxmin"}
    recipes = {name: asking(args, calibration, mix) for name, mix in mixes.items()}
    options = pipeline.RunOptions(device="cpu")
    stats = collect(checkpoint, list(recipes.values()), tokens, options)
    plans = {
        name: pipeline.plan(checkpoint, one, stats) for name, one in recipes.items()
    }
    dense = parse_recipe(
        {"experts": {"method": "none"}, "slim": {"method": "none"}}, "dense"
    )
    losses = planned_losses(
        StreamingModel(checkpoint),
        [pipeline.plan(checkpoint, dense, None), *plans.values()],
        [Text(one.ids_ST) for one in judged],
    )
    heads = " | ".join([*first, "worst"])
    print(f"\nCoverage, {args.checkpoint.name}\n\n| calibrated on | {heads} |")
    print("|---|" + "---:|" * (len(first) + 1))
    for name, plan in plans.items():
        shares = [plan.measurement.coverage[one] for one in first]
        cells = " | ".join(f"{share:.1%}" for share in [*shares, min(shares)])
        print(f"| {name} | {cells} |")
    print(
        f"\nPerplexity\n\n| calibrated on | {' | '.join(first)} | worst, over dense |"
    )
    print("|---|" + "---:|" * (len(first) + 1))
    for name, row in zip(["dense", *plans], losses, strict=True):
        found = [perplexity_of(loss.mean) for loss in row]
        ratios = [
            perplexity_of(loss.mean - whole.mean)
            for loss, whole in zip(row, losses[0], strict=True)
        ]
        cells = " | ".join(f"{value:.2f}" for value in found)
        print(f"| {name} | {cells} | {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
