"""What narrowing experts costs: held-out perplexity by share and ridge.

python bench/narrow.py examples/demo-arctic --shares 0.25 0.5

Plans run in the streaming forward side by side; nothing is written.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from vllm_moe_prune.calibrate.data import load_heldout, load_tokens
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.losses import Text
from vllm_moe_prune.cut.planned import planned_losses
from vllm_moe_prune.recipes.schema import Recipe, parse_recipe
from vllm_moe_prune.stages.plan import plan

EXAMPLES = Path(__file__).parents[1] / "examples"


def main() -> None:
    """Print one line per way of narrowing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--text", default=str(EXAMPLES / "calibration.txt"))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--ridges", type=float, nargs="+", default=[0.003, 0.03, 0.3])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--heldout", type=int, default=12)
    asked = parser.parse_args()
    calibration = {
        "source": asked.text,
        "samples": asked.samples,
        "sequence_length": asked.sequence_length,
        "heldout": asked.heldout,
    }

    def recipe(**narrow: Any) -> Recipe:
        nothing = {"experts": {"method": "none"}, "slim": {"method": "none"}}
        data = {**nothing, "calibration": calibration, "narrow": narrow}
        return parse_recipe(data, "narrow")

    ways = {"as it is": recipe()}
    for share in asked.shares:
        ways[f"{share:g}, not refitted"] = recipe(share=share, refit="none")
        for ridge in asked.ridges:
            ways[f"{share:g}, ridge {ridge:g}"] = recipe(share=share, ridge=ridge)
    checkpoint = open_checkpoint(asked.checkpoint)
    wanted = ways["as it is"].calibration
    heldout, tokens = (
        load(checkpoint, wanted).ids_ST for load in (load_heldout, load_tokens)
    )
    plans = [plan(checkpoint, each, None) for each in ways.values()]
    model = StreamingModel(checkpoint)
    losses = planned_losses(model, plans, [Text(heldout)], tokens)
    for name, decided, (loss,) in zip(ways, plans, losses, strict=True):
        width = decided.layers[-1].width or checkpoint.moe_layers[-1].width
        print(f"{name:24} {width:6} channels  perplexity {math.exp(loss.mean):.2f}")


if __name__ == "__main__":
    main()
