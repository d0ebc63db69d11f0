"""Quantizing one trimmed layer, expert by expert, and feeding the next layer with it.

Statistics come from the trimmed layer as it is; the hidden states that go on come from
the quantized one. AWQ divides the experts' input by powers of two: here the forward
leaves it as it is and divides the weights instead, which gives the same to the bit.

Axes: N tokens, n some of them, D hidden, F expert width, R rows of a matrix.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..calibrate.expert_forward import (
    Activation,
    Routing,
    expert_hidden,
    place,
    token_chunks,
)
from ..checkpoint.reader import Expert
from ..checkpoint.writer import ShardWriter
from ..decide.quantize import form_of
from ..kernels.quantized import Form, Quantized, dequantize, pack
from ..recipes.schema import QuantizeStage
from ..slim import awq
from ..slim.gptq import gptq
from ..slim.rtn import rtn
from ..slim.sparsegpt import add_inputs
from .copy import build_tensor, tensor_view
from .layer_cut import LayerCut
from .layer_record import LayerRecord
from .slice import OutputTensor
from .slim_expert import column_sums
from .slim_layer import (
    ExpertTokens,
    SlimContext,
    Trimmed,
    change_experts,
    naming,
    trimmed_experts,
    trimmed_routing,
)


@torch.no_grad()
def quantize_layer(
    context: SlimContext,
    cut: LayerCut,
    record: LayerRecord,
    x_ND: torch.Tensor | None,
    scaled: Sequence[OutputTensor],
    *,
    want_output: bool,
) -> torch.Tensor | None:
    """Quantize and write every expert of one layer.

    Args:
        context: The pass.
        cut: The layer.
        record: Where what was done is counted.
        x_ND: Calibration activations entering the MoE; None if not needed.
        scaled: What else of the layer AWQ's scales change.
        want_output: Whether the layer's output is needed (not after the last).

    Returns:
        The MoE output [N, D] of the quantized layer if wanted.
    """
    stage = cut.plan.quantize
    run = _QuantizedLayer(context, cut, x_ND)
    input_scale_D = run.input_scale() if stage.method == "awq" else None
    for tensor in scaled if context.ranks.rank == 0 else ():
        if input_scale_D is not None and context.writer.needs(tensor.name):
            _write_scaled(context.writer, cut, tensor, input_scale_D)

    def make(experts: Iterable[int]) -> Iterator[tuple[Trimmed, Expert]]:
        for found in run.experts(experts):
            with naming(cut, found.new):
                # Without inputs GPTQ and AWQ have nothing to minimize: rounded to
                # nearest.
                made = quantize_expert(
                    found.expert, stage, x_ND, found.served, run.act, input_scale_D
                )
            yield found, made.computes
            _write(context.writer, cut, found.new, made)

    return change_experts(context, cut, record, x_ND, run.routing, make, want_output)


class _QuantizedLayer:
    """The experts a layer is left with, and the tokens of each."""

    def __init__(
        self,
        context: SlimContext,
        cut: LayerCut,
        x_ND: torch.Tensor | None,
    ) -> None:
        model = context.model
        self._cut, self._model, self._x_ND = cut, model, x_ND
        self._ranks = context.ranks
        self.routing: Routing | None = None
        self.act: Activation = torch.nn.functional.silu if model is None else model.act
        if model is not None and x_ND is not None:
            self.routing = trimmed_routing(model, cut, x_ND)

    def experts(self, which: Iterable[int]) -> Iterator[Trimmed]:
        """Experts, trimmed, with their tokens; None where there are no tokens."""
        found = trimmed_experts(self._cut, self._model, self.routing, self._x_ND, which)
        for one in found:
            if self._x_ND is not None:
                placed = Expert(*(part.to(self._x_ND.device) for part in one.expert))
                one = one._replace(expert=placed)
            yield one

    def input_scale(self) -> torch.Tensor:
        """AWQ's scale of the experts' input, one for the layer, judged by all."""
        assert self._x_ND is not None
        form = form_of(self._cut.plan.quantize)
        scales = awq.candidates(_mean_size(self._x_ND))
        # All experts read the same x, so errors are summed for one common choice.
        count = self._cut.trimmed.num_experts
        # [gate and up, experts, scales]; of experts without tokens they stay 0.
        errors_2EA = torch.zeros(2, count, len(scales), dtype=torch.float64)
        for new, expert, served, _ in self.experts(
            filter(self._ranks.owns, range(count))
        ):
            if served is None or len(served.token_n) == 0:
                continue
            x_nD = self._x_ND.index_select(0, awq.sampled(served.token_n))
            with naming(self._cut, new):
                # down reads something else and has a scale of its own: _by_awq.
                for at, weight_FD in enumerate((expert.gate_FD, expert.up_FD)):
                    errors_2EA[at, new] = awq.errors(weight_FD, x_nD, scales, form)
        found = self._ranks.by_owner({"errors": errors_2EA})["errors"]
        total_A = torch.zeros(len(scales), dtype=torch.float64)
        for new in range(count):
            # One after the other: whoever found them, the same sum to the last bit.
            total_A += found[0, new]
            total_A += found[1, new]
        return awq.best(scales, total_A)


class Made:
    """One quantized expert."""

    def __init__(
        self, stored: tuple[Quantized, Quantized, Quantized], computes: Expert
    ) -> None:
        self.stored = stored
        """Gate, up and down."""
        self.computes = computes
        """What it computes, on inputs that nobody scaled."""


def quantize_expert(
    expert: Expert,
    stage: QuantizeStage,
    x_ND: torch.Tensor | None,
    served: ExpertTokens | None,
    act: Activation,
    input_scale_D: torch.Tensor | None,
) -> Made:
    """Quantize the three matrices of an MLP, on the device that they are on.

    Args:
        expert: They, trimmed.
        stage: How.
        x_ND: What enters the layer's MLPs; None where no data is used.
        served: The tokens that this one serves; None likewise.
        act: The activation between gate and up.
        input_scale_D: AWQ's; None where it is not AWQ.
    """
    form = form_of(stage)
    if input_scale_D is not None and x_ND is not None and served is not None:
        return _by_awq(expert, form, x_ND, served, act, input_scale_D)
    if stage.method == "gptq" and x_ND is not None and served is not None:
        stored = _by_gptq(expert, stage, x_ND, served, act)
    else:
        gate, up, down = (rtn(matrix, form) for matrix in expert)
        stored = gate, up, down
    dtype = expert.gate_FD.dtype
    return Made(stored, Expert(*(dequantize(each, form, dtype) for each in stored)))


def _by_gptq(
    expert: Expert,
    stage: QuantizeStage,
    x_ND: torch.Tensor,
    served: ExpertTokens,
    act: Activation,
) -> tuple[Quantized, Quantized, Quantized]:
    """GPTQ of all three; gate and up have the same inputs, so one Hessian is enough."""
    form, width = form_of(stage), len(expert.gate_FD)
    input_DD = no_sums(expert.gate_FD)
    inner_FF = no_sums(expert.down_DF)
    running = place(expert, x_ND)
    for token_n, _ in token_chunks(*served, running):
        x_nD = x_ND.index_select(0, token_n)
        add_inputs(input_DD, x_nD)
        add_inputs(inner_FF, expert_hidden(x_nD, running, act))
    # GPTQ treats rows independently, so gate and up can be one matrix.
    both_RD = torch.cat([expert.gate_FD, expert.up_FD])
    both = gptq(both_RD, input_DD, form, act_order=stage.act_order)
    # [D, D] in fp32: freed before the Hessian of down is inverted.
    del input_DD
    down = gptq(expert.down_DF, inner_FF, form, act_order=stage.act_order)
    return _rows(both, slice(None, width)), _rows(both, slice(width, None)), down


def no_sums(weight_RD: torch.Tensor) -> torch.Tensor:
    """Zeros [D, D] for the sums of a matrix's inputs."""
    # Sums are fp32, whatever the weights are.
    cols = weight_RD.shape[1]
    return torch.zeros(cols, cols, device=weight_RD.device)


def _rows(matrix: Quantized, rows: slice) -> Quantized:
    values, scales = matrix
    zero = None if scales.zero_RG is None else scales.zero_RG[rows]
    return Quantized(
        values[rows], scales._replace(scale_RG=scales.scale_RG[rows], zero_RG=zero)
    )


def _by_awq(
    expert: Expert,
    form: Form,
    x_ND: torch.Tensor,
    served: ExpertTokens,
    act: Activation,
    input_scale_D: torch.Tensor,
) -> Made:
    """AWQ: the rows of up make up for the scale of what down reads."""
    inner_scale_F = torch.ones(len(expert.gate_FD), device=x_ND.device)
    if len(served.token_n):
        x_nD = x_ND.index_select(0, awq.sampled(served.token_n))
        inner_nF = expert_hidden(x_nD, place(expert, x_ND), act)
        scales = awq.candidates(_mean_size(inner_nF))
        found_A = awq.errors(expert.down_DF, inner_nF, scales, form)
        inner_scale_F = awq.best(scales, found_A)
    dtype = expert.gate_FD.dtype
    # Only up can carry 1 / s: what gate gives goes through the activation.
    up_FD = (expert.up_FD / inner_scale_F[:, None]).to(dtype)
    gate = rtn(awq.scaled(expert.gate_FD, input_scale_D), form)
    up = rtn(awq.scaled(up_FD, input_scale_D), form)
    down = rtn(awq.scaled(expert.down_DF, inner_scale_F), form)
    # The scales are undone here, since this forward's x is not divided by them.
    computes = Expert(
        (dequantize(gate, form, dtype) / input_scale_D).to(dtype),
        (dequantize(up, form, dtype) * inner_scale_F[:, None] / input_scale_D).to(
            dtype
        ),
        (dequantize(down, form, dtype) / inner_scale_F).to(dtype),
    )
    return Made((gate, up, down), computes)


def _mean_size(x_ND: torch.Tensor) -> torch.Tensor:
    """Mean of |x| over tokens."""
    return column_sums(x_ND, torch.abs) / max(1, len(x_ND))


def _write_scaled(
    writer: ShardWriter,
    cut: LayerCut,
    tensor: OutputTensor,
    input_scale_D: torch.Tensor,
) -> None:
    """Divide a norm by the scale, or multiply what reads it; exact in bf16."""
    dense = build_tensor(cut.checkpoint, tensor)
    scale_D = input_scale_D.to(dense.device)
    # One axis: the norm that gives x. Two: a matrix that reads it.
    changed = dense / scale_D if dense.dim() == 1 else dense * scale_D
    writer.write(tensor.name, tensor_view(changed.to(dense.dtype)))


def _write(writer: ShardWriter, cut: LayerCut, new: int, made: Made) -> None:
    """Hand one expert's parts to the writer."""
    matrices = dict(zip(("gate", "up", "down"), made.stored, strict=True))
    form = form_of(cut.plan.quantize)
    for rule in cut.checkpoint.layout.experts:
        # NAME.weight is stored as NAME.weight_packed, NAME.weight_scale and so on.
        base = rule.name(cut.new_index, new).rpartition(".")[0]
        write_matrix(writer, base, matrices[rule.role], form)


def write_matrix(writer: ShardWriter, base: str, matrix: Quantized, form: Form) -> None:
    """Hand the parts of a matrix to the writer: NAME.weight_packed and so on."""
    for part, tensor in pack(matrix, form).items():
        if writer.needs(f"{base}.{part}"):
            writer.write(f"{base}.{part}", tensor_view(tensor.cpu()))
