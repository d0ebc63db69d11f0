"""From a plan to output tensors: the only place that decides what is cut from what.

Every output tensor is a concatenation, along axis 0, of groups of input pieces; a
group of one is copied byte for byte, a larger one (a reconstructed cluster) is
averaged. Size prediction, writing and load-time pruning all read this one list.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..archs.spec import ROUTER_ROLES, Role, TensorRule
from ..checkpoint.block_fp8 import SUFFIX
from ..checkpoint.dense_parts import dense_parts
from ..checkpoint.index import TensorInfo
from ..checkpoint.open import Checkpoint
from ..checkpoint.quantized_tensors import PartedTensor
from ..decide.cut_plan import CutPlan
from ..decide.quantize import form_of
from .layer_cut import LayerCut, layer_cuts
from .matrices import (
    quantized_dense,
    quantized_head,
    read_by_experts,
    slimmed_dense,
    slimmed_roles,
    updates,
)
from .validate_plan import check_possible


@dataclass(frozen=True)
class Piece:
    """A whole input tensor (``row`` None) or one slice along its axis 0."""

    source: str
    row: int | None = None
    weight: float | None = None
    """Its weight in the mean of its group; None in a plain mean."""


@dataclass(frozen=True)
class StoredPart:
    """A tensor of the output as it is stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]


Group = tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """One tensor of the output checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    groups: tuple[Group, ...]
    layer: int | None = None
    """Input layer the tensor belongs to."""
    role: Role | None = None
    sparsity: float = 0.0
    """Zeros to write into it; above 0 only for matrices that are slimmed."""
    made: Literal["copied", "quantized", "scaled"] = "copied"
    """Whether it is written from its pieces, or by quantizing: as a part of a quantized
    matrix, or (by AWQ) multiplied by powers of two."""
    channels: int | None = None
    """The axis of its matrix along which some channels are taken; None: it is whole."""
    expert: int | None = None
    """Whose it is in the output; None where it is of none, or of all."""
    updated: bool = False
    """Whether slimming changes the weights that stay, too."""
    refitted: bool = False
    """Whether it may hold down projections that were refitted."""
    stands_for: int | None = None
    """Parameters it holds; None: as many as elements. Of the parts of a quantized
    matrix the first holds them all."""

    @property
    def is_expert(self) -> bool:
        """Whether it holds weights of routed experts."""
        return self.role is not None and self.role not in ROUTER_ROLES

    @property
    def of_experts(self) -> bool:
        """The same, their scales included."""
        return self.is_expert or self.expert is not None

    @property
    def parameters(self) -> int:
        """How many parameters of the model it holds."""
        return math.prod(self.shape) if self.stands_for is None else self.stands_for


def output_tensors(checkpoint: Checkpoint, plan: CutPlan) -> list[OutputTensor]:
    """Every tensor of the output, in the order it is written (layer by layer).

    Raises:
        PlanError: Nothing would be left to route, or rows no longer match experts.
    """
    check_possible(checkpoint, plan)
    before, after, layers = _split_names(checkpoint)
    tensors = [
        tensor for name in before for tensor in _copies(checkpoint.tensors[name], name)
    ]
    for cut in layer_cuts(checkpoint, plan):
        if not cut.drops_block:
            tensors += _layer_tensors(cut, layers[cut.index])
    head = quantized_head(checkpoint, plan)
    for name in after:
        info = checkpoint.tensors[name]
        quantized = name == head
        tensors += _parts(_copy(info, name), plan) if quantized else _copies(info, name)
    return tensors


def names_in_order(checkpoint: Checkpoint) -> list[str]:
    """Every tensor of a checkpoint in the order in which a cut writes its output."""
    before, after, layers = _split_names(checkpoint)
    names = list(before)
    for layer in checkpoint.layers:
        # As _layer_tensors orders them: routers, then expert by expert.
        routed: list[str] = []
        if layer.has_moe:
            rules = checkpoint.layout.experts
            parts = checkpoint.layout.router_parts
            routed = [rule.name(layer.index) for rule in parts]
            for expert in range(layer.num_experts):
                each = [r.name(layer.index, expert) for r in rules if r.per_expert]
                for name in each:
                    scale = name + SUFFIX
                    routed += [name, scale] if checkpoint.is_scale(scale) else [name]
            routed += [rule.name(layer.index) for rule in rules if not rule.per_expert]
        known = set(routed)
        names += [name for name in layers[layer.index] if name not in known] + routed
    return names + after


def _split_names(
    checkpoint: Checkpoint,
) -> tuple[list[str], list[str], dict[int, list[str]]]:
    layers = {
        layer.index: sorted(checkpoint.layer_names(layer.index))
        for layer in checkpoint.layers
    }
    rest = sorted(checkpoint.layer_names(None))
    before = [name for name in rest if name == checkpoint.arch.embedding]
    # The embedding before all layers; final norm and head after them.
    return before, [name for name in rest if name not in before], layers


def _copy(info: TensorInfo, name: str, layer: int | None = None) -> OutputTensor:
    return OutputTensor(
        name=name,
        dtype=info.dtype,
        shape=info.shape,
        groups=((Piece(info.name),),),
        layer=layer,
    )


def _copies(
    info: TensorInfo, name: str, layer: int | None = None, role: Role | None = None
) -> Iterator[OutputTensor]:
    """A tensor under a name; a quantized one as its parts."""
    if not isinstance(info, PartedTensor):
        yield replace(_copy(info, name, layer), role=role)
        return
    base, left = name.rpartition(".")[0], info.numel
    for part, stored in info.parts.items():
        copied = _copy(stored, f"{base}.{part}", layer)
        yield replace(copied, role=role, stands_for=left)
        left = 0


def _layer_tensors(cut: LayerCut, names: list[str]) -> Iterator[OutputTensor]:
    checkpoint, layer, layer_plan = cut.checkpoint, cut.layer, cut.layer_plan
    arch, layout = checkpoint.arch, checkpoint.layout
    routed = {rule.name(layer.index) for rule in layout.router_parts}
    routed |= {*checkpoint.expert_names(layer)}
    routed |= {name + SUFFIX for name in routed if checkpoint.is_scale(name + SUFFIX)}
    routed |= {
        # Tensors no table knows, but which every expert has; they go with it.
        cut.old_prefix + extra.name(expert)
        for extra in checkpoint.extras(layer)
        for expert in range(layer.num_experts)
    }
    dropped = layer_plan.drops_moe
    dense, quantized = slimmed_dense(cut), quantized_dense(cut)
    downs = {part.mlp.names[2] for part in dense_parts(checkpoint, layer)}
    scales = cut.plan.quantize.method == "awq" and layer.has_moe and not dropped
    scaled = read_by_experts(checkpoint, layer) if scales else frozenset()
    for name in names:
        # Those follow below, in the order of the survivors.
        if layer.has_moe and name in routed:
            continue
        stays = layer_plan.action == "drop-moe-keep-norm" and arch.is_moe_norm(
            name, layer.index
        )
        if dropped and arch.is_moe_member(name, layer.index) and not stays:
            continue
        inner = name.removeprefix(cut.old_prefix)
        info = checkpoint.tensors[name]
        if inner in quantized:
            copied = _copy(info, cut.new_prefix + inner, layer.index)
            yield from _parts(copied, cut.plan)
            continue
        for copied in _copies(info, cut.new_prefix + inner, layer.index):
            if inner in scaled:
                yield replace(copied, made="scaled")
            else:
                share = dense.get(inner, 0.0)
                updated = share > 0 and updates(cut.plan, down=inner in downs)
                yield replace(copied, sparsity=share, updated=updated)
    if layer.has_moe and not dropped:
        for rule in layout.router_parts:
            router = _router(cut, rule)
            made = scales and rule.role == "router"
            yield replace(router, made="scaled" if made else "copied")
        yield from _experts(cut)


def _router(cut: LayerCut, rule: TensorRule) -> OutputTensor:
    info = cut.checkpoint.tensors[rule.name(cut.index)]
    name = rule.name(cut.new_index)
    if cut.keeps_router:
        return replace(_copy(info, name, cut.index), role=rule.role)
    groups = tuple(
        tuple(Piece(info.name, old, weight) for old, weight in members)
        for members in cut.survivors
    )
    # Rows and biases follow their experts, averaged where those are.
    shape = (len(groups), *info.shape[1:])
    return OutputTensor(
        name=name,
        dtype=info.dtype,
        shape=shape,
        groups=groups,
        layer=cut.index,
        role=rule.role,
    )


def _experts(cut: LayerCut) -> Iterator[OutputTensor]:
    checkpoint, plan = cut.checkpoint, cut.plan
    index, new_index = cut.index, cut.new_index
    sparsity = cut.layer_plan.sparsity if cut.writes_zeros else 0.0
    slimmed = slimmed_roles(cut)
    rules = checkpoint.layout.experts

    def build(
        rule: TensorRule, new: int | None, groups: tuple[Group, ...], one: TensorInfo
    ) -> OutputTensor:
        each = one.shape if rule.per_expert else one.shape[1:]
        channels = None
        if (width := cut.layer_plan.width) is not None:
            channels = 1 if rule.role == "down" else 0
            # Gate rows, then up rows, where both are one matrix.
            wide = 2 * width if rule.role == "gate_up" else width
            each = (each[0], wide) if channels else (wide, each[1])
        shape = each if rule.per_expert else (len(groups), *each)
        name = rule.name(new_index, new)
        share = sparsity if rule.role in slimmed else 0.0
        return OutputTensor(
            name=name,
            dtype=one.dtype,
            shape=shape,
            groups=groups,
            layer=index,
            role=rule.role,
            sparsity=share,
            channels=channels,
            expert=new,
            updated=share > 0 and updates(plan, down=rule.role == "down"),
            refitted=cut.layer_plan.refit and rule.role == "down",
        )

    for new, members in enumerate(cut.survivors):
        for rule in rules:
            if rule.per_expert:
                pieces = tuple(
                    Piece(rule.name(index, old), None, weight)
                    for old, weight in members
                )
                first = checkpoint.tensors[pieces[0].source]
                if plan.is_quantized:
                    yield from _parts(build(rule, new, (pieces,), first), plan)
                # Quantized already: parts are copied; validate_plan.py refuses means.
                elif isinstance(first, PartedTensor):
                    name = rule.name(new_index, new)
                    yield from _copies(first, name, index, rule.role)
                else:
                    yield build(rule, new, (pieces,), first)
                # FP8 scales stay the input's, also where weights are zeroed.
                scale = first.name + SUFFIX
                if checkpoint.is_scale(scale):
                    name = rule.name(new_index, new) + SUFFIX
                    scales = _scales(cut, rule, checkpoint.tensors[scale], name)
                    yield replace(scales, expert=new)
        for extra in checkpoint.extras(cut.layer):
            # One member: validate_plan.py refuses to average such experts.
            old = cut.old_prefix + extra.name(members[0][0])
            name = cut.new_prefix + extra.name(new)
            yield from _copies(checkpoint.tensors[old], name, index)
    for rule in rules:
        # All experts in one tensor [E, ...]: survivors are rows of it.
        if not rule.per_expert:
            name = rule.name(index)
            groups = tuple(
                tuple(Piece(name, old, weight) for old, weight in members)
                for members in cut.survivors
            )
            yield build(rule, None, groups, checkpoint.tensors[name])


def _scales(
    cut: LayerCut, rule: TensorRule, info: TensorInfo, name: str
) -> OutputTensor:
    """The scales of an FP8 matrix; channels leave in whole blocks, with theirs."""
    copied = _copy(info, name, cut.index)
    blocks, width = cut.checkpoint.blocks, cut.layer_plan.width
    if width is None or blocks is None:
        return copied
    hidden = cut.checkpoint.config[cut.checkpoint.arch.config.hidden]
    down = rule.role == "down"
    shape = (hidden, width) if down else (width, hidden)
    return replace(copied, shape=blocks.scale_shape(shape), channels=int(down))


def _parts(matrix: OutputTensor, plan: CutPlan) -> Iterator[OutputTensor]:
    """What a matrix is stored in once it is quantized."""
    rows, cols = matrix.shape
    base, left = matrix.name.rpartition(".")[0], rows * cols
    found = form_of(plan.quantize).parts(rows, cols, matrix.dtype)
    for part, (dtype, shape) in found.items():
        yield replace(
            matrix,
            name=f"{base}.{part}",
            dtype=dtype,
            shape=shape,
            sparsity=0.0,
            # Of the matrix, not of its parts.
            channels=None,
            made="quantized",
            stands_for=left,
        )
        left = 0
