"""Slimming what every token goes through: attention, shared experts, other MLPs.

Sublayer by sublayer: what enters a sublayer comes from the slimmed ones before it.

Axes: N tokens, n some of them, D the inputs of a matrix, R its rows.
"""

import torch

from ..calibrate.forward import StreamingModel
from ..checkpoint.dense_parts import DensePart
from ..checkpoint.reader import Expert, read_weight
from ..checkpoint.writer import ShardWriter
from ..slim.magnitude import magnitude
from .copy import stored_view
from .layer_cut import LayerCut
from .matrices import dense_matrices, gone_with_moe, slimmed_dense
from .slim_expert import add_sums, no_sums, slim_by_data, slim_matrix


class DenseSlimmer:
    """Slims and writes the dense matrices of one layer."""

    def __init__(
        self, cut: LayerCut, writer: ShardWriter, *, writes: bool = True
    ) -> None:
        """Slim a layer.

        Args:
            cut: The layer.
            writer: Where the slimmed matrices go.
            writes: False: another rank writes the same.
        """
        self.checkpoint, self.plan = cut.checkpoint, cut.plan
        self.writer, self._writes = writer, writes
        self.zeros = 0
        """Zeros in what was slimmed."""
        self._cut = cut
        self._sparsity = cut.layer_plan.sparsity
        self._names = frozenset(slimmed_dense(cut)) - gone_with_moe(cut)

    def without_data(self) -> None:
        """Slim all of the layer's matrices in scope by magnitude."""
        for name in sorted(self._names):
            weight_RD = self._read(name)
            self._write(name, magnitude(weight_RD, self._sparsity, self.plan.group))

    def before_attention(
        self, model: StreamingModel, index: int, hidden_STD: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Slim the attention by what enters each of its matrices; what it became."""
        attention = [
            matrix
            for matrix in dense_matrices(self.checkpoint, self._cut.layer)
            if matrix.part == "attention" and matrix.name in self._names
        ]
        if not attention:
            return {}
        device = hidden_STD.device
        sums = {one.name: no_sums(one.cols, self.plan, device) for one in attention}

        # One run of the unslimmed attention gives the inputs of all its matrices.
        def see(name: str, x_nD: torch.Tensor) -> None:
            if name in sums:
                add_sums(sums[name], x_nD, self.plan)

        model.watch_attention(index, hidden_STD, see)
        slimmed = {}
        for matrix in attention:
            weight_RD = self._read(matrix.name).to(device)
            found = sums[matrix.name]
            slimmed_RD = slim_matrix(weight_RD, found, self.plan, self._sparsity)
            self._write(matrix.name, slimmed_RD)
            slimmed[self._cut.old_prefix + matrix.name] = slimmed_RD
        return slimmed

    def before_mlp(
        self, model: StreamingModel, index: int, part: DensePart, x_ND: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Slim an MLP of all tokens; what its matrices became."""
        wanted = tuple(name in self._names for name in part.mlp.names)
        if not any(wanted):
            return {}
        mlp = Expert(*(self._read(name) for name in part.mlp.names))
        token_N = torch.arange(len(x_ND), device=x_ND.device)
        # No router before it: every token counts once.
        weight_N = torch.ones(len(x_ND), device=x_ND.device)
        found = slim_by_data(
            mlp, self.plan, self._sparsity, x_ND, token_N, weight_N, model.act, wanted
        )
        slimmed = {}
        for name, weight_RD, take in zip(part.mlp.names, found, wanted, strict=True):
            if take:
                self._write(name, weight_RD)
                slimmed[self._cut.old_prefix + name] = weight_RD
        return slimmed

    def _read(self, name: str) -> torch.Tensor:
        return read_weight(self.checkpoint, self._cut.old_prefix + name)

    def _write(self, name: str, weight_RD: torch.Tensor) -> None:
        """Hand it to the writer."""
        old, new = self._cut.old_prefix + name, self._cut.new_prefix + name
        self.zeros += weight_RD.numel() - int(torch.count_nonzero(weight_RD))
        if self._writes and self.writer.needs(new):
            data = stored_view(self.checkpoint.tensors[old], weight_RD)
            self.writer.write(new, data)
