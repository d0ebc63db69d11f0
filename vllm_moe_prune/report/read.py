"""What a report shows, read from a finished output folder: plain values, checked.

Decisions come from plan.json, counts from provenance.json, measurements from the
statistics kept in the output and from further files. E experts, H hidden states.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import JsonValue

from ..calibrate.stats import Array, LayerStats, Stats
from ..calibrate.stats_file import load_stats
from ..checkpoint.fingerprint import difference
from ..checkpoint.source import open_checkpoint
from ..cut.output import STATS_FILE
from ..decide.check_plan import check_plan
from ..decide.clusters import Merge, merge_sequence
from ..decide.cut_plan import CutPlan, LayerPlan, load_plan
from ..decide.facts import LayerFacts
from ..decide.sensitivity import rule
from ..decide.similarity import expert_distance
from ..errors import PlanError, RemapError
from ..slim.kurtosis import kurtosis
from .record import LayerCounts, LayerPowers, LayerRefit, Provenance, read_provenance

_Sums = tuple[Array | None, Array | None, Array | None]
"""Power sums of a layer's experts: before, trimmed, slimmed."""
Found = TypeVar("Found")


@dataclass(frozen=True)
class Kurtosis:
    """Of routed experts' weights that are not zero; None: not measured."""

    before: float | None
    trimmed: float | None
    """Of the survivors, before slimming."""
    slimmed: float | None
    """Of the survivors as they were written."""


@dataclass(frozen=True, kw_only=True)
class LayerNumbers:
    """One decoder layer of the input; what is None was not measured."""

    layer: int
    action: str
    experts: int
    keep: tuple[int, ...]
    clusters: tuple[tuple[int, ...], ...] | None
    removed: float
    """Share of the layer's expert parameters that left with experts."""
    zeroed: float
    """Share that was zeroed in what is left."""
    unseen: tuple[int, ...]
    kurtosis: Kurtosis
    distance_EE: Array | None = None
    merges: tuple[Merge, ...] = ()
    routing_score_E: Array | None = None
    """Mean over tokens of the full softmax."""
    frequency_E: Array | None = None
    """Share of the tokens that chose the expert."""
    moe_cosine: float | None = None
    """Mean cosine of the hidden state before and after norm, MoE and residual."""
    sensitivity_P2: Array | None = None
    """Points (experts removed from this layer alone, held-out loss then), measured by
    the rule that the plan removes them by."""
    refit: LayerRefit | None = None
    coverage: dict[str, float] = field(default_factory=dict)
    """Source of text -> share of its routing choices that fell on experts that stay."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Everything a report shows."""

    plan: CutPlan
    name: str
    tool_version: str
    bytes_before: int | None
    bytes_after: int
    parameters_before: int
    parameters_after: int
    zeros: int
    expert_sparsity: float
    total_sparsity: float
    forward_passes: dict[str, int]
    calibration: dict[str, Any] | None
    earlier_cuts: int
    kurtosis: Kurtosis
    layers: tuple[LayerNumbers, ...]
    block_cosine_HH: Array | None = None
    missing: tuple[str, ...] = ()
    """What was not measured, and how it can be."""

    @property
    def moe_layers(self) -> tuple[LayerNumbers, ...]:
        """The layers that had experts."""
        return tuple(layer for layer in self.layers if layer.experts)


def read_numbers(
    folder: Path, stats_files: Sequence[Path] = (), *, allow_links: bool = False
) -> Numbers:
    """Read a finished output folder.

    Args:
        folder: What ``cut`` or ``run`` wrote.
        stats_files: Statistics of the source for what the output does not keep; of
            those that measured the same the first one counts.
        allow_links: Follow links that lead out of the folder.

    Raises:
        CheckpointError: The folder is no checkpoint, or its provenance is damaged.
        RemapError: It was not written by this tool, or its remap table was changed.
        PlanError: The plan or a statistics file is damaged, or of another model.
    """
    output = open_checkpoint(folder, allow_links=allow_links)
    if output.remap is None:
        raise RemapError(
            f"{folder}: config.json has no moe_prune block; this is not an output of "
            "vllm-moe-prune."
        )
    plan = load_plan(folder / "plan.json")
    record = read_provenance(folder / "provenance.json")
    _check(plan, record, folder)
    stats = _statistics(folder, stats_files, plan)
    measured = [
        [one.layers[layer.layer] for one in stats if layer.layer in one.layers]
        for layer in plan.layers
    ]
    # Only of layers whose weights the cut zeroed or quantized.
    powers = {entry.layer: entry for entry in record.weight_powers}
    sums = [
        _power_sums(layer, found, powers.get(layer.layer))
        for layer, found in zip(plan.layers, measured, strict=True)
    ]
    counts = record.sparsity_achieved
    curves = _curves(stats, plan)
    refits = {one.layer: one for one in record.refit}
    layers = tuple(
        dataclasses.replace(
            _layer(layer, count, found, plan, total),
            sensitivity_P2=curves.get(layer.layer),
            refit=refits.get(layer.layer),
            coverage=_coverage(layer, stats),
        )
        for layer, count, found, total in zip(
            plan.layers, counts.layers, measured, sums, strict=True
        )
    )
    numbers = Numbers(
        plan=plan,
        name=plan.model.source,
        tool_version=record.tool_version,
        bytes_before=record.source_bytes,
        bytes_after=output.stored_bytes,
        parameters_before=counts.parameters_before,
        parameters_after=counts.parameters_after,
        zeros=counts.zeros,
        expert_sparsity=counts.of_experts,
        total_sparsity=counts.of_all_parameters,
        forward_passes=record.forward_passes,
        calibration=record.calibration or plan.measurement.calibration or None,
        earlier_cuts=_depth(record.earlier),
        kurtosis=_pooled(plan, sums),
        layers=layers,
        block_cosine_HH=_first(_blocks(one, len(layers)) for one in stats),
    )
    return dataclasses.replace(numbers, missing=tuple(_missing(numbers)))


def _check(plan: CutPlan, record: Provenance, folder: Path) -> None:
    """Refuse a plan and a provenance that are not of the same cut."""
    found = record.sparsity_achieved.layers
    shapes = [
        LayerFacts(
            num_experts=item.experts_before,
            top_k=1,
            has_moe=item.experts_before > 0,
            parameters=0,
        )
        for item in found
    ]
    where = f"{folder / 'plan.json'} (against provenance.json)"
    check_plan(plan, shapes, plan.model.fingerprint, where)
    for layer, count in zip(plan.layers, found, strict=True):
        if len(layer.keep) != count.experts_after:
            raise PlanError(
                f"{where}: layer {layer.layer} keeps {len(layer.keep)} experts, "
                f"provenance.json says {count.experts_after}. Copy the folder again."
            )


def _statistics(folder: Path, files: Sequence[Path], plan: CutPlan) -> list[Stats]:
    """What the output keeps, then the files, all of them of the plan's source."""
    # The output's own first: what several have measured is taken from the first.
    kept = folder / STATS_FILE
    paths = [*([kept] if kept.is_file() else []), *files]
    found = [load_stats(path) for path in paths]
    for path, stats in zip(paths, found, strict=True):
        if other := difference(stats.fingerprint, plan.model.fingerprint):
            raise PlanError(f"{path}: the statistics are of {other}.")
        for layer, values in stats.layers.items():
            _check_experts(layer, values, plan, path)
    return found


def _check_experts(layer: int, values: LayerStats, plan: CutPlan, where: Path) -> None:
    experts = plan.layers[layer].experts if 0 <= layer < len(plan.layers) else 0
    for item in fields(values):
        array = getattr(values, item.name)
        of_experts = item.name.endswith(("_E", "_EE", "_E5")) and array is not None
        if of_experts and len(array) != experts:
            raise PlanError(
                f"{where}: layer {layer}: {item.name} is of {len(array)} experts, but "
                f"the plan's layer has {experts}."
            )


def _first(values: Iterable[Found | None]) -> Found | None:
    return next((value for value in values if value is not None), None)


def _layer(
    plan: LayerPlan,
    count: LayerCounts,
    found: Sequence[LayerStats],
    whole: CutPlan,
    sums: _Sums,
) -> LayerNumbers:
    # Experts of one layer are of one size: their share is that of their weights.
    removed = 1.0 - len(plan.keep) / plan.experts if plan.experts else 0.0
    distance_EE = _first(_distance(one, whole, plan.layer) for one in found)
    return LayerNumbers(
        layer=plan.layer,
        action=plan.action,
        experts=plan.experts,
        keep=plan.keep,
        clusters=plan.clusters,
        removed=removed,
        # Of two shares rounded apart the difference may be a hair below zero.
        zeroed=max(0.0, count.sparsity - removed),
        unseen=count.unseen_experts,
        kurtosis=Kurtosis(*map(_kurtosis, sums)),
        distance_EE=distance_EE,
        merges=() if distance_EE is None else tuple(merge_sequence(distance_EE)),
        routing_score_E=_first(_mean(one.score_full_sum_E, one) for one in found),
        frequency_E=_first(_mean(one.routed_E, one) for one in found),
        moe_cosine=_scalar(_first(_mean(one.moe_cosine_sum, one) for one in found)),
    )


def _curves(stats: Sequence[Stats], plan: CutPlan) -> dict[int, Array]:
    """Sensitivities that were measured by the plan's own rule."""
    for one in stats:
        if one.sensitivity.get("rule") == rule(plan.recipe):
            return {
                index: layer.sensitivity_P2
                for index, layer in one.layers.items()
                if layer.sensitivity_P2 is not None and len(layer.sensitivity_P2)
            }
    return {}


def _coverage(plan: LayerPlan, stats: Sequence[Stats]) -> dict[str, float]:
    """Of the first statistics that name their sources."""
    named = next((one.sources for one in stats if one.sources), {})
    found = {}
    for source, part in named.items():
        layer = part.layers.get(plan.layer)
        routed_E = None if layer is None else layer.routed_E
        if routed_E is not None and (total := float(routed_E.sum())) > 0:
            found[source] = float(routed_E[list(plan.keep)].sum()) / total
    return found


def _distance(found: LayerStats, plan: CutPlan, layer: int) -> Array | None:
    """What STUN clustered by, with the recipe's weights; None if not measured."""
    try:
        return expert_distance(found, plan.recipe.experts, layer=layer)
    except PlanError:
        return None


def _mean(total: Array | None, found: LayerStats) -> Array | None:
    """A sum over tokens per token."""
    if total is None or found.tokens is None or not float(found.tokens):
        return None
    mean: Array = np.asarray(total / float(found.tokens))
    # Statistics are untrusted, and nothing can be drawn to an infinite scale.
    return mean if bool(np.isfinite(mean).all()) else None


def _scalar(value: Array | None) -> float | None:
    return None if value is None else float(value)


def _blocks(stats: Stats, layers: int) -> Array | None:
    if stats.block_cosine_HH is None or stats.block_tokens is None:
        return None
    mean_HH: Array = stats.block_cosine_HH / max(1.0, float(stats.block_tokens))
    # H is layers + 1: what enters the first block, then what leaves each.
    fits = mean_HH.shape == (layers + 1, layers + 1) and np.isfinite(mean_HH).all()
    return mean_HH if fits else None


def _power_sums(
    plan: LayerPlan, found: Sequence[LayerStats], written: LayerPowers | None
) -> _Sums:
    powers_E5 = _first(one.weight_powers_E5 for one in found)
    before = None if powers_E5 is None else powers_E5.sum(0)
    if written is not None:
        return before, np.array(written.trimmed), np.array(written.slimmed)
    # Means of clusters have weights of their own, which nobody has summed.
    if powers_E5 is None or plan.reconstruct:
        return before, None, None
    left = powers_E5[list(plan.keep)].sum(0)
    return before, left, left


def _kurtosis(total_5: Array | None) -> float | None:
    return None if total_5 is None else kurtosis(total_5.tolist())


def _pooled(plan: CutPlan, sums: Sequence[_Sums]) -> Kurtosis:
    """Over all weights of all layers; None if a layer is missing."""
    of_experts = [
        found for layer, found in zip(plan.layers, sums, strict=True) if layer.experts
    ]
    stages = zip(*of_experts, strict=True)
    return Kurtosis(
        *(
            # Kurtosis does not average; the power sums behind it add.
            None if any(one is None for one in stage) else _kurtosis(sum(stage))
            for stage in stages
        )
    )


def _depth(earlier: dict[str, JsonValue] | None) -> int:
    depth = 0
    # A cut of a cut holds the record of the cut before, and so on.
    while isinstance(earlier, dict):
        depth += 1
        earlier = earlier.get("earlier")  # type: ignore[assignment]
    return depth


def _missing(numbers: Numbers) -> list[str]:
    layers = numbers.moe_layers
    missing = {
        "Similarity of experts (clusters, merge tree)": all(
            layer.distance_EE is None for layer in layers
        ),
        "Routing scores": all(layer.routing_score_E is None for layer in layers),
        "Similarity of MoE sublayers": all(
            layer.moe_cosine is None for layer in layers
        ),
        "Sensitivity of layers": all(layer.sensitivity_P2 is None for layer in layers),
        "Similarity of blocks": numbers.block_cosine_HH is None,
        "Kurtosis of the original's weights": numbers.kurtosis.before is None,
        "Kurtosis after expert pruning": numbers.kurtosis.trimmed is None,
        "Kurtosis after slimming": numbers.kurtosis.slimmed is None,
        "Size of the original in bytes": numbers.bytes_before is None,
    }
    return [name for name, absent in missing.items() if absent]
