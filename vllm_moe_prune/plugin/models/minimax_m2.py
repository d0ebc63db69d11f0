"""Pruned MiniMax-M2: vLLM's, built with a configuration per layer."""

from collections.abc import Iterable, Iterator

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.minimax_m2 import MiniMaxM2ForCausalLM, MiniMaxM2MoE

from ...archs.minimax_m2 import ARCH
from ..load.load_check import first_load_check, load_counted
from ..load.packed import one_by_one
from ..load.resolve_layers import read_layers
from .per_layer import per_layer

Weights = Iterable[tuple[str, torch.Tensor]]


class MoePruneMiniMaxM2ForCausalLM(MiniMaxM2ForCausalLM):
    """MiniMaxM2ForCausalLM for checkpoints pruned by this package."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Like ``MiniMaxM2ForCausalLM``, after the checkpoint has been verified."""
        layers = read_layers(vllm_config, ARCH)
        with per_layer(MiniMaxM2MoE, layers, ARCH, vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.load_check = first_load_check(ARCH, layers, vllm_config)

    def load_weights(self, weights: Weights) -> set[str]:
        """Load; the first time, demand every expert exactly once."""
        load = super().load_weights
        return load_counted(self, lambda each: load(_as_in_vllm(each)), weights)


def _as_in_vllm(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in one_by_one(weights, "w1", "w3", "w2"):
        yield name.replace(".mlp.", ".block_sparse_moe."), tensor
