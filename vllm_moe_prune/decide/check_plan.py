"""Whether a plan, perhaps edited by hand, fits the checkpoint it is about to cut."""

import math
from collections import Counter
from collections.abc import Sequence

from ..checkpoint.fingerprint import difference
from ..errors import PlanError
from ..recipes.numbers import repeated
from .cut_plan import CutPlan, LayerPlan, LayerShape

# Weights written as decimals, 0.3333333, need not add up to 1 exactly.
WEIGHT_SLACK = 1e-6


def check_plan(
    plan: CutPlan, layers: Sequence[LayerShape], fingerprint: str, where: str
) -> None:
    """Refuse a plan that does not fit the checkpoint it is about to cut.

    Args:
        plan: The plan, perhaps edited by hand.
        layers: The checkpoint's decoder layers.
        fingerprint: The checkpoint's fingerprint.
        where: Named in the error, usually the plan's path.

    Raises:
        PlanError: Naming the first layer and expert that does not fit.
    """
    if other := difference(plan.model.fingerprint, fingerprint):
        raise PlanError(
            f"{where}: made of {plan.model.source} for {other}. "
            "Run measure and plan on this checkpoint."
        )
    if [layer.layer for layer in plan.layers] != list(range(len(layers))):
        raise PlanError(
            f"{where}: lists layers {[layer.layer for layer in plan.layers]}, but the "
            f"checkpoint has layers 0 to {len(layers) - 1}, each to be listed once."
        )
    if all(
        # An MTP layer is no model by itself: it reads what the last block gives.
        layer.action == "drop-block" or shape.mtp
        for layer, shape in zip(plan.layers, layers, strict=True)
    ):
        raise PlanError(f"{where}: drops every block; keep at least one.")
    for layer_plan, shape in zip(plan.layers, layers, strict=True):
        _check_layer(layer_plan, shape, plan.routing, where)


def _check_layer(layer: LayerPlan, shape: LayerShape, routing: str, where: str) -> None:
    at = f"{where}: layer {layer.layer}"
    experts = shape.num_experts if shape.has_moe else 0
    if layer.experts != experts:
        raise PlanError(
            f"{at}: says {layer.experts} experts, but the checkpoint has {experts}."
        )
    if layer.action != "keep" or not shape.has_moe:
        if layer.keep:
            raise PlanError(f"{at}: {layer.action} but keeps experts {layer.keep}.")
        if layer.narrows:
            raise PlanError(f"{at}: width {layer.width}, but there are no experts.")
        if layer.refit:
            raise PlanError(f"{at}: refit, but the layer keeps no experts.")
        return
    if not layer.keep:
        raise PlanError(
            f"{at}: keeps no expert. Keep at least one, or set its action to drop-moe."
        )
    _check_ids(layer.keep, experts, f"{at}: keep")
    before = shape.width
    if layer.width is not None and before is not None and layer.width >= before:
        raise PlanError(
            f"{at}: width {layer.width}, but its experts have {before} channels. "
            "Name fewer, or none."
        )
    # A redirecting router keeps all its rows, and its groups with them.
    if routing == "drop" and shape.groups is not None:
        _check_groups(layer, shape.groups, shape.group_floor, at)
    if layer.clusters is None and (routing == "redirect" or layer.reconstruct):
        raise PlanError(f"{at}: redirect and reconstruct need clusters.")
    if layer.unserved and routing != "redirect":
        raise PlanError(f"{at}: has unserved experts; they need routing: redirect.")
    if layer.clusters is not None:
        _check_clusters(layer, layer.clusters, at)
    if layer.merge_weights is not None:
        _check_weights(layer, layer.merge_weights, at)


def _check_groups(
    layer: LayerPlan, groups: tuple[int, ...], floor: int, at: str
) -> None:
    """Every group must keep what grouped routing needs to mean what it did."""
    kept = Counter(groups[expert] for expert in layer.keep)
    for group in sorted(set(groups)):
        least = min(floor, groups.count(group))
        if kept[group] < least:
            raise PlanError(
                f"{at}: keeps {kept[group]} experts of group {group}, but routing "
                f"needs at least {least} in each group."
            )


def _check_clusters(
    layer: LayerPlan, clusters: tuple[tuple[int, ...], ...], at: str
) -> None:
    if len(clusters) != len(layer.keep):
        raise PlanError(
            f"{at}: {len(clusters)} clusters for {len(layer.keep)} kept experts."
        )
    members = tuple(expert for cluster in clusters for expert in cluster)
    # Every expert of the input exactly once: kept, merged or unserved.
    members += layer.unserved
    _check_ids(members, layer.experts, f"{at}: clusters")
    if len(members) != layer.experts:
        missing = sorted(set(range(layer.experts)) - set(members))
        raise PlanError(f"{at}: clusters leave out experts {missing}.")
    for kept, cluster in zip(layer.keep, clusters, strict=True):
        if kept not in cluster:
            raise PlanError(f"{at}: expert {kept} is not in its cluster {cluster}.")


def _check_weights(
    layer: LayerPlan, weights: tuple[tuple[float, ...], ...], at: str
) -> None:
    if not layer.reconstruct or layer.clusters is None:
        raise PlanError(f"{at}: has merge_weights but does not reconstruct.")
    if [len(found) for found in weights] != [len(ids) for ids in layer.clusters]:
        raise PlanError(f"{at}: merge_weights need one weight for each cluster member.")
    for kept, found in zip(layer.keep, weights, strict=True):
        if abs(math.fsum(found) - 1.0) > WEIGHT_SLACK:
            raise PlanError(
                f"{at}: merge_weights of the cluster of expert {kept} add up to "
                f"{math.fsum(found):.6g}, not to 1."
            )


def _check_ids(ids: tuple[int, ...], experts: int, at: str) -> None:
    unknown = sorted({expert for expert in ids if expert >= experts})
    if unknown:
        raise PlanError(
            f"{at}: unknown experts {unknown}; the layer has 0 to {experts - 1}."
        )
    if twice := repeated(ids):
        raise PlanError(f"{at}: experts {twice} appear more than once.")
