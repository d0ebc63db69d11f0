"""Slimming what every token goes through: attention, shared experts, other MLPs.

Sublayer by sublayer: what enters a sublayer comes from the slimmed ones before it.

Axes: N tokens, n some of them, D the inputs of a matrix, R its rows.
"""

import torch

from ..calibrate.dense import DensePart
from ..calibrate.forward import StreamingModel
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import Expert, read_weight
from ..checkpoint.writer import ShardWriter
from ..decide.cut_plan import CutPlan
from ..slim.magnitude import magnitude
from .copy import stored_view
from .matrices import dense_matrices, slimmed_dense
from .slim_expert import add_sums, no_sums, slim_by_data, slim_matrix


class DenseSlimmer:
    """Slims and writes the dense matrices of the layers that a forward runs through."""

    def __init__(
        self, checkpoint: Checkpoint, plan: CutPlan, writer: ShardWriter
    ) -> None:
        """Nothing is slimmed before ``begin``."""
        self.checkpoint = checkpoint
        self.plan = plan
        self.writer = writer
        self.zeros = 0
        """Zeros in what was slimmed since ``begin``."""
        self._sparsity = 0.0
        self._layer = checkpoint.layers[0]
        self._new_index = 0
        self._names: frozenset[str] = frozenset()

    def begin(self, layer: Layer, new_index: int) -> None:
        """What follows is of this layer."""
        self.zeros = 0
        self._layer, self._new_index = layer, new_index
        layer_plan = self.plan.layers[layer.index]
        self._sparsity = layer_plan.sparsity
        found = slimmed_dense(self.checkpoint, layer, layer_plan, self.plan)
        # Shared experts leave with a dropped MoE; the forward does not come to them,
        # but without a forward they would be slimmed.
        gone = self.checkpoint.arch.shared if layer_plan.drops_moe else None
        self._names = frozenset(found) - frozenset(gone.names if gone else ())

    def by_magnitude(self) -> None:
        """Slim all of the layer's matrices in scope without data."""
        for name in sorted(self._names):
            weight_RD = self._read(name)
            self._write(name, magnitude(weight_RD, self._sparsity, self.plan.group))

    def before_attention(
        self, model: StreamingModel, index: int, hidden_STD: torch.Tensor
    ) -> None:
        """Slim the attention by what enters each of its matrices."""
        attention = [
            matrix
            for matrix in dense_matrices(self.checkpoint, self._layer)
            if matrix.part == "attention" and matrix.name in self._names
        ]
        if not attention:
            return
        device = hidden_STD.device
        sums = {one.name: no_sums(one.cols, self.plan, device) for one in attention}

        def see(name: str, x_nD: torch.Tensor) -> None:
            if name in sums:
                add_sums(sums[name], x_nD, self.plan)

        model.watch_attention(index, hidden_STD, see)
        for matrix in attention:
            weight_RD = self._read(matrix.name).to(device)
            found = sums[matrix.name]
            slimmed_RD = slim_matrix(weight_RD, found, self.plan, self._sparsity)
            self._write(matrix.name, slimmed_RD, model)

    def before_mlp(
        self, model: StreamingModel, index: int, part: DensePart, x_ND: torch.Tensor
    ) -> None:
        """Slim an MLP of all tokens."""
        wanted = tuple(name in self._names for name in part.mlp.names)
        if not any(wanted):
            return
        mlp = Expert(*(self._read(name) for name in part.mlp.names))
        token_N = torch.arange(len(x_ND), device=x_ND.device)
        weight_N = torch.ones(len(x_ND), device=x_ND.device)
        slimmed = slim_by_data(
            mlp, self.plan, self._sparsity, x_ND, token_N, weight_N, model.act, wanted
        )
        for name, weight_RD, take in zip(part.mlp.names, slimmed, wanted, strict=True):
            if take:
                self._write(name, weight_RD, model)

    def _read(self, name: str) -> torch.Tensor:
        prefix = self.checkpoint.arch.layer_prefix.format(layer=self._layer.index)
        return read_weight(self.checkpoint, prefix + name)

    def _write(
        self, name: str, weight_RD: torch.Tensor, model: StreamingModel | None = None
    ) -> None:
        """Hand it to the writer, and to the model for the rest of its way."""
        arch = self.checkpoint.arch
        old = arch.layer_prefix.format(layer=self._layer.index) + name
        new = arch.layer_prefix.format(layer=self._new_index) + name
        self.zeros += weight_RD.numel() - int(torch.count_nonzero(weight_RD))
        if model is not None:
            model.replaced[old] = weight_RD
        if self.writer.needs(new):
            data = stored_view(self.checkpoint.tensors[old], weight_RD)
            self.writer.write(new, data)
