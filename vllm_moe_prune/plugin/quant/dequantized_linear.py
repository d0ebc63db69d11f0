"""FP8 linear layers that no kernel of vLLM's runs on this CPU, made plain once loaded.

vLLM's kernels for a scale per block need AMX; for weights alone in FP8 it has none on
CPUs. Exact, and as large in memory as before they were quantized. N outputs, K inputs.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)

from ...checkpoint.block_fp8 import ScaleBlocks
from ...errors import ServeError
from ...kernels.blocks import FP8
from ..compat import is_16_bit

log = logging.getLogger(__name__)

SCALES = ("weight_scale_inv", "weight_scale")
"""What vLLM calls them: in FP8 as DeepSeek has it, and in compressed-tensors."""


class FallbackLinearMethod(LinearMethodBase):
    """vLLM's method where it has a kernel; elsewhere one that makes layers plain."""

    def __init__(self, method: LinearMethodBase) -> None:
        """For a method of vLLM's with a scale per block or per row of FP8."""
        self.method = method

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Let vLLM's method do it, and leave the layer to it if it finds a kernel.

        Raises:
            ValueError: vLLM's: sizes that blocks do not divide into.
        """
        why = "its kernels take 16-bit activations only"
        try:
            self.method.create_weights(
                layer,
                input_size_per_partition,
                output_partition_sizes,
                input_size,
                output_size,
                params_dtype,
                **extra_weight_attrs,
            )
        except ValueError as error:
            # The kernel is chosen last: without weights it was something else.
            if scale_name(layer) is None:
                raise
            why = " ".join(str(error).split())
        else:
            if is_16_bit(params_dtype):
                # From here on vLLM calls its own method; ours is done.
                layer.quant_method = self.method
                return
        warn_once(str(params_dtype).removeprefix("torch."), why)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Become a plain layer."""
        name = scale_name(layer)
        assert name is not None
        weight_NK, scale = layer.weight.data, getattr(layer, name).data
        # Without blocks each row has a scale: blocks of 1 x K.
        blocks = ScaleBlocks(*(layer.weight_block_size or (1, weight_NK.shape[1])))
        plain_NK = blocks.dequantize(weight_NK, scale, layer.params_dtype)
        delattr(layer, name)
        layer.register_parameter("weight", Parameter(plain_NK, requires_grad=False))
        layer.quant_method = UnquantizedLinearMethod()
        # vLLM's pass over the layers called the old method; this one is ours to call.
        layer.quant_method.process_weights_after_loading(layer)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Never called: the method is replaced once weights are there."""
        raise ServeError(f"{layer.prefix}: has no weights yet.")


def scale_name(layer: LinearBase) -> str | None:
    """What the scales of a layer of FP8 are called; None: they are not there."""
    if getattr(layer, "weight", None) is None or layer.weight.dtype != FP8:
        return None
    return next((name for name in SCALES if hasattr(layer, name)), None)


@cache
def warn_once(dtype: str, why: str) -> None:
    """Say what it costs, not for every layer."""
    log.warning(
        "No kernel runs FP8 linear layers on this CPU (vLLM: %s). They are dequantized "
        "while loading, and take as much memory as %s ones.",
        why,
        dtype,
    )
