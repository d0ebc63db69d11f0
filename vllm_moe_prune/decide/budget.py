"""How many experts leave each layer: exact budgets, whatever decides which.

Within a layer experts leave in a fixed order of steps (merges, or single removals),
each with a height that never decreases. ``global`` takes the lowest steps over all
layers, ordered by (height, layer, position): one threshold for the whole model, found
exactly by sorting where the official code searches for it. ``per-layer`` takes the
same number everywhere, ``sensitivity`` splits by measured loss. Each layer is left
with a prefix of its steps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import RecipeError
from ..recipes.schema import ExpertStage
from .cut_plan import LayerShape
from .groups import grouped_room, together

Layers = Mapping[int, LayerShape]
"""The layers that take part: MoE layers that are not dropped."""


class Step(Protocol):
    """One expert leaving a layer."""

    @property
    def height(self) -> float: ...


@dataclass(frozen=True)
class Budget:
    """How many steps each layer takes."""

    steps: dict[int, int]
    threshold: float | None = None
    """Height of the last step within a global budget; None where there is none."""


def whole_experts(share: float, experts: int) -> int:
    """A share as whole experts, rounded half up (0.145 of 100 is 15, not 14)."""
    # 0.145 * 100 is 14.499999999999998 in floating point; the slack mends it.
    return math.floor(share * experts * (1.0 + 1e-12) + 0.5)


def fewest_experts(layer: int, shape: LayerShape, stage: ExpertStage) -> int:
    """How many experts a layer must keep; a layer that has fewer keeps them all.

    Clusters never vanish, so only dropping by score can leave a layer without experts.
    """
    wanted = shape.top_k if stage.min_experts is None else stage.min_experts
    protected = len(stage.protected.get(layer, ()))
    least = 0 if stage.method == "score" else 1
    return min(
        shape.num_experts,
        max(least, wanted, protected, _held_by_groups(layer, shape, stage)),
    )


def _held_by_groups(layer: int, shape: LayerShape, stage: ExpertStage) -> int:
    """How many experts the groups of a layer must keep in all; 0 without groups."""
    if shape.groups is None:
        return 0
    return shape.num_experts - grouped_room(layer, shape, stage)


def most_removed(layer: int, shape: LayerShape, stage: ExpertStage) -> int:
    """How many experts a layer can lose."""
    most = shape.num_experts - fewest_experts(layer, shape, stage)
    most = most if stage.max_removed is None else min(most, stage.max_removed)
    # With equal groups experts go in whole rounds, one of each group.
    return most - most % together(shape, stage)


def global_target(layers: Layers, stage: ExpertStage) -> int:
    """How many experts leave the model as a whole.

    Raises:
        RecipeError: If ``keep`` is out of range or the layers cannot lose that many.
    """
    experts = sum(shape.num_experts for shape in layers.values())
    unit = unit_of(layers, stage)
    if stage.keep is None:
        target = unit * whole_experts((stage.drop or 0.0) / unit, experts)
    else:
        _check_keep(layers, stage)
        target = experts - stage.keep * len(layers)
        _check_unit(target, unit)
        if target < 0:
            raise RecipeError(
                f"keep {stage.keep} experts per layer, but the layers have "
                f"{experts / len(layers):g} on average. Lower experts.keep."
            )
    room = sum(most_removed(layer, shape, stage) for layer, shape in layers.items())
    if target > room:
        raise RecipeError(_too_many(layers, stage, target, experts, room))
    return target


def unit_of(layers: Layers, stage: ExpertStage) -> int:
    """How many experts leave a layer at once; of one model, the same in all layers."""
    return max((together(shape, stage) for shape in layers.values()), default=1)


def _check_unit(target: int, unit: int) -> None:
    if target % unit:
        raise RecipeError(
            f"experts.keep leaves {target} experts to remove, but with experts.groups: "
            f"equal {unit} leave at a time, one of each group. Change keep, or set "
            "experts.groups: uneven."
        )


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
    sequences: Mapping[int, Sequence[Step]], most: Mapping[int, int], target: int
) -> Budget:
    """Choose the ``target`` lowest steps of the model.

    Args:
        sequences: Each layer's whole sequence of steps.
        most: How many steps each layer may take.
        target: At most the sum of ``most``.
    """
    # Heights never fall within a layer, so the lowest steps are a prefix of each.
    ranked = sorted(
        (step.height, layer, position)
        for layer, sequence in sequences.items()
        for position, step in enumerate(sequence[: most[layer]])
    )[:target]
    steps = dict.fromkeys(sequences, 0)
    for _, layer, _ in ranked:
        steps[layer] += 1
    return Budget(steps, ranked[-1][0] if ranked else None)


def _layer_target(layer: int, shape: LayerShape, stage: ExpertStage) -> int:
    experts, fewest = shape.num_experts, fewest_experts(layer, shape, stage)
    unit = together(shape, stage)
    if stage.keep is None:
        target = unit * whole_experts((stage.drop or 0.0) / unit, experts)
        asked = (
            f"layer {layer}: drop {stage.drop} keeps {experts - target} of {experts}"
        )
        advice = "Lower experts.drop"
    else:
        target = experts - stage.keep
        _check_unit(target, unit)
        asked = f"layer {layer}: keep {stage.keep}"
        advice = f"Keep at least {fewest}"
    if target < 0:
        raise RecipeError(
            f"{asked} experts, but it has {experts}. "
            "Lower experts.keep, or use budget: global."
        )
    if experts - target < fewest:
        why = _minimum({layer: shape}, stage)
        or_else = _or_allow_fewer({layer: shape}, stage)
        raise RecipeError(f"{asked} experts, but {why}. {advice}{or_else}.")
    if stage.max_removed is not None and target > stage.max_removed:
        raise RecipeError(
            f"{asked} experts, that is {target} fewer, but experts.max_removed is "
            f"{stage.max_removed}. Remove fewer, or raise experts.max_removed."
        )
    return target


def _check_keep(layers: Layers, stage: ExpertStage) -> None:
    if stage.keep is None or not layers:
        return
    least = {layer: fewest_experts(layer, layers[layer], stage) for layer in layers}
    first = min(least, key=lambda layer: (least[layer], layer))
    # Refused here only if it is too few for every layer.
    if stage.keep < least[first]:
        tightest = {first: layers[first]}
        raise RecipeError(
            f"keep {stage.keep} experts per layer, but {_minimum(tightest, stage)}. "
            f"Keep at least {least[first]}{_or_allow_fewer(tightest, stage)}."
        )


def _too_many(
    layers: Layers, stage: ExpertStage, target: int, experts: int, room: int
) -> str:
    fewest = max(fewest_experts(layer, layers[layer], stage) for layer in layers)
    cap = stage.max_removed
    limits = f"at least {fewest} per layer"
    if _group_minimum(layers, stage):
        limits += ", which routing by groups needs,"
    lower = "Lower experts.drop" if stage.keep is None else "Raise experts.keep"
    if cap is not None:
        limits += f" and at most {cap} removed from each"
        lower += ", raise experts.max_removed"
    # Where max_removed binds everywhere, a lower minimum would not help.
    capped = cap is not None and room == cap * len(layers)
    fewer = "" if capped else _or_allow_fewer(layers, stage)
    return (
        f"asked to remove {target} of {experts} experts, but with {limits} only "
        f"{room} can go. {lower}{fewer}."
    )


def _held_by_protection(layers: Layers, stage: ExpertStage) -> bool:
    """Whether a list of protected experts is what sets a layer's minimum."""
    free = stage.model_copy(update={"protected": {}})
    return any(
        fewest_experts(layer, shape, free) < fewest_experts(layer, shape, stage)
        for layer, shape in layers.items()
    )


def _group_minimum(layers: Layers, stage: ExpertStage) -> int:
    """What groups set as a layer's minimum, or 0 if something else does."""
    held = max(_held_by_groups(layer, shape, stage) for layer, shape in layers.items())
    return held if held > max(shape.top_k for shape in layers.values()) else 0


def _minimum(layers: Layers, stage: ExpertStage) -> str:
    if _held_by_protection(layers, stage):
        layer = min(layers)
        return f"{len(stage.protected.get(layer, ()))} are protected"
    if held := _group_minimum(layers, stage):
        return f"routing by groups needs {held}"
    if stage.min_experts is None:
        return f"top-k is {min(shape.top_k for shape in layers.values())}"
    return f"experts.min_experts is {stage.min_experts}"


def _or_allow_fewer(layers: Layers, stage: ExpertStage) -> str:
    if _held_by_protection(layers, stage):
        return ", or protect fewer"
    if all(fewest_experts(layer, layers[layer], stage) <= 1 for layer in layers):
        return ""
    if _group_minimum(layers, stage):
        return ""
    if stage.min_experts is not None:
        return ", or lower experts.min_experts"
    return (
        ", or set experts.min_experts: 1 to allow layers with fewer experts than top-k"
    )
