"""The matrices of a layer that can be slimmed besides its experts, by name and part."""

from ..archs.spec import ATTENTION
from ..calibrate.dense import dense_parts
from ..checkpoint.open import Checkpoint, Layer
from ..decide.cut_plan import CutPlan, LayerPlan
from ..decide.facts import Matrix, Slimming
from ..recipes.schema import Part


def slimming_of(plan: CutPlan) -> Slimming:
    """What a plan slims."""
    return Slimming(plan.slim, plan.group, plan.slim_parts, plan.slim_exclude)


def dense_matrices(checkpoint: Checkpoint, layer: Layer) -> tuple[Matrix, ...]:
    """Every matrix of attention, shared experts and other MLPs."""
    prefix = checkpoint.arch.layer_prefix.format(layer=layer.index)
    parts: dict[str, Part] = {}
    for name in sorted(checkpoint.layer_names(layer.index)):
        inner = name.removeprefix(prefix)
        matrix = len(checkpoint.tensors[name].shape) == 2
        if matrix and inner.startswith(ATTENTION) and not checkpoint.is_scale(name):
            parts[inner] = "attention"
    for part in dense_parts(checkpoint, layer):
        which: Part = "shared" if part.norm is None else "mlp"
        parts |= dict.fromkeys(part.mlp.names, which)
    return tuple(
        Matrix(name, part, *checkpoint.tensors[prefix + name].shape)
        for name, part in parts.items()
    )


def expert_names(checkpoint: Checkpoint, layer: Layer) -> tuple[str, str, str]:
    """Gate, up and down below the layer's prefix, ``{expert}`` left as it is."""
    prefix = checkpoint.arch.layer_prefix.format(layer=layer.index)
    layout = checkpoint.layout
    names = {}
    for rule in layout.experts:
        name = rule.template.replace("{layer}", str(layer.index))
        names[rule.role] = name.removeprefix(prefix)
    both = names.get("gate_up", "")
    return names.get("gate", both), names.get("up", both), names["down"]


def slimmed_dense(
    checkpoint: Checkpoint, layer: Layer, layer_plan: LayerPlan, plan: CutPlan
) -> dict[str, float]:
    """The sparsity of each dense matrix in scope, by its name below the prefix."""
    slimming = slimming_of(plan)
    if plan.slim == "none" or layer_plan.sparsity == 0:
        return {}
    matrices = dense_matrices(checkpoint, layer)
    return {one.name: layer_plan.sparsity for one in matrices if slimming.takes(one)}


def slimmed_roles(checkpoint: Checkpoint, layer: Layer, plan: CutPlan) -> set[str]:
    """The roles of the experts' tensors that a plan slims."""
    gate, up, down = taken(checkpoint, layer, plan)
    found = {"gate": gate, "up": up, "down": down, "gate_up": gate}
    return {role for role, take in found.items() if take}


def taken(checkpoint: Checkpoint, layer: Layer, plan: CutPlan) -> tuple[bool, ...]:
    """Which of an expert's three matrices a plan slims."""
    slimming = slimming_of(plan)
    names = expert_names(checkpoint, layer)
    return tuple(slimming.takes(Matrix(name, "experts", 0, 0)) for name in names)


def read_by_experts(checkpoint: Checkpoint, layer: Layer) -> frozenset[str]:
    """What makes or reads the experts' input besides routers and experts themselves.

    The norm before them, and gate and up of shared experts; names below the layer.
    """
    prefix = checkpoint.arch.layer_prefix.format(layer=layer.index)
    norms = {
        name.removeprefix(prefix)
        for name in checkpoint.layer_names(layer.index)
        if checkpoint.arch.is_moe_norm(name, layer.index)
    }
    shared = {
        name
        for part in dense_parts(checkpoint, layer)
        if part.norm is None
        for name in part.mlp.names[:2]
    }
    return frozenset(norms | shared)
