"""Slimming one trimmed layer, expert by expert, and feeding the next layer with it.

Statistics come from the trimmed, still dense layer (as Wanda defines them); the
hidden states that go on come from the slimmed one, so that later layers are
calibrated on what the pruned model computes (the published code feeds dense ones).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch

from ..archs.spec import TensorRule
from ..calibrate.expert_forward import Routing, add_expert, expert_tokens, place
from ..calibrate.forward import StreamingModel
from ..calibrate.read_ahead import read_ahead
from ..calibrate.shared_experts import add_outputs, scaled_outputs, turns
from ..checkpoint.block_fp8 import SUFFIX
from ..checkpoint.reader import Expert, read_tensor
from ..checkpoint.writer import ShardWriter
from ..errors import CalibrationError, CheckpointError
from ..ranks.group import ALONE, Ranks
from ..recipes.schema import NEEDS_ACTIVATIONS
from ..slim.kurtosis import power_sums
from .copy import stored_view, tensor_view
from .layer_cut import LayerCut
from .layer_record import ExpertRecord, LayerRecord
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
    ranks: Ranks = ALONE
    """Who shares the experts."""


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
    model, routing = context.model, None
    if model is not None and x_ND is not None:
        routing = trimmed_routing(model, cut, x_ND)

    def make(experts: Iterable[int]) -> Iterator[tuple[Trimmed, Expert]]:
        for found, expert in slimmed_experts(cut, model, x_ND, routing, experts):
            yield found, expert
            _write_expert(context.writer, cut, found, expert)

    return change_experts(context, cut, record, x_ND, routing, make, want_output)


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


def change_experts(
    context: SlimContext,
    cut: LayerCut,
    record: LayerRecord,
    x_ND: torch.Tensor | None,
    routing: Routing | None,
    make: Callable[[Iterable[int]], Iterator[tuple[Trimmed, Expert]]],
    want_output: bool,
) -> torch.Tensor | None:
    """Have each rank change and write its experts of a layer; run them as written.

    Args:
        context: The pass.
        cut: The layer.
        record: Where what was done is counted.
        x_ND: Calibration activations entering the MoE; None if not needed.
        routing: Of these.
        make: Changes some experts, by new number: as they were, and what they compute.
        want_output: Whether the changed layer's output is needed.

    Returns:
        The MoE output [N, D] if wanted, the same on every rank.
    """
    ranks, model = context.ranks, context.model
    out_ND = torch.zeros_like(x_ND) if want_output and x_ND is not None else None
    done: list[ExpertRecord] = []
    for turn in turns(ranks, cut.trimmed.num_experts):
        gave = {}
        for found, made in make(filter(ranks.owns, turn)):
            done.append(_record(cut, found, made))
            served = found.served
            if x_ND is None or out_ND is None or model is None or served is None:
                continue
            if ranks.size > 1:
                gave[found.new] = scaled_outputs(x_ND, *served, made, model.act)
            elif len(served.token_n):
                add_expert(out_ND, x_ND, *served, place(made, x_ND), model.act)
        if ranks.size > 1 and out_ND is not None and routing is not None:
            redirect = cut.trimmed.redirect
            of_turn = {new: expert_tokens(routing, new, redirect)[0] for new in turn}
            add_outputs(ranks, out_ND, of_turn, gave)
    told = [
        one for own in ranks.everyones([asdict(one) for one in done]) for one in own
    ]
    for fields in sorted(told, key=itemgetter("new")):
        record.add(ExpertRecord(**fields))
    return out_ND


def _record(cut: LayerCut, found: Trimmed, made: Expert) -> ExpertRecord:
    """What was done to an expert.

    Args:
        cut: The layer.
        found: The expert before.
        made: What it computes as it is written.
    """
    channels = None
    if found.kept_K is not None:
        channels = _packed_bits(found.kept_K, cut.layer.width)
    return ExpertRecord(
        expert=cut.keep[found.new],
        new=found.new,
        # Without data there is nothing to run, and no expert counts as unseen.
        seen=found.served is None or len(found.served.token_n) > 0,
        parameters=sum(matrix.numel() for matrix in made),
        zeros=_zeros(made) if cut.writes_zeros else 0,
        trimmed_powers_M5=_powers(found.expert),
        slimmed_powers_M5=_powers(made),
        channels=channels,
    )


def slimmed_experts(
    cut: LayerCut,
    model: StreamingModel | None,
    x_ND: torch.Tensor | None,
    routing: Routing | None,
    experts: Iterable[int],
) -> Iterator[tuple[Trimmed, Expert]]:
    """Experts a layer is left with, one at a time, and as they will be written.

    Args:
        cut: The layer, under a plan that names the method.
        model: For its activation; None for methods that need no activations.
        x_ND: Calibration activations entering the MoE; None likewise.
        routing: Of these; None likewise.
        experts: Which, by new number.
    """
    plan, sparsity = cut.plan, cut.layer_plan.sparsity
    wanted = taken(cut)
    # There may be tokens because experts were refitted or narrowed by them.
    by_data = plan.slim in NEEDS_ACTIVATIONS
    for found in trimmed_experts(cut, model, routing, x_ND, experts):
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
    experts: Iterable[int],
) -> Iterator[Trimmed]:
    """Experts a layer is left with, narrowed if the plan says so, and their tokens.

    Args:
        cut: The layer.
        model: For its activation.
        routing: Of the calibration tokens; None where no data is used.
        x_ND: What enters the MoE sublayer; None likewise.
        experts: Which, by new number.
    """
    width, block = cut.layer_plan.width, channel_block(cut.checkpoint, cut.layer)
    numbers = list(experts)
    device = torch.device("cpu") if x_ND is None else x_ND.device
    for new, expert in read_ahead(numbers, partial(survivor, cut), device):
        served, kept_K = None, None
        if routing is not None:
            served = ExpertTokens(*expert_tokens(routing, new, cut.trimmed.redirect))
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


def _powers(expert: Expert) -> list[list[float]]:
    """Of each matrix; they add up over experts, never in memory together."""
    sums = [power_sums(matrix.reshape(-1)) for matrix in expert]
    found: list[list[float]] = torch.stack(sums).tolist()
    return found


def _packed_bits(kept_K: torch.Tensor, width: int) -> str:
    """Some of ``width`` channels as hexadecimal digits: bit c % 8 of byte c // 8."""
    bits_F = np.zeros(width, np.bool_)
    bits_F[kept_K.cpu().numpy()] = True
    return np.packbits(bits_F, bitorder="little").tobytes().hex()


def _zeros(expert: Expert) -> int:
    kept = torch.stack([torch.count_nonzero(matrix) for matrix in expert])
    return sum(matrix.numel() for matrix in expert) - int(kept.sum())


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
