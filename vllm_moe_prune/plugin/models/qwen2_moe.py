"""Pruned Qwen1.5-MoE and Qwen2-MoE: vLLM's, built with a configuration per layer."""

from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_moe import (
    Qwen2MoeForCausalLM,
    Qwen2MoeSparseMoeBlock,
)

from ...archs.qwen2_moe import ARCH
from ..load.load_check import first_load_check, load_counted
from ..load.packed import one_by_one
from ..load.resolve_layers import read_layers
from .per_layer import per_layer


class MoePruneQwen2MoeForCausalLM(Qwen2MoeForCausalLM):
    """Qwen2MoeForCausalLM for checkpoints pruned by this package."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Like ``Qwen2MoeForCausalLM``, after the checkpoint has been verified."""
        layers = read_layers(vllm_config, ARCH)
        with per_layer(Qwen2MoeSparseMoeBlock, layers, ARCH, vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.load_check = first_load_check(ARCH, layers, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load; the first time, demand every expert exactly once."""
        load = super().load_weights
        names = ("gate_proj", "up_proj", "down_proj")
        return load_counted(self, lambda each: load(one_by_one(each, *names)), weights)
