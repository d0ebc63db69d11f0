"""How a decision grows with the number asked for: the sets dropped at each count.

One measurement serves every count, since all of it is of the intact model.
"""

from collections.abc import Sequence

from ..calibrate.stats import Stats
from ..recipe import LayerStage, Recipe
from .experts import decide_experts
from .layers import choose_blocks, rank_moe
from .plan import LayerShape


def moe_progression(
    stats: Stats, layers: Sequence[LayerShape], stage: LayerStage
) -> list[tuple[int, ...]]:
    """The MoE sublayers dropped at counts 1, 2, ...: each set contains the one before.

    Args:
        stats: With the similarity that the stage's ``moe_norm`` asks for.
        layers: The checkpoint's decoder layers.
        stage: Says which metric.
    """
    ranked = rank_moe(
        stats, stage, (at for at, one in enumerate(layers) if one.has_moe)
    )
    return [tuple(sorted(ranked[:count])) for count in range(1, len(ranked))]


def block_progression(
    stats: Stats, layers: Sequence[LayerShape], stage: LayerStage
) -> list[tuple[int, ...]]:
    """The blocks dropped at counts 1, 2, ...; consecutive runs may jump."""
    every = range(len(layers))
    return [
        tuple(choose_blocks(stats, stage, count, every))
        for count in range(1, len(layers))
    ]


def expert_progression(
    stats: Stats | None,
    layers: Sequence[LayerShape],
    recipe: Recipe,
    drops: Sequence[float],
) -> list[list[tuple[int, ...]]]:
    """For each share to drop, the survivors of each layer."""
    found = []
    for drop in drops:
        stage = recipe.experts.model_copy(update={"drop": drop, "keep": None})
        asked = recipe.model_copy(update={"experts": stage})
        plans, _ = decide_experts(stats, layers, asked)
        found.append([plan.keep for plan in plans])
    return found
