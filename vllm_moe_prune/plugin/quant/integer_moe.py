"""Routed experts in int4 or int8 on CPUs, by the kernel of this package.

They stay integers in memory, tokens are rounded to int8 or stay as they are
(``activations.py``), and a process may have any part of the experts or of their width.
D hidden, F width.
"""

from math import gcd
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig

from ...errors import ServeError
from ...kernels import cpu_library, int_blocks
from ...kernels.int_blocks import IntBlocks, Integers
from ...kernels.quantized import PACKED, PLAIN, SCALE, Form, zeros_of
from .activations import dots_for
from .expert_parts import PartsLoader, PartsMethod
from .integer_op import integer_moe


def fits(moe: FusedMoEConfig, form: Form) -> bool:
    """Whether this kernel runs such experts here."""
    width = moe.intermediate_size_per_partition
    bits = {"int4": 4, "int8": 8}.get(form.bits)
    return (
        bits is not None
        and cpu_library.runs_integers()
        and moe.activation == MoEActivation.SILU
        and (moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta) == (None, None, None)
        and not moe.has_bias
        # Words and groups of a width that several processes share end with its parts.
        and width % 8 == 0
        and (form.group_size or 2) % 2 == 0
    )


class IntegerLoader(PartsLoader):
    """Makes blocks of an expert's matrices as soon as their parts are there."""

    def __init__(self, layer: Any, form: Form, **sizes: int) -> None:
        super().__init__(layer, form, **sizes)
        self.bits = 4 if form.bits == "int4" else 8
        self._held: dict[tuple[int, str], Integers] = {}
        self.w13: dict[int, IntBlocks] = {}
        self.w2: dict[int, IntBlocks] = {}

    def place(self, local: int, shard_id: str, parts: dict[str, Tensor]) -> None:
        """One matrix, whole."""
        matrix = integers_of(parts, self.form)
        if shard_id == "w2":
            # Columns cut through words and groups; gate and up are split by whole rows.
            own, group = self._columns(matrix)
            self.w2[local] = int_blocks.encode([own], group, self.bits)
            return
        zeros = matrix.zeros_NG
        self._held[local, shard_id] = Integers(
            self.own(shard_id, matrix.words_NW),
            self.own(shard_id, matrix.scales_NG),
            None if zeros is None else self.own(shard_id, zeros),
        )
        if (local, "w1") in self._held and (local, "w3") in self._held:
            gate_up = [self._held.pop((local, shard)) for shard in ("w1", "w3")]
            # Without groups a row has one scale.
            group = self.form.group_size or self.hidden
            self.w13[local] = int_blocks.encode(gate_up, group, self.bits)

    def _columns(self, matrix: Integers) -> tuple[Integers, int]:
        """The inputs of down that are this process's, and how many share a scale."""
        whole = self.width * self._parallel.tp_size
        group = min(self.form.group_size or whole, whole)
        if self._parallel.tp_size == 1:
            return matrix, group
        # Scales are repeated where a group goes on in another process.
        part = gcd(group, self.width)
        start, width = self._parallel.tp_rank * self.width, self.width

        def cut(shared_NG: Tensor) -> Tensor:
            spread = shared_NG.repeat_interleave(group // part, 1)
            return spread[:, start // part : (start + width) // part]

        word = 32 // self.bits
        words_NW = matrix.words_NW[:, start // word : (start + width) // word]
        zeros = None if matrix.zeros_NG is None else cut(matrix.zeros_NG)
        return Integers(words_NW, cut(matrix.scales_NG), zeros), part


def integers_of(parts: dict[str, Tensor], form: Form) -> Integers:
    """A matrix from the tensors that store it."""
    return Integers(_words(parts, form), parts[SCALE], zeros_of(parts, form))


def _words(parts: dict[str, Tensor], form: Form) -> Tensor:
    """Rows of 32-bit words [N, W]."""
    if form.bits == "int4":
        return parts[PACKED]
    values_NK = parts[PLAIN]
    # Four bytes as they lie make a word: the first has the lowest bits (little-endian).
    pad = -values_NK.shape[1] % 4
    return torch.nn.functional.pad(values_NK, (0, pad)).contiguous().view(torch.int32)


class IntegerMethod(PartsMethod):
    """Routed experts as blocks of integers; one custom op runs a layer."""

    loader_class = IntegerLoader

    def __init__(self, moe: FusedMoEConfig, form: Form, *, rounded: bool) -> None:
        """For experts that are all stored in one form, and tokens rounded or exact."""
        super().__init__(moe, form)
        self.rounded = rounded

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Take over what the loader encoded.

        Raises:
            ServeError: An expert of this process was not loaded.
        """
        loader: IntegerLoader = self.taken(layer)
        experts = range(len(loader.w13))
        groups = []
        for name, found in (("w13", loader.w13), ("w2", loader.w2)):
            joined = int_blocks.join([found.pop(expert) for expert in experts])
            groups.append(joined.group)
            parts = {
                "values": joined.values_EBWO,
                "scales": joined.scales_EBGO,
                "zeros": joined.zeros_EBGO,
            }
            for part, tensor in parts.items():
                layer.register_buffer(f"{name}_{part}", tensor, persistent=False)
        layer.moe_prune_bits, layer.moe_prune_width = loader.bits, loader.width
        layer.moe_prune_dots = dots_for(tuple(groups), rounded=self.rounded)

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Run the layer [T, D]; the runner adds shared experts and other processes."""
        if layer.apply_router_weight_on_input:
            raise ServeError(
                "routing weights on the input of quantized experts are not supported "
                "on CPUs."
            )
        return integer_moe(
            *(x, topk_weights, topk_ids, layer.expert_map),
            *(layer.w13_values, layer.w13_scales, layer.w13_zeros),
            *(layer.w2_values, layer.w2_scales, layer.w2_zeros),
            *(layer.moe_prune_bits, layer.moe_prune_width, layer.moe_prune_dots),
        )
