"""Several plans from one measurement, one of them cut: examples/api.py [OUT]."""

import sys
from pathlib import Path

from vllm_moe_prune import pipeline
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.recipes.schema import Calibration, ExpertStage, Recipe, SlimStage

HERE = Path(__file__).resolve().parent


def main(out: Path) -> None:
    """Measure once, plan three times, cut once, verify."""
    checkpoint = open_checkpoint(HERE / "demo-mixtral")
    recipes = [
        Recipe(
            name=f"reap{percent}",
            experts=ExpertStage(method="score", criterion="reap", drop=percent / 100),
            slim=SlimStage(method="none"),
            calibration=Calibration(
                source=str(HERE / "calibration.txt"), samples=8, sequence_length=256
            ),
        )
        for percent in (12.5, 25, 50)
    ]
    options = pipeline.RunOptions(overwrite=True)
    tokens = pipeline.measuring_tokens(checkpoint, recipes[0])
    stats = pipeline.measure(checkpoint, recipes[0], tokens, options)
    plans = [pipeline.plan(checkpoint, recipe, stats) for recipe in recipes]
    for plan in plans:
        print(plan.recipe.name, [len(layer.keep) for layer in plan.layers])
    pipeline.cut(checkpoint, plans[-1], out, options)
    print(pipeline.verify(out, checkpoint))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "demo-output/api"))
