"""Quantizing what every token goes through: attention, shared experts, MLPs, head.

As in ``slim_dense``, what enters a sublayer comes from the quantized ones before it.

Axes: N tokens, n some of them, D the inputs of a matrix, R its rows.
"""

import torch

from ..calibrate.forward import StreamingModel
from ..checkpoint.dense_parts import DensePart
from ..checkpoint.open import Checkpoint
from ..checkpoint.reader import Expert, read_weight
from ..checkpoint.writer import ShardWriter
from ..decide.cut_plan import CutPlan
from ..decide.quantize import form_of
from ..kernels.quantized import Quantized, dequantize
from ..slim.gptq import gptq
from ..slim.rtn import rtn
from ..slim.sparsegpt import add_inputs
from .layer_cut import LayerCut
from .matrices import dense_matrices, gone_with_moe, quantized_dense, quantized_head
from .quantize_layer import no_sums, quantize_expert, write_matrix
from .slim_layer import ExpertTokens, errors_at


def quantize_head(checkpoint: Checkpoint, plan: CutPlan, writer: ShardWriter) -> None:
    """Round the output head to nearest and write it, if the plan asks for that.

    The calibration pass ends before the last norm, so there are no inputs of it.
    """
    name, form = quantized_head(checkpoint, plan), form_of(plan.quantize)
    if name is None:
        return
    base = name.rpartition(".")[0]
    # All parts or none are in files that are finished: a shard may hold some of them.
    with errors_at(name):
        write_matrix(writer, base, rtn(read_weight(checkpoint, name), form), form)


class DenseQuantizer:
    """Quantizes and writes the dense matrices of one layer."""

    def __init__(
        self, cut: LayerCut, writer: ShardWriter, *, writes: bool = True
    ) -> None:
        """Quantize a layer's matrices that are in scope.

        Args:
            cut: The layer.
            writer: Where they go.
            writes: False: another rank writes the same.
        """
        self.checkpoint, self.stage = cut.checkpoint, cut.plan.quantize
        self.writer, self._writes = writer, writes
        self.zeros = 0
        """None are written."""
        self._cut, self._form = cut, form_of(cut.plan.quantize)
        self._names = quantized_dense(cut) - gone_with_moe(cut)

    def without_data(self) -> None:
        """Round all of the layer's matrices in scope to nearest."""
        for name in sorted(self._names):
            with errors_at(self._cut.old_prefix + name):
                self._write(name, rtn(self._read(name), self._form))

    def before_attention(
        self, model: StreamingModel, index: int, hidden_STD: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Quantize the attention by what enters its matrices; what it became."""
        found = [
            matrix
            for matrix in dense_matrices(self.checkpoint, self._cut.layer)
            if matrix.part == "attention" and matrix.name in self._names
        ]
        sums = {}
        if found and self.stage.method == "gptq":
            weights = {one.name: self._read(one.name) for one in found}
            sums = {
                name: no_sums(weight_RD.to(hidden_STD.device))
                for name, weight_RD in weights.items()
            }

            # One run of the attention as it is gives the inputs of all its matrices.
            def see(name: str, x_nD: torch.Tensor) -> None:
                if name in sums:
                    add_inputs(sums[name], x_nD)

            model.watch_attention(index, hidden_STD, see)
        made = {}
        for matrix in found:
            weight_RD = self._read(matrix.name).to(hidden_STD.device)
            with errors_at(self._cut.old_prefix + matrix.name):
                stored = (
                    gptq(
                        weight_RD,
                        # [D, D] in fp32: freed as soon as it was used.
                        sums.pop(matrix.name),
                        self._form,
                        act_order=self.stage.act_order,
                    )
                    if matrix.name in sums
                    else rtn(weight_RD, self._form)
                )
            self._write(matrix.name, stored)
            dense_RD = dequantize(stored, self._form, weight_RD.dtype)
            made[self._cut.old_prefix + matrix.name] = dense_RD
        return made

    def before_mlp(
        self, model: StreamingModel, index: int, part: DensePart, x_ND: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Quantize an MLP of all tokens; what its matrices became."""
        # Parts are in scope as a whole.
        if not self._names.issuperset(part.mlp.names):
            return {}
        mlp = Expert(*(self._read(name).to(x_ND.device) for name in part.mlp.names))
        # No router before it: every token counts once.
        served = ExpertTokens(
            torch.arange(len(x_ND), device=x_ND.device),
            torch.ones(len(x_ND), device=x_ND.device),
        )
        with errors_at(self._cut.old_prefix + part.mlp.names[0]):
            made = quantize_expert(mlp, self.stage, x_ND, served, model.act, None)
        three = zip(part.mlp.names, made.stored, made.computes, strict=True)
        found = {}
        for name, stored, dense_RD in three:
            self._write(name, stored)
            found[self._cut.old_prefix + name] = dense_RD
        return found

    def _read(self, name: str) -> torch.Tensor:
        return read_weight(self.checkpoint, self._cut.old_prefix + name)

    def _write(self, name: str, stored: Quantized) -> None:
        base = f"{self._cut.new_prefix}{name}".rpartition(".")[0]
        if self._writes:
            write_matrix(self.writer, base, stored, self._form)
