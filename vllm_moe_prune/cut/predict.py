"""What a plan will produce, to the byte, from headers alone."""

import math
from collections.abc import Iterable, Sequence

from ..checkpoint.compressed import DENSE, DTYPES
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.writer import (
    MAX_SHARD_BYTES,
    TensorSpec,
    plan_shards,
    tensor_bytes,
)
from ..decide.cut_plan import CutPlan, ModelId, Predicted
from ..decide.facts import LayerFacts, ModelFacts, count_plan
from ..recipes.schema import parse_pattern
from ..slim.quota import zeros_in_matrix
from .matrices import channel_block, dense_matrices, expert_names, head_matrix
from .slice import OutputTensor, StoredPart, output_tensors
from .spell import planned_parts
from .validate_plan import fixed_form


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    """The checkpoint as plain numbers, which is all that ``decide`` sees of it."""
    return facts_of(checkpoint, checkpoint.fingerprint)


def facts_of(checkpoint: Checkpoint, fingerprint: str) -> ModelFacts:
    """The same under a fingerprint that is known: routers are not read for it."""
    return ModelFacts(
        model=ModelId(
            model_type=checkpoint.arch.model_type,
            fingerprint=fingerprint,
            source=checkpoint.origin.name,
            revision=checkpoint.origin.revision,
        ),
        layers=tuple(_layer_facts(checkpoint, layer) for layer in checkpoint.layers),
        all_parameters=checkpoint.parameters,
        fixed=fixed_form(checkpoint),
        head=head_matrix(checkpoint),
    )


def _layer_facts(checkpoint: Checkpoint, layer: Layer) -> LayerFacts:
    arch, tensors = checkpoint.arch, checkpoint.tensors
    names = checkpoint.layer_names(layer.index)
    names = [name for name in names if not checkpoint.is_scale(name)]
    parameters = sum(tensors[name].numel for name in names)
    others = dense_matrices(checkpoint, layer)
    if not layer.has_moe:
        return LayerFacts(
            num_experts=0,
            top_k=layer.top_k,
            has_moe=False,
            parameters=parameters,
            others=others,
            mtp=layer.mtp,
        )
    moe = [name for name in names if arch.is_moe_member(name, layer.index)]
    hidden = checkpoint.config[arch.config.hidden]
    return LayerFacts(
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        has_moe=True,
        parameters=parameters,
        moe_parameters=sum(tensors[name].numel for name in moe),
        moe_norm_parameters=sum(
            tensors[name].numel for name in moe if arch.is_moe_norm(name, layer.index)
        ),
        # [out, in] as nn.Linear stores them: gate, up, down.
        expert_shapes=(
            (layer.width, hidden),
            (layer.width, hidden),
            (hidden, layer.width),
        ),
        channel_block=channel_block(checkpoint, layer),
        shared_width=0 if checkpoint.arch.shared_width else layer.shared_width,
        router_parameters_per_expert=sum(
            # A router row is D long; of a router bias an expert has one value.
            hidden if rule.axes == "E D" else 1
            for rule in checkpoint.layout.router_parts
        ),
        expert_names=expert_names(checkpoint, layer),
        others=others,
        groups=layer.groups,
        group_floor=layer.group_floor,
        mtp=layer.mtp,
    )


def with_prediction(
    checkpoint: Checkpoint,
    plan: CutPlan,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    facts: ModelFacts | None = None,
) -> CutPlan:
    """The plan with its ``predicted`` block filled in.

    Args:
        checkpoint: The input.
        plan: What will be done to it.
        max_shard_bytes: Size limit of one output file.
        facts: Of the checkpoint, if the caller has them already.
    """
    shards = plan_shards(stored_tensors(checkpoint, plan), max_shard_bytes)
    count = count_plan(facts or model_facts(checkpoint), plan)
    predicted = Predicted(
        tensor_bytes=sum(sum(shard.sizes.values()) for shard in shards),
        file_bytes=sum(shard.file_bytes for shard in shards),
        shards=len(shards),
        expert_parameters=count.expert_parameters - count.expert_parameters_removed,
        parameters=count.all_parameters - count.all_parameters_removed,
        zeros=count.zeros,
        expert_sparsity=count.expert_sparsity,
        total_sparsity=count.total_sparsity,
    )
    return plan.model_copy(update={"predicted": predicted})


def stored_tensors(checkpoint: Checkpoint, plan: CutPlan) -> list[TensorSpec]:
    """Every tensor of the output as ``storage`` of the plan's recipe stores it.

    Values of a bitmask are counted by the zeros that the plan writes.
    """
    tensors = output_tensors(checkpoint, plan)
    if plan.spelling == "stock-vllm":
        return planned_parts(checkpoint, plan, tensors)
    smaller = bitmasks(checkpoint, plan, tensors)
    found: list[TensorSpec] = []
    for tensor in tensors:
        found += smaller.get(tensor.name) or [tensor]
    return found


def bitmasks(
    checkpoint: Checkpoint, plan: CutPlan, tensors: Sequence[OutputTensor]
) -> dict[str, list[StoredPart]]:
    """The parts of every tensor that is stored as a bitmask, by its name."""
    smaller: dict[str, list[StoredPart]] = {}
    if plan.recipe.storage == "dense":
        return smaller
    experts: dict[int, list[OutputTensor]] = {}
    for one in tensors:
        scale = checkpoint.is_scale(one.groups[0][0].source)
        if one.layer is not None and one.is_expert and not scale:
            experts.setdefault(one.layer, []).append(one)
    for layer in experts.values():
        parts = {one.name: _packed(plan, one) for one in layer}
        stored = _bytes(part for found in parts.values() for part in found)
        # As convert does: a layer is stored so whole, and only where it saves bytes.
        if all(parts.values()) and stored < _bytes(layer):
            smaller |= parts
    return smaller


def _packed(plan: CutPlan, tensor: OutputTensor) -> list[StoredPart]:
    """The parts of one tensor as a bitmask; none if it has to stay dense."""
    pattern, slim = parse_pattern(plan.pattern), plan.slim
    zeros = 0
    if slim != "none" and tensor.sparsity:
        *axes, rows, cols = tensor.shape
        each = zeros_in_matrix(slim, rows, cols, tensor.sparsity)
        zeros = math.prod(axes) * each
    fixed = pattern if tensor.sparsity else None
    return bitmask_parts(tensor, math.prod(tensor.shape) - zeros, fixed)


def bitmask_parts(
    matrix: TensorSpec, kept: int, group: tuple[int, int] | None
) -> list[StoredPart]:
    """The parts that an expert's matrix, or those of all, are stored in as a bitmask.

    Args:
        matrix: In its dense form.
        kept: Values that are not zero.
        group: (n, m) where all groups of m hold at most n of them; None: they vary.

    Returns:
        Values, offsets of rows unless groups are alike, and mask; nothing if the matrix
        has to stay dense.
    """
    shape = matrix.shape
    # A byte of the bitmap covers 8 columns of one row.
    if len(shape) < 2 or shape[-1] % 8 or matrix.dtype not in DTYPES:
        return []
    *axes, cols = shape
    rows, base = math.prod(axes), matrix.name.removesuffix(DENSE)
    mask = StoredPart(f"{base}.mask", "U8", (*axes, cols // 8))
    if group is not None:
        n, m = group
        values = StoredPart(f"{base}.values", matrix.dtype, (rows, cols // m, n))
        return [values, mask]
    return [
        StoredPart(f"{base}.values", matrix.dtype, (kept,)),
        StoredPart(f"{base}.offsets", "I64", (rows + 1,)),
        mask,
    ]


def _bytes(tensors: Iterable[TensorSpec]) -> int:
    return sum(tensor_bytes(tensor) for tensor in tensors)
