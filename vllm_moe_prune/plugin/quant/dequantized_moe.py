"""Quantized routed experts that no kernel runs, made plain ones while they load.

Exact, and as large in memory as before they were quantized. D hidden, F width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from ...errors import ServeError
from ...kernels.quantized import Form, dequantize, unpack
from .expert_parts import PartsLoader, PartsMethod


class DequantizingLoader(PartsLoader):
    """Dequantizes matrices as soon as their parts are there."""

    def __init__(self, layer: Any, form: Form, **sizes: int) -> None:
        super().__init__(layer, form, **sizes)
        dtype: torch.dtype = layer.moe_config.in_dtype
        experts, hidden, width = self._experts, self.hidden, self.width
        # Allocated whole: matrices come in any order, and each has its place.
        self.w13_E2FD = torch.empty(
            experts, 2 * width, hidden, dtype=dtype, device=torch.get_default_device()
        )
        self.w2_EDF = torch.empty(
            experts, hidden, width, dtype=dtype, device=torch.get_default_device()
        )

    def place(self, local: int, shard_id: str, parts: dict[str, Tensor]) -> None:
        """One matrix, whole."""
        dense = dequantize(unpack(parts, self.form), self.form, self.w2_EDF.dtype)
        own = self.own(shard_id, dense)
        if shard_id == "w2":
            self.w2_EDF[local] = own
        else:
            # Gate above up, as the fused kernels read them.
            at = 0 if shard_id == "w1" else self.width
            self.w13_E2FD[local, at : at + self.width] = own


class DequantizingMethod(PartsMethod):
    """Collects the parts of expert matrices, and leaves plain experts behind."""

    loader_class = DequantizingLoader

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Become a layer of plain experts.

        Raises:
            ServeError: An expert of this process was not loaded.
        """
        loader: DequantizingLoader = self.taken(layer)
        for matrix, dense in (("w13", loader.w13_E2FD), ("w2", loader.w2_EDF)):
            parameter = Parameter(dense, requires_grad=False)
            layer.register_parameter(f"{matrix}_weight", parameter)
        method = UnquantizedFusedMoEMethod(self.moe)
        layer._replace_quant_method(method)
        method.process_weights_after_loading(layer)

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Never called: the method is replaced once weights are there."""
        raise ServeError(f"{layer.layer_name}: has no weights yet.")
