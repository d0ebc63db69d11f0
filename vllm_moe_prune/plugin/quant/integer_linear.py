"""Linear layers in int4 or int8 on CPUs without AMX, by the kernel of this package.

vLLM's int4 kernel for such processors widens every weight and is slower than bf16. Its
methods create and load the parameters, merged and split between processes as for any
kernel; here they become blocks afterwards. The output head is such a layer too.
N outputs, K inputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase

from ...kernels import cpu_linear, int_blocks
from ...kernels.int_blocks import IntBlocks
from ...kernels.quantized import PLAIN, SCALE, ZERO, Form
from ..compat import has_amx, is_16_bit
from .activations import dots_for
from .integer_moe import integers_of
from .sparse_op import LIBRARY, NAMESPACE

LIBRARY.define(  # type: ignore[no-untyped-call]
    "integer_linear(Tensor x, Tensor values, Tensor scales, Tensor? zeros, int bits, "
    "int outputs, int dots) -> Tensor"
)


def _on_cpu(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    outputs: int,
    dots: int,
) -> Tensor:
    blocks = IntBlocks(values, scales, zeros, bits)
    out_TN = cpu_linear.linear(x.flatten(0, -2), blocks, outputs, dots=dots)
    return out_TN.view(*x.shape[:-1], outputs)


def _fake(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    outputs: int,
    dots: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


torch.library.impl(f"{NAMESPACE}::integer_linear", "CPU", _on_cpu, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::integer_linear", _fake, lib=LIBRARY)
integer_linear = torch.ops.vllm_moe_prune.integer_linear.default


def fits(form: Form, dtype: torch.dtype) -> bool:
    """Whether this kernel runs such layers here, rather than vLLM's."""
    return (
        form.bits in ("int4", "int8")
        and cpu_linear.runs_linear()
        # vLLM's take 16 bits only; with AMX they are the fast ones.
        and not (has_amx() and is_16_bit(dtype))
    )


class IntegerLinearMethod(LinearMethodBase):
    """Weights as blocks of integers; one custom op runs a layer."""

    def __init__(self, method: LinearMethodBase, form: Form, *, rounded: bool) -> None:
        """For vLLM's method of such layers; tokens are rounded to int8, or exact."""
        self.method, self.form, self.rounded = method, form, rounded

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **more: Any) -> None:
        """As vLLM's method does."""
        self.method.create_weights(layer, *sizes, **more)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Put blocks in the place of what was loaded, under the same names."""
        names = tuple(self.form.parts(8, 8, "BF16"))
        parts = {
            name: getattr(layer, name).data for name in names if hasattr(layer, name)
        }
        values = names[0]
        if values == PLAIN:
            scales_NG = parts[SCALE].view(len(parts[PLAIN]), -1)
            parts[SCALE] = scales_NG
        matrix = integers_of(parts, self.form)
        bits = 4 if self.form.bits == "int4" else 8
        outputs, words = matrix.words_NW.shape
        group = self.form.group_size or words * 32 // bits
        blocks = int_blocks.encode([matrix], group, bits)
        held = {
            values: blocks.values_EBWO,
            SCALE: blocks.scales_EBGO,
            ZERO: blocks.zeros_EBGO,
        }
        for name in (*names, "azp_adj", "input_scale", "input_zero_point"):
            if hasattr(layer, name):
                delattr(layer, name)
        for name, tensor in held.items():
            kept = None if tensor is None else Parameter(tensor, requires_grad=False)
            layer.register_parameter(name, kept)
        self.values, self.bits, self.outputs = values, bits, outputs
        self.dots = dots_for((blocks.group,), rounded=self.rounded)

    def apply(
        self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Run the layer [..., N]."""
        out = integer_linear(
            *(x, getattr(layer, self.values), layer.weight_scale),
            *(layer.weight_zero_point, self.bits, self.outputs, self.dots),
        )
        return out if bias is None else out + bias
