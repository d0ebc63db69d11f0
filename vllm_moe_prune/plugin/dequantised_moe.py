"""Routed experts in a quantised form that vLLM has no kernel for on this machine.

vLLM's fused kernels for quantised experts on CPUs need AMX, 16-bit activations and a
router they know, and know neither zero points nor int4 in groups of 32. Where they do
not fit, vLLM stops. Here experts are then turned into the model's own dtype while they
load and run by vLLM's plain kernel: exact, and as large in memory as before. On GPUs,
and wherever a kernel fits, everything is vLLM's. D hidden, F width.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
    CompressedTensorsConfig,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from ..checkpoint.quantised import CONFIG_KEY, read_form
from ..errors import CheckpointError, ServeError
from ..kernels.quantised import Form, dequantise, unpack
from .arriving import ArrivingExperts

log = logging.getLogger(__name__)

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class FallbackConfig(CompressedTensorsConfig):
    """vLLM's configuration of compressed-tensors that on CPUs serves all experts."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """vLLM's choice; for experts on a CPU that it has no kernel for, ours."""
        if not isinstance(layer, RoutedExperts) or not current_platform.is_cpu():
            return super().get_quant_method(layer, prefix)
        why = "its kernels take 16-bit activations only"
        if layer.moe_config.in_dtype in SIXTEEN_BITS:
            try:
                return super().get_quant_method(layer, prefix)
            # What its choosers raise where no kernel fits.
            except (NotImplementedError, ValueError) as error:
                why = str(error)
        form = read_form({CONFIG_KEY: self.config}, prefix)
        if form is None:
            raise ServeError(f"{prefix}: vLLM cannot serve it on this CPU: {why}")
        log.warning(
            "%s: no kernel of vLLM's runs %s experts on this CPU (%s). They are "
            "dequantised while loading, and take as much memory as %s ones.",
            prefix,
            form.bits,
            why,
            str(layer.moe_config.in_dtype).removeprefix("torch."),
        )
        return DequantisingMethod(layer.moe_config, form)


class DequantisingMethod(FusedMoEMethodBase):
    """Collects the parts of expert matrices, and leaves plain experts behind."""

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
        """Empty parameters under the names of the parts, and room for dense experts."""
        width = intermediate_size_per_partition
        loader = _Loader(
            layer, self.form, num_experts, hidden_size, width, params_dtype
        )
        layer.moe_prune_loader = loader
        for matrix in ("w13", "w2"):
            for part in self._suffixes:
                parameter = Parameter(torch.empty(0), requires_grad=False)
                set_weight_attrs(parameter, {"weight_loader": loader.load})
                layer.register_parameter(f"{matrix}_{part}", parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Become a layer of plain experts.

        Raises:
            ServeError: An expert of this process was not loaded.
        """
        loader: _Loader = layer.moe_prune_loader
        loader.check_finished()
        del layer.moe_prune_loader
        for matrix, dense in (("w13", loader.w13_E2FD), ("w2", loader.w2_EDF)):
            for part in self._suffixes:
                delattr(layer, f"{matrix}_{part}")
            parameter = Parameter(dense, requires_grad=False)
            layer.register_parameter(f"{matrix}_weight", parameter)
        method = UnquantizedFusedMoEMethod(self.moe)
        layer._replace_quant_method(method)
        method.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """Nothing is quantised any more once it runs."""
        return FusedMoEQuantConfig.make()

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


class _Loader(ArrivingExperts):
    """Dequantises matrices as soon as their parts are there."""

    def __init__(
        self,
        layer: Any,
        form: Form,
        experts: int,
        hidden: int,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(layer, experts=experts, hidden=hidden, width=width)
        self._form = form
        self._missing = {
            (expert, shard) for expert in range(experts) for shard in ("w1", "w2", "w3")
        }
        self.w13_E2FD = torch.empty(experts, 2 * width, hidden, dtype=dtype)
        self.w2_EDF = torch.empty(experts, hidden, width, dtype=dtype)

    def take(
        self, local: int, shard_id: str, name: str, tensor: Tensor, where: str
    ) -> None:
        """One part of a matrix.

        Raises:
            CheckpointError: The tensor has another shape than its form says.
        """
        wanted = self._form.parts(*self.whole_shape(shard_id), "BF16")
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
            self._place(local, shard_id, self._parts.pop((local, shard_id)))

    def _place(self, local: int, shard_id: str, parts: dict[str, Tensor]) -> None:
        dense = dequantise(unpack(parts, self._form), self._form, self.w2_EDF.dtype)
        own = self.own(shard_id, dense)
        if shard_id == "w2":
            self.w2_EDF[local] = own
        else:
            at = 0 if shard_id == "w1" else self.width
            self.w13_E2FD[local, at : at + self.width] = own
        self._missing.discard((local, shard_id))

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
