"""Slimming one trimmed layer, expert by expert, and feeding the next layer with it.

Statistics come from the trimmed, still dense layer (as Wanda defines them); the
hidden states that go on come from the slimmed one, so that later layers are
calibrated on what the pruned model will really compute (spec, defect 3).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..archs.spec import TensorRule
from ..calibrate.expert_forward import Routing, add_expert, expert_tokens, place
from ..calibrate.forward import StreamingModel
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import Expert
from ..checkpoint.writer import ShardWriter
from ..decide.cut_plan import CutPlan, LayerPlan
from ..errors import CalibrationError, CheckpointError
from ..slim.kurtosis import power_sums
from .copy import stored_view
from .matrices import taken
from .slim_expert import slim_by_data, slim_by_magnitude
from .trimmed import survivor, trimmed_layer, trimmed_router


@dataclass
class LayerRecord:
    """What slimming did to one layer; one journal line."""

    layer: int
    expert_parameters: int = 0
    zeros: int = 0
    """Zeros among the layer's surviving expert weights, those there before included."""
    dense_zeros: int = 0
    """Zeros among its other matrices that were slimmed: attention, MLPs."""
    unseen: list[int] = field(default_factory=list)
    """Input ids of experts no calibration token reached: pruned by magnitude, or
    rounded to nearest."""
    trimmed_powers_5: list[float] = field(default_factory=lambda: [0.0] * 5)
    """Sums of powers (``slim/kurtosis.py``) of the surviving experts' weights, before
    slimming."""
    slimmed_powers_5: list[float] = field(default_factory=lambda: [0.0] * 5)
    """The same of what was written."""


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
    record: LayerRecord,
    new_index: int,
    x_ND: torch.Tensor | None,
    *,
    want_output: bool,
) -> torch.Tensor | None:
    """Slim and write every expert of one layer.

    Args:
        context: The pass.
        layer: The input layer.
        layer_plan: What the plan does to it.
        record: Where what was done is counted.
        new_index: Its index in the output.
        x_ND: Calibration activations entering the MoE; None if not needed.
        want_output: Whether the slimmed layer's output is needed (not after the last).

    Returns:
        The MoE output [N, D] of the slimmed layer if wanted.
    """
    out_ND = torch.zeros_like(x_ND) if want_output and x_ND is not None else None
    for found in slimmed_experts(
        context.checkpoint, context.plan, layer, layer_plan, context.model, x_ND
    ):
        if found.served is None:
            pass
        elif len(found.served.token_n) == 0:
            record.unseen.append(layer_plan.keep[found.new])
        elif out_ND is not None and x_ND is not None and context.model is not None:
            running = place(found.expert, x_ND)
            add_expert(out_ND, x_ND, *found.served, running, context.model.act)
        record.expert_parameters += sum(matrix.numel() for matrix in found.expert)
        record.zeros += sum(_zeros(matrix) for matrix in found.expert)
        add_powers(record.trimmed_powers_5, found.trimmed)
        add_powers(record.slimmed_powers_5, found.expert)
        old = layer.index, layer_plan.keep[found.new]
        _write_expert(context, old, (new_index, found.new), found.expert)
    return out_ND


class ExpertTokens(NamedTuple):
    """The tokens one expert serves, and the weight of its output for each."""

    token_n: torch.Tensor
    weight_n: torch.Tensor


class Slimmed(NamedTuple):
    """One expert of a layer, trimmed and slimmed."""

    new: int
    trimmed: Expert
    """Before slimming."""
    expert: Expert
    served: ExpertTokens | None
    """Of the calibration tokens; None where no data is used."""


def slimmed_experts(
    checkpoint: Checkpoint,
    plan: CutPlan,
    layer: Layer,
    layer_plan: LayerPlan,
    model: StreamingModel | None,
    x_ND: torch.Tensor | None,
) -> Iterator[Slimmed]:
    """The experts a layer is left with, one at a time, as they will be written.

    Args:
        checkpoint: The input.
        plan: Names the method.
        layer: The input layer.
        layer_plan: What the plan does to it.
        model: For its routing; None for methods that need no activations.
        x_ND: Calibration activations entering the MoE; None likewise.
    """
    trimmed = trimmed_layer(layer, layer_plan, plan)
    sparsity = layer_plan.sparsity
    wanted = taken(checkpoint, layer, plan)
    routing = None
    if x_ND is not None and model is not None:
        routing = trimmed_routing(model, plan, layer, layer_plan, x_ND)
    for new, trimmed_expert, served in trimmed_experts(
        checkpoint, layer, layer_plan, trimmed, routing
    ):
        with naming(checkpoint, layer, layer_plan, new):
            if served is None or x_ND is None or model is None:
                expert = slim_by_magnitude(trimmed_expert, plan, sparsity, wanted)
            else:
                expert = slim_by_data(
                    trimmed_expert, plan, sparsity, x_ND, *served, model.act, wanted
                )
        yield Slimmed(new, trimmed_expert, expert, served)


def trimmed_experts(
    checkpoint: Checkpoint,
    layer: Layer,
    layer_plan: LayerPlan,
    trimmed: Layer,
    routing: Routing | None,
) -> Iterator[tuple[int, Expert, ExpertTokens | None]]:
    """Each expert a layer is left with, and its tokens; None where no data is used."""
    for new in range(trimmed.num_experts):
        served = None
        if routing is not None:
            served = ExpertTokens(*expert_tokens(routing, new, trimmed.redirect))
        yield new, survivor(checkpoint, layer, layer_plan, new), served


@contextmanager
def naming(
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

    def read(rule: TensorRule) -> torch.Tensor:
        return trimmed_router(checkpoint, rule, layer, layer_plan, plan)

    return model.route(trimmed_layer(layer, layer_plan, plan), x_ND, read)


def add_powers(powers_5: list[float], expert: Expert) -> None:
    """Add to ``powers_5`` in place."""
    for matrix in expert:
        for power, total in enumerate(power_sums(matrix.reshape(-1)).tolist()):
            powers_5[power] += total


def _zeros(matrix: torch.Tensor) -> int:
    return matrix.numel() - int(torch.count_nonzero(matrix))


def _write_expert(
    context: SlimContext, old: tuple[int, int], new: tuple[int, int], expert: Expert
) -> None:
    """Hand one finished expert to the writer, in the checkpoint's own layout.

    Args:
        context: The pass.
        old: Layer and expert of the input.
        new: Layer and expert of the output.
        expert: Its weights, as the model computes with them.
    """
    layout, writer = context.checkpoint.layout, context.writer
    pieces = {
        "gate": expert.gate_FD,
        "up": expert.up_FD,
        "down": expert.down_DF,
    }
    for rule in layout.experts:
        name = rule.name(*new)
        if not writer.needs(name):
            continue
        matrix = (
            torch.cat([expert.gate_FD, expert.up_FD])
            if rule.role == "gate_up"
            else pieces[rule.role]
        )
        data = stored_view(context.checkpoint.tensors[rule.name(*old)], matrix)
        writer.write(name, data, 0 if rule.per_expert else new[1] * len(data))
