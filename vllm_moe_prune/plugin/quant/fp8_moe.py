"""vLLM's FP8 with a scale per block, on any CPU.

vLLM's kernels for it need AMX there, and those for experts a router and sizes that they
know. Elsewhere experts run by our kernel, FP8 as they are (``sparse_moe.py``), and
linear layers are dequantized while loading (``dequantized_linear.py``).
"""

import logging
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod

from ...checkpoint.block_fp8 import ScaleBlocks
from ...errors import ServeError
from ..compat import chosen_experts
from .dequantized_linear import FallbackLinearMethod
from .sparse_moe import SparseMoEMethod

log = logging.getLogger(__name__)


class FallbackFp8Config(Fp8Config):
    """vLLM's configuration of FP8; used on CPUs only."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Those of vLLM, and what everything is dequantized to where it has none."""
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """vLLM's choice; for what it has no kernel for, ours.

        Raises:
            ServeError: Nobody has one.
        """
        choose = partial(super().get_quant_method, layer, prefix)
        if not isinstance(layer, RoutedExperts):
            method = choose()
            # Scales of whole tensors are left to vLLM, kernel or not.
            blocked = isinstance(method, Fp8LinearMethod) and self.weight_block_size
            return FallbackLinearMethod(method) if blocked else method
        method, why = chosen_experts(choose, layer)
        if method is not None:
            return method
        if self.weight_block_size is None:
            raise ServeError(
                f"{prefix}: vLLM has no kernel for FP8 experts with one scale each on "
                f"this CPU: {why}"
            )
        log.debug("%s: run by our kernel (vLLM: %s)", prefix, why)
        return SparseMoEMethod(layer.moe_config, ScaleBlocks(*self.weight_block_size))
