"""How many experts leave each layer: exact budgets, global or the same everywhere.

A global budget takes the lowest merges over all layers, ordered by (height, layer,
first, second): one threshold for the whole model, found exactly by sorting where the
official code searches for it. Within a layer equal heights already come in the order
(first, second), so that each layer is left with a prefix of its merge sequence.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import RecipeError
from ..recipe import ExpertStage
from .clusters import Merge
from .plan import LayerShape

Layers = Mapping[int, LayerShape]
"""The layers that take part: MoE layers that are not dropped."""


@dataclass(frozen=True)
class Budget:
    """How many merges each layer carries out."""

    merges: dict[int, int]
    threshold: float | None = None
    """Height of the last merge within a global budget; None where there is none."""


def whole_experts(share: float, experts: int) -> int:
    """A share as whole experts, rounded half up (0.145 of 100 is 15, not 14)."""
    return math.floor(share * experts * (1.0 + 1e-12) + 0.5)


def fewest_experts(shape: LayerShape, stage: ExpertStage) -> int:
    """How many experts a layer must keep; a layer that has fewer keeps them all."""
    wanted = shape.top_k if stage.min_experts is None else stage.min_experts
    return min(shape.num_experts, max(1, wanted))


def most_removed(shape: LayerShape, stage: ExpertStage) -> int:
    """How many experts a layer can lose."""
    most = shape.num_experts - fewest_experts(shape, stage)
    return most if stage.max_removed is None else min(most, stage.max_removed)


def global_target(layers: Layers, stage: ExpertStage) -> int:
    """How many experts leave the model as a whole.

    Raises:
        RecipeError: If ``keep`` is out of range or the layers cannot lose that many.
    """
    experts = sum(shape.num_experts for shape in layers.values())
    if stage.keep is None:
        target = whole_experts(stage.drop or 0.0, experts)
    else:
        _check_keep(layers, stage)
        target = experts - stage.keep * len(layers)
        if target < 0:
            raise RecipeError(
                f"keep {stage.keep} experts per layer, but the layers have "
                f"{experts / len(layers):g} on average. Lower experts.keep."
            )
    room = sum(most_removed(shape, stage) for shape in layers.values())
    if target > room:
        raise RecipeError(_too_many(layers, stage, target, experts, room))
    return target


def layer_targets(layers: Layers, stage: ExpertStage) -> dict[int, int]:
    """How many experts leave each layer under ``budget: per-layer``.

    Raises:
        RecipeError: Naming the first layer that cannot lose its share.
    """
    _check_keep(layers, stage)
    return {
        layer: _layer_target(layer, shape, stage) for layer, shape in layers.items()
    }


def spend_global(
    sequences: Mapping[int, Sequence[Merge]], most: Mapping[int, int], target: int
) -> Budget:
    """Choose the ``target`` lowest merges of the model.

    Args:
        sequences: Each layer's whole merge sequence.
        most: How many merges each layer may carry out.
        target: At most the sum of ``most``.
    """
    ranked = sorted(
        (merge.height, layer, position)
        for layer, sequence in sequences.items()
        for position, merge in enumerate(sequence[: most[layer]])
    )[:target]
    merges = dict.fromkeys(sequences, 0)
    for _, layer, _ in ranked:
        merges[layer] += 1
    return Budget(merges, ranked[-1][0] if ranked else None)


def _layer_target(layer: int, shape: LayerShape, stage: ExpertStage) -> int:
    experts, fewest = shape.num_experts, fewest_experts(shape, stage)
    if stage.keep is None:
        target = whole_experts(stage.drop or 0.0, experts)
        asked = (
            f"layer {layer}: drop {stage.drop} keeps {experts - target} of {experts}"
        )
        advice = "Lower experts.drop"
    else:
        target = experts - stage.keep
        asked = f"layer {layer}: keep {stage.keep}"
        advice = f"Keep at least {fewest}"
    if target < 0:
        raise RecipeError(
            f"{asked} experts, but it has {experts}. "
            "Lower experts.keep, or use budget: global."
        )
    if experts - target < fewest:
        raise RecipeError(
            f"{asked} experts, but {_minimum(shape.top_k, stage)}. "
            f"{advice}{_or_allow_fewer(fewest, stage)}."
        )
    if stage.max_removed is not None and target > stage.max_removed:
        raise RecipeError(
            f"{asked} experts, that is {target} fewer, but experts.max_removed is "
            f"{stage.max_removed}. Remove fewer, or raise experts.max_removed."
        )
    return target


def _check_keep(layers: Layers, stage: ExpertStage) -> None:
    fewest = min((fewest_experts(shape, stage) for shape in layers.values()), default=0)
    if stage.keep is not None and stage.keep < fewest:
        top_k = min(shape.top_k for shape in layers.values())
        raise RecipeError(
            f"keep {stage.keep} experts per layer, but {_minimum(top_k, stage)}. "
            f"Keep at least {fewest}{_or_allow_fewer(fewest, stage)}."
        )


def _too_many(
    layers: Layers, stage: ExpertStage, target: int, experts: int, room: int
) -> str:
    fewest = max(fewest_experts(shape, stage) for shape in layers.values())
    cap = stage.max_removed
    limits = f"at least {fewest} per layer"
    lower = "Lower experts.drop" if stage.keep is None else "Raise experts.keep"
    if cap is not None:
        limits += f" and at most {cap} removed from each"
        lower += ", raise experts.max_removed"
    capped = cap is not None and room == cap * len(layers)
    fewer = "" if capped else _or_allow_fewer(fewest, stage)
    return (
        f"asked to remove {target} of {experts} experts, but with {limits} only "
        f"{room} can go. {lower}{fewer}."
    )


def _minimum(top_k: int, stage: ExpertStage) -> str:
    if stage.min_experts is None:
        return f"top-k is {top_k}"
    return f"experts.min_experts is {stage.min_experts}"


def _or_allow_fewer(fewest: int, stage: ExpertStage) -> str:
    if fewest == 1:
        return ""
    if stage.min_experts is not None:
        return ", or lower experts.min_experts"
    return (
        ", or set experts.min_experts: 1 to allow layers with fewer experts than top-k"
    )
