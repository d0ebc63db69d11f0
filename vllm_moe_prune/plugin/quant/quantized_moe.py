"""Who runs what compressed-tensors quantized on a CPU: vLLM, or this package.

vLLM's fused kernels for quantized experts on CPUs need AMX, 16-bit activations and a
router they know, know neither zero points nor int4 in groups of 32, and leave out no
expert of another process. Where they do not fit, vLLM stops. Here int4 and int8 experts
then stay as they are and run by our kernel (``integer_moe.py``); others are turned into
the model's dtype while they load (``dequantized_moe.py``), as are linear layers in FP8
(``dequantized_linear.py``). Linear layers in int4 and int8 run by our kernel where
there is no AMX (``integer_linear.py``). On GPUs all is vLLM's.
"""

import logging
from functools import partial
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Fp8,
    CompressedTensorsW8A16Fp8,
)
from vllm.platforms import current_platform

from ...checkpoint.module_names import CONFIG_KEY
from ...checkpoint.quantized_tensors import read_form
from ...errors import ServeError
from ..compat import chosen_experts
from . import activations, integer_linear, integer_moe
from .dequantized_linear import FallbackLinearMethod
from .dequantized_moe import DequantizingMethod
from .integer_linear import IntegerLinearMethod
from .integer_moe import IntegerMethod

log = logging.getLogger(__name__)


class FallbackConfig(CompressedTensorsConfig):
    """vLLM's configuration of compressed-tensors that on CPUs serves all layers."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """vLLM's choice; on a CPU, for what it has no kernel for, ours.

        Raises:
            ServeError: Nobody has one.
        """
        choose = partial(super().get_quant_method, layer, prefix)
        if not current_platform.is_cpu():
            return choose()
        if not isinstance(layer, RoutedExperts):
            return self._linear(layer, prefix, choose())
        method, why = chosen_experts(choose, layer)
        if method is not None:
            return method
        form = read_form({CONFIG_KEY: self.config}, prefix)
        if form is None:
            raise ServeError(f"{prefix}: vLLM cannot serve it on this CPU: {why}")
        if integer_moe.fits(layer.moe_config, form):
            log.debug(
                "%s: %s experts run by our kernel (vLLM: %s)", prefix, form.bits, why
            )
            dtype = layer.moe_config.in_dtype
            rounded = activations.are_rounded(get_current_vllm_config(), dtype)
            return IntegerMethod(layer.moe_config, form, rounded=rounded)
        log.warning(
            "%s: no kernel runs %s experts on this CPU (vLLM: %s). They are "
            "dequantized while loading, and take as much memory as %s ones.",
            prefix,
            form.bits,
            why,
            str(layer.moe_config.in_dtype).removeprefix("torch."),
        )
        return DequantizingMethod(layer.moe_config, form)

    def _linear(self, layer: torch.nn.Module, prefix: str, method: Any) -> Any:
        """The method of a linear layer, the head among them, or of another one."""
        if type(method) is not CompressedTensorsLinearMethod:
            return method
        if _is_fp8(layer, method):
            return FallbackLinearMethod(method)
        vllm_config = get_current_vllm_config()
        dtype = vllm_config.model_config.dtype
        form = read_form({CONFIG_KEY: self.config}, prefix)
        if form is None or not integer_linear.fits(form, dtype):
            return method
        rounded = activations.are_rounded(vllm_config, dtype)
        return IntegerLinearMethod(method, form, rounded=rounded)


def _is_fp8(layer: torch.nn.Module, method: Any) -> bool:
    """Whether a method is for weights in FP8 with a scale per block or row."""
    schemes = (CompressedTensorsW8A8Fp8, CompressedTensorsW8A16Fp8)
    return isinstance(layer.scheme, schemes) and layer.scheme.strategy in (
        "block",
        "channel",
    )
