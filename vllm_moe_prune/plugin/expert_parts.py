"""Experts whose matrices come in several parts, such as integers and their scales.

vLLM's layer gets an empty parameter for each part; the loader behind them collects the
parts of a matrix and makes something of it once all are there. D hidden, F width.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.utils import set_weight_attrs

from ..errors import CheckpointError, ServeError
from ..kernels.quantised import Form
from .arriving import ArrivingExperts


class PartsLoader(ArrivingExperts):
    """Collects the parts of each matrix."""

    def __init__(
        self, layer: Any, form: Form, *, experts: int, hidden: int, width: int
    ) -> None:
        """For a layer of vLLM's; sizes as ``ArrivingExperts`` has them.

        Args:
            layer: The layer.
            form: Says which parts there are.
            experts: Of this process.
            hidden: D.
            width: The part of F of this process.
        """
        super().__init__(layer, experts=experts, hidden=hidden, width=width)
        self.form = form
        self._missing = {
            (expert, shard) for expert in range(experts) for shard in ("w1", "w2", "w3")
        }

    def take(
        self, local: int, shard_id: str, name: str, tensor: Tensor, where: str
    ) -> None:
        """One part of a matrix.

        Raises:
            CheckpointError: The tensor has another shape than its form says.
        """
        wanted = self.form.parts(*self.whole_shape(shard_id), "BF16")
        parts = self._parts.setdefault((local, shard_id), {})
        part = next(part for part in wanted if name.endswith(f"_{part}"))
        if tuple(tensor.shape) != wanted[part][1]:
            raise CheckpointError(
                f"{where}: has shape {list(tensor.shape)}, expected "
                f"{list(wanted[part][1])}."
            )
        # A copy: what vLLM hands over may be a view into a file that it will close.
        parts[part] = tensor.cpu().clone()
        if len(parts) == len(wanted):
            self.place(local, shard_id, self._parts.pop((local, shard_id)))
            self._missing.discard((local, shard_id))

    @abstractmethod
    def place(self, local: int, shard_id: str, parts: dict[str, Tensor]) -> None:
        """A whole matrix of an expert of this process has come."""

    def check_finished(self) -> None:
        """Refuse if something did not arrive.

        Raises:
            ServeError: Naming an expert of this process.
        """
        if self._missing:
            expert, shard = min(self._missing)
            raise ServeError(
                f"{self._layer.layer_name}: expert {expert} ({shard}) did not arrive "
                f"({len(self._missing)} such matrices)."
            )


class PartsMethod(FusedMoEMethodBase):
    """What methods have in common whose experts come in parts."""

    loader_class: type[PartsLoader]

    def __init__(self, moe: FusedMoEConfig, form: Form) -> None:
        """For experts that are all stored in one form."""
        super().__init__(moe)
        self.form = form
        self._suffixes = tuple(form.parts(8, 8, "BF16"))  # whatever the sizes

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters under the names of the parts."""
        loader = self.loader_class(
            layer,
            self.form,
            experts=num_experts,
            hidden=hidden_size,
            width=intermediate_size_per_partition,
        )
        layer.moe_prune_loader = loader
        for matrix in ("w13", "w2"):
            for part in self._suffixes:
                parameter = Parameter(torch.empty(0), requires_grad=False)
                set_weight_attrs(parameter, {"weight_loader": loader.load})
                layer.register_parameter(f"{matrix}_{part}", parameter)

    def taken(self, layer: RoutedExperts) -> Any:
        """The loader, which has everything; layer and parameters are rid of it.

        Raises:
            ServeError: An expert of this process was not loaded.
        """
        loader = layer.moe_prune_loader
        loader.check_finished()
        del layer.moe_prune_loader
        for matrix in ("w13", "w2"):
            for part in self._suffixes:
                delattr(layer, f"{matrix}_{part}")
        return loader

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """None of vLLM's: what runs is not its kernel for quantised experts."""
        return FusedMoEQuantConfig.make()
