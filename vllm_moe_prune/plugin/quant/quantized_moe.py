"""Who runs quantized experts on a CPU: vLLM, or this package.

vLLM's fused kernels for quantized experts on CPUs need AMX, 16-bit activations and a
router they know, know neither zero points nor int4 in groups of 32, and leave out no
expert of another process. Where they do not fit, vLLM stops. Here int4 and int8 experts
then stay as they are and run by our kernel (``integer_moe.py``); others are turned into
the model's dtype while they load (``dequantized_moe.py``). On GPUs all is vLLM's.
"""

import logging
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (  # noqa: E501
    CompressedTensorsConfig,
)
from vllm.platforms import current_platform

from ...checkpoint.module_names import CONFIG_KEY
from ...checkpoint.quantized_tensors import read_form
from ...errors import ServeError
from ..compat import chosen_experts
from . import integer_moe
from .dequantized_moe import DequantizingMethod
from .integer_moe import IntegerMethod

log = logging.getLogger(__name__)

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class FallbackConfig(CompressedTensorsConfig):
    """vLLM's configuration of compressed-tensors that on CPUs serves all experts."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """vLLM's choice; for experts on a CPU that it has no kernel for, ours."""
        if not isinstance(layer, RoutedExperts) or not current_platform.is_cpu():
            return super().get_quant_method(layer, prefix)
        method, why = chosen_experts(partial(super().get_quant_method, layer, prefix))
        if method is not None:
            refusal = _refusal(method, layer)
            if refusal is None:
                return method
            why = refusal
        form = read_form({CONFIG_KEY: self.config}, prefix)
        if form is None:
            raise ServeError(f"{prefix}: vLLM cannot serve it on this CPU: {why}")
        if integer_moe.fits(layer.moe_config, form):
            log.debug(
                "%s: %s experts run by our kernel (vLLM: %s)", prefix, form.bits, why
            )
            return IntegerMethod(layer.moe_config, form)
        log.warning(
            "%s: no kernel runs %s experts on this CPU (vLLM: %s). They are "
            "dequantized while loading, and take as much memory as %s ones.",
            prefix,
            form.bits,
            why,
            str(layer.moe_config.in_dtype).removeprefix("torch."),
        )
        return DequantizingMethod(layer.moe_config, form)


def _refusal(method: Any, layer: RoutedExperts) -> str | None:
    """Why the method that vLLM chose on a CPU cannot run a layer; None: it can."""
    if isinstance(method, UnquantizedFusedMoEMethod):  # the experts are ignored
        return None
    if layer.use_ep:
        return "its kernels know all experts or none"
    if layer.moe_config.in_dtype not in SIXTEEN_BITS:
        return "its kernels take 16-bit activations only"
    return None
