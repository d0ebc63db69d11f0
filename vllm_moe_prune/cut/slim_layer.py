"""Slimming one trimmed layer, expert by expert, and feeding the next layer with it.

Statistics come from the trimmed, still dense layer (as Wanda defines them); the
hidden states that go on come from the slimmed one, so that later layers are
calibrated on what the pruned model will really compute (spec, defect 3).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..calibrate.experts import (
    Routing,
    add_expert,
    expert_tokens,
    place,
    route,
)
from ..calibrate.forward import StreamingModel
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import Expert
from ..checkpoint.writer import ShardWriter
from ..decide.plan import CutPlan, LayerPlan
from ..errors import CalibrationError, CheckpointError
from .copy import tensor_view
from .slim_expert import slim_by_data, slim_by_magnitude
from .trimmed import survivor, trimmed_layer, trimmed_router


@dataclass
class LayerRecord:
    """What slimming did to one layer; one journal line."""

    layer: int
    expert_parameters: int = 0
    zeros: int = 0
    """Zeros among the layer's surviving expert weights, those there before included."""
    unseen: list[int] = field(default_factory=list)
    """Input ids of experts no calibration token reached: pruned by magnitude."""


@dataclass(frozen=True)
class SlimContext:
    """What stays the same for every layer of a slimming pass."""

    checkpoint: Checkpoint
    plan: CutPlan
    writer: ShardWriter
    model: StreamingModel | None
    """None for methods that need no activations."""


def slim_layer(
    context: SlimContext,
    layer: Layer,
    layer_plan: LayerPlan,
    new_index: int,
    x_ND: torch.Tensor | None,
    *,
    want_output: bool,
) -> tuple[LayerRecord, torch.Tensor | None]:
    """Slim and write every expert of one layer.

    Args:
        context: The pass.
        layer: The input layer.
        layer_plan: What the plan does to it.
        new_index: Its index in the output.
        x_ND: Calibration activations entering the MoE; None if not needed.
        want_output: Whether the slimmed layer's output is needed (not after the last).

    Returns:
        The record, and the MoE output [N, D] of the slimmed layer if wanted.
    """
    checkpoint, plan = context.checkpoint, context.plan
    record = LayerRecord(layer.index)
    trimmed = trimmed_layer(layer, layer_plan, plan)
    wants = want_output and x_ND is not None
    out_ND = torch.zeros_like(x_ND) if wants and x_ND is not None else None
    routing = None
    if x_ND is not None and context.model is not None:
        routing = trimmed_routing(context.model, plan, layer, layer_plan, x_ND)
    for new in range(trimmed.num_experts):
        expert = survivor(checkpoint, layer, layer_plan, new)
        if routing is None or x_ND is None or context.model is None:
            with _naming(checkpoint, layer, layer_plan, new):
                slimmed = slim_by_magnitude(expert, plan, layer_plan.sparsity)
        else:
            act = context.model.act
            token_n, weight_n = expert_tokens(routing, new, trimmed.redirect)
            with _naming(checkpoint, layer, layer_plan, new):
                slimmed = slim_by_data(
                    expert, plan, layer_plan.sparsity, x_ND, token_n, weight_n, act
                )
            if len(token_n) == 0:
                record.unseen.append(layer_plan.keep[new])
            elif out_ND is not None:
                running = place(slimmed, x_ND)
                add_expert(out_ND, x_ND, token_n, weight_n, running, act)
        record.expert_parameters += sum(matrix.numel() for matrix in slimmed)
        record.zeros += sum(_zeros(matrix) for matrix in slimmed)
        write_expert(context, new_index, new, slimmed)
    return record, out_ND


@contextmanager
def _naming(
    checkpoint: Checkpoint, layer: Layer, layer_plan: LayerPlan, new: int
) -> Iterator[None]:
    """Say which expert it was that a slimming method could not work on."""
    try:
        yield
    except (CheckpointError, CalibrationError) as error:
        expert = layer_plan.keep[new]
        where = f"{checkpoint.folder}: layer {layer.index}, expert {expert}"
        raise type(error)(f"{where}: {error}") from error


def trimmed_routing(
    model: StreamingModel,
    plan: CutPlan,
    layer: Layer,
    layer_plan: LayerPlan,
    x_ND: torch.Tensor,
) -> Routing:
    """Routing over the rows that the plan leaves."""
    checkpoint = model.checkpoint
    router_RD = trimmed_router(checkpoint, layer, layer_plan, plan).to(x_ND)
    return route(
        x_ND,
        router_RD,
        top_k=trimmed_layer(layer, layer_plan, plan).top_k,
        renormalise=checkpoint.arch.renormalise,
        where=f"{checkpoint.folder}: layer {layer.index}",
    )


def _zeros(matrix: torch.Tensor) -> int:
    return matrix.numel() - int(torch.count_nonzero(matrix))


def write_expert(
    context: SlimContext, new_index: int, new: int, expert: Expert
) -> None:
    """Hand one finished expert to the writer, in the checkpoint's own layout."""
    layout, writer = context.checkpoint.layout, context.writer
    pieces = {
        "gate": expert.gate_FD,
        "up": expert.up_FD,
        "down": expert.down_DF,
    }
    for rule in layout.experts:
        name = rule.name(new_index, new)
        if not writer.needs(name):
            continue
        matrix = (
            torch.cat([expert.gate_FD, expert.up_FD])
            if rule.role == "gate_up"
            else pieces[rule.role]
        )
        data = tensor_view(matrix.cpu())
        writer.write(name, data, 0 if rule.per_expert else new * len(data))
