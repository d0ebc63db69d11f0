"""Experts whose matrices come in several parts, such as integers and their scales.

The loader collects the parts of a matrix and makes something of it once all are there.
D hidden, F width.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from ...errors import CheckpointError, ServeError
from ...kernels.quantized import Form
from .expert_loader_base import ExpertLoaderBase, ExpertMethodBase


class PartsLoader(ExpertLoaderBase):
    """Collects the parts of each matrix."""

    def __init__(
        self, layer: Any, form: Form, *, experts: int, hidden: int, width: int
    ) -> None:
        """For a layer of vLLM's; sizes as ``ExpertLoaderBase`` has them.

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
        # Only shapes are compared here: scales come in any float dtype.
        wanted = self.form.parts(*self.whole_shape(shard_id), "BF16")
        parts = self._parts.setdefault((local, shard_id), {})
        # Unambiguous: `_weight` is no ending of `_weight_scale`.
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


class PartsMethod(ExpertMethodBase):
    """What methods have in common whose experts come in parts."""

    loader_class: type[PartsLoader]

    def __init__(self, moe: FusedMoEConfig, form: Form) -> None:
        """For experts that are all stored in one form."""
        super().__init__(moe)
        self.form = form
        self._parts = tuple(form.parts(8, 8, "BF16"))  # whatever the sizes

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
        self.expect(layer, loader, dict.fromkeys(self._parts, params_dtype))

    def taken(self, layer: RoutedExperts) -> Any:
        """The loader, which has everything; layer and parameters are rid of it.

        Raises:
            ServeError: An expert of this process was not loaded.
        """
        loader = layer.moe_prune_loader
        loader.check_finished()
        self.release(layer, self._parts)
        return loader
