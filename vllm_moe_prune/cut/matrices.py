"""The matrices of a layer that can be slimmed besides its experts, by name and part."""

import math

from ..archs.spec import ATTENTION
from ..checkpoint.block_fp8 import DTYPE as FP8
from ..checkpoint.dense_parts import dense_parts
from ..checkpoint.open import Checkpoint, Layer
from ..decide.cut_plan import CutPlan
from ..decide.facts import Matrix, Slimming
from ..recipes.schema import Part
from .layer_cut import LayerCut


def slimming_of(plan: CutPlan) -> Slimming:
    """What a plan slims."""
    return Slimming(plan.slim, plan.group, plan.slim_parts, plan.slim_exclude)


def updates(plan: CutPlan, *, down: bool) -> bool:
    """Whether slimming a matrix changes the weights that stay; ``down``: of an MLP."""
    return plan.slim == "sparsegpt" or (plan.compensate and down)


def dense_matrices(checkpoint: Checkpoint, layer: Layer) -> tuple[Matrix, ...]:
    """Every matrix of attention, shared experts and other MLPs."""
    prefix = checkpoint.arch.layer_prefix.format(layer=layer.index)
    parts: dict[str, Part] = {}
    for name in sorted(checkpoint.layer_names(layer.index)):
        inner = name.removeprefix(prefix)
        matrix = len(checkpoint.tensors[name].shape) == 2
        # Scales of FP8 blocks have two axes too.
        if matrix and inner.startswith(ATTENTION) and not checkpoint.is_scale(name):
            parts[inner] = "attention"
    for part in dense_parts(checkpoint, layer):
        which: Part = "shared" if part.norm is None else "mlp"
        parts |= dict.fromkeys(part.mlp.names, which)
    return tuple(
        Matrix(name, part, *checkpoint.tensors[prefix + name].shape)
        for name, part in parts.items()
    )


def channel_block(checkpoint: Checkpoint, layer: Layer) -> int:
    """Channels that can only leave together, since their weights share FP8 scales."""
    blocks = checkpoint.blocks
    if blocks is None:
        return 1
    fp8 = any(
        checkpoint.tensors[name].dtype == FP8 for name in checkpoint.expert_names(layer)
    )
    # Rows of gate and up, columns of down.
    return math.lcm(blocks.rows, blocks.cols) if fp8 else 1


def expert_names(checkpoint: Checkpoint, layer: Layer) -> tuple[str, str, str]:
    """Gate, up and down below the layer's prefix, ``{expert}`` left as it is."""
    prefix = checkpoint.arch.layer_prefix.format(layer=layer.index)
    layout = checkpoint.layout
    names = {}
    for rule in layout.experts:
        name = rule.template.replace("{layer}", str(layer.index))
        names[rule.role] = name.removeprefix(prefix)
    # Packed layouts have gate and up in one tensor, under one name.
    both = names.get("gate_up", "")
    return names.get("gate", both), names.get("up", both), names["down"]


def slimmed_dense(cut: LayerCut) -> dict[str, float]:
    """The sparsity of each dense matrix in scope, by its name below the prefix."""
    if not cut.writes_zeros:
        return {}
    slimming, sparsity = slimming_of(cut.plan), cut.layer_plan.sparsity
    matrices = dense_matrices(cut.checkpoint, cut.layer)
    return {one.name: sparsity for one in matrices if slimming.takes(one)}


def gone_with_moe(cut: LayerCut) -> frozenset[str]:
    """Dense matrices that leave with a dropped MoE: shared experts.

    The forward does not come to them, but without a forward they would be changed.
    """
    shared = cut.checkpoint.arch.shared if cut.layer_plan.drops_moe else None
    return frozenset(shared.names if shared else ())


def quantized_dense(cut: LayerCut) -> frozenset[str]:
    """The dense matrices that a plan quantizes, by their names below the prefix."""
    if not cut.plan.is_quantized:
        return frozenset()
    scope = cut.plan.quantize.scope
    matrices = dense_matrices(cut.checkpoint, cut.layer)
    return frozenset(one.name for one in matrices if one.part in scope)


def head_matrix(checkpoint: Checkpoint) -> Matrix | None:
    """The output head; None where the embedding is it, too."""
    info = checkpoint.tensors.get(checkpoint.arch.head)
    # Some files hold it although config.json says that nothing reads it.
    if info is None or checkpoint.config.get("tie_word_embeddings"):
        return None
    return Matrix(info.name, "head", *info.shape)


def quantized_head(checkpoint: Checkpoint, plan: CutPlan) -> str | None:
    """The name of the output head if a plan quantizes it."""
    head = head_matrix(checkpoint)
    asked = plan.is_quantized and "head" in plan.quantize.scope
    return head.name if asked and head is not None else None


def slimmed_roles(cut: LayerCut) -> set[str]:
    """The roles of the experts' tensors that a plan slims."""
    gate, up, down = taken(cut)
    # gate_up is one name for both, so a plan takes both or neither.
    found = {"gate": gate, "up": up, "down": down, "gate_up": gate}
    return {role for role, take in found.items() if take}


def taken(cut: LayerCut) -> tuple[bool, ...]:
    """Which of an expert's three matrices a plan slims."""
    slimming = slimming_of(cut.plan)
    names = expert_names(cut.checkpoint, cut.layer)
    return tuple(slimming.takes(Matrix(name, "experts", 0, 0)) for name in names)


def read_by_experts(checkpoint: Checkpoint, layer: Layer) -> frozenset[str]:
    """What makes or reads the experts' input besides routers and experts themselves.

    The norm before them, gate and up of shared experts, and what weighs these; names
    below the layer.
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
        # Gate and up; down reads the inner activations instead.
        for name in (*part.mlp.names[:2], part.mlp.weigher)
        if name is not None
    }
    return frozenset(norms | shared)
