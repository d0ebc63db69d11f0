"""Slimming one trimmed layer, expert by expert, and feeding the next layer with it.

Statistics come from the trimmed, still dense layer (as Wanda defines them); the
hidden states that go on come from the slimmed one, so that later layers are
calibrated on what the pruned model computes (the published code feeds dense ones).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from ..archs.spec import TensorRule
from ..calibrate.expert_forward import Routing, add_expert, expert_tokens, place
from ..calibrate.forward import StreamingModel
from ..checkpoint.block_fp8 import SUFFIX
from ..checkpoint.reader import Expert, read_tensor
from ..checkpoint.writer import ShardWriter
from ..errors import CalibrationError, CheckpointError
from ..recipes.schema import NEEDS_ACTIVATIONS
from ..slim.kurtosis import power_sums
from .copy import stored_view, tensor_view
from .layer_cut import LayerCut
from .layer_record import LayerRecord
from .matrices import channel_block, taken
from .narrow_expert import narrow_expert
from .slim_expert import slim_by_data, slim_by_magnitude
from .trimmed import survivor, trimmed_router


@dataclass(frozen=True)
class SlimContext:
    """What stays the same for every layer of a slimming pass."""

    writer: ShardWriter
    model: StreamingModel | None
    """None for methods that need no activations."""


def slim_layer(
    context: SlimContext,
    cut: LayerCut,
    record: LayerRecord,
    x_ND: torch.Tensor | None,
    *,
    want_output: bool,
) -> torch.Tensor | None:
    """Slim and write every expert of one layer.

    Args:
        context: The pass.
        cut: The layer.
        record: Where what was done is counted.
        x_ND: Calibration activations entering the MoE; None if not needed.
        want_output: Whether the slimmed layer's output is needed (not after the last).

    Returns:
        The MoE output [N, D] of the slimmed layer if wanted.
    """
    out_ND = torch.zeros_like(x_ND) if want_output and x_ND is not None else None
    for found, expert in slimmed_experts(cut, context.model, x_ND):
        finish_expert(context.model, cut, record, found, expert, x_ND, out_ND)
        _write_expert(context.writer, cut, found, expert)
    return out_ND


class ExpertTokens(NamedTuple):
    """The tokens one expert serves, and the weight of its output for each."""

    token_n: torch.Tensor
    weight_n: torch.Tensor


class Trimmed(NamedTuple):
    """One expert of a layer as it is before its weights are slimmed or quantized."""

    new: int
    expert: Expert
    served: ExpertTokens | None
    """Of the calibration tokens; None where no data is used."""
    kept_K: torch.Tensor | None
    """The channels that are left of it, ascending; None: all of them."""


def finish_expert(
    model: StreamingModel | None,
    cut: LayerCut,
    record: LayerRecord,
    found: Trimmed,
    made: Expert,
    x_ND: torch.Tensor | None,
    out_ND: torch.Tensor | None,
) -> None:
    """Count what was done to one expert, and add its outputs for its tokens.

    Args:
        model: For its activation.
        cut: The layer.
        record: Where it is counted.
        found: The expert before.
        made: What it computes as it is written.
        x_ND: Calibration activations entering the MoE; None if not needed.
        out_ND: The layer's output so far, added to in place; None if nobody wants it.
    """
    if found.served is None:
        # No data: nothing to run, and no expert counts as unseen.
        pass
    elif len(found.served.token_n) == 0:
        record.unseen.append(cut.keep[found.new])
    elif out_ND is not None and x_ND is not None and model is not None:
        add_expert(out_ND, x_ND, *found.served, place(made, x_ND), model.act)
    record.expert_parameters += sum(matrix.numel() for matrix in made)
    if cut.writes_zeros:
        record.zeros += sum(_zeros(matrix) for matrix in made)
    _add_powers(record.trimmed_powers_5, found.expert)
    _add_powers(record.slimmed_powers_5, made)
    if found.kept_K is not None:
        record.channels.append(_packed_bits(found.kept_K, cut.layer.width))


def slimmed_experts(
    cut: LayerCut, model: StreamingModel | None, x_ND: torch.Tensor | None
) -> Iterator[tuple[Trimmed, Expert]]:
    """The experts a layer is left with, one at a time, and as they will be written.

    Args:
        cut: The layer, under a plan that names the method.
        model: For its routing; None for methods that need no activations.
        x_ND: Calibration activations entering the MoE; None likewise.
    """
    plan, sparsity = cut.plan, cut.layer_plan.sparsity
    wanted = taken(cut)
    # There may be tokens because experts were refitted or narrowed by them.
    by_data = plan.slim in NEEDS_ACTIVATIONS
    routing = None
    if x_ND is not None and model is not None:
        routing = trimmed_routing(model, cut, x_ND)
    for found in trimmed_experts(cut, model, routing, x_ND):
        expert, served = found.expert, found.served
        with naming(cut, found.new):
            if not cut.writes_zeros:
                pass
            elif served is None or x_ND is None or model is None or not by_data:
                expert = slim_by_magnitude(expert, plan, sparsity, wanted)
            else:
                expert = slim_by_data(
                    expert, plan, sparsity, x_ND, *served, model.act, wanted
                )
        yield found, expert


def trimmed_experts(
    cut: LayerCut,
    model: StreamingModel | None,
    routing: Routing | None,
    x_ND: torch.Tensor | None,
) -> Iterator[Trimmed]:
    """Each expert a layer is left with, narrowed if the plan says so, and its tokens.

    Args:
        cut: The layer.
        model: For its activation.
        routing: Of the calibration tokens; None where no data is used.
        x_ND: What enters the MoE sublayer; None likewise.
    """
    width, block = cut.layer_plan.width, channel_block(cut.checkpoint, cut.layer)
    for new in range(cut.trimmed.num_experts):
        served, kept_K = None, None
        if routing is not None:
            served = ExpertTokens(*expert_tokens(routing, new, cut.trimmed.redirect))
        expert = survivor(cut, new)
        if width is not None and served and x_ND is not None and model is not None:
            stage = cut.plan.narrow
            with naming(cut, new):
                expert, kept_K = narrow_expert(
                    expert, stage, width, block, x_ND, *served, model.act
                )
        yield Trimmed(new, expert, served, kept_K)


def naming(cut: LayerCut, new: int) -> AbstractContextManager[None]:
    """Say which expert it was that a method could not work on."""
    where = f"{cut.checkpoint.folder}: layer {cut.index}, expert {cut.keep[new]}"
    return errors_at(where)


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Say where it was: methods see a bare matrix."""
    try:
        yield
    except (CheckpointError, CalibrationError) as error:
        raise type(error)(f"{where}: {error}") from error


def trimmed_routing(
    model: StreamingModel, cut: LayerCut, x_ND: torch.Tensor
) -> Routing:
    """Routing over the rows that the plan leaves."""
    return model.route(cut.trimmed, x_ND, partial(trimmed_router, cut))


def _add_powers(powers_5: list[float], expert: Expert) -> None:
    """Add to ``powers_5`` in place."""
    for matrix in expert:
        # Sums add up over experts, which are never in memory together.
        for power, total in enumerate(power_sums(matrix.reshape(-1)).tolist()):
            powers_5[power] += total


def _packed_bits(kept_K: torch.Tensor, width: int) -> str:
    """Some of ``width`` channels as hexadecimal digits: bit c % 8 of byte c // 8."""
    bits_F = np.zeros(width, np.bool_)
    bits_F[kept_K.cpu().numpy()] = True
    return np.packbits(bits_F, bitorder="little").tobytes().hex()


def _zeros(matrix: torch.Tensor) -> int:
    return matrix.numel() - int(torch.count_nonzero(matrix))


def _write_expert(
    writer: ShardWriter, cut: LayerCut, found: Trimmed, expert: Expert
) -> None:
    """Hand one finished expert to the writer, in the checkpoint's own layout."""
    checkpoint, new = cut.checkpoint, found.new
    pieces = {
        "gate": expert.gate_FD,
        "up": expert.up_FD,
        "down": expert.down_DF,
    }
    for rule in checkpoint.layout.experts:
        name = rule.name(cut.new_index, new)
        if not writer.needs(name):
            continue
        matrix = (
            # Axis 2F: gate rows, then up rows (archs/spec.py).
            torch.cat([expert.gate_FD, expert.up_FD])
            if rule.role == "gate_up"
            else pieces[rule.role]
        )
        # For the stored dtype; of FP8 the bytes that stay are taken from it.
        source = checkpoint.tensors[rule.name(cut.index, cut.keep[new])]
        data = stored_view(source, matrix, found.kept_K, int(rule.role == "down"))
        # In a packed tensor slices are equal, and come in order as they have to.
        writer.write(name, data, 0 if rule.per_expert else new * len(data))
        scale = source.name + SUFFIX
        if found.kept_K is not None and checkpoint.is_scale(scale):
            _write_scales(writer, cut, found.kept_K, rule, scale, name + SUFFIX)


def _write_scales(
    writer: ShardWriter,
    cut: LayerCut,
    kept_K: torch.Tensor,
    rule: TensorRule,
    source: str,
    name: str,
) -> None:
    """The scales of the FP8 blocks that are left of a narrowed matrix."""
    blocks = cut.checkpoint.blocks
    assert blocks is not None
    down = rule.role == "down"
    # Blocks leave whole, so each one left has its first channel among those left.
    kept_B = torch.unique_consecutive(kept_K // (blocks.cols if down else blocks.rows))
    scales = read_tensor(cut.checkpoint.tensors[source])
    left = scales.index_select(int(down), kept_B.cpu())
    if writer.needs(name):
        writer.write(name, tensor_view(left))
