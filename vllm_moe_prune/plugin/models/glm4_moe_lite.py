"""Pruned GLM-4.7-Flash: vLLM's, built with a configuration per layer."""

from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.glm4_moe_lite import (
    Glm4MoeLite,
    Glm4MoeLiteForCausalLM,
)

from ...archs.glm4_moe_lite import ARCH
from ..load.load_check import first_load_check, load_counted
from ..load.packed import one_by_one
from ..load.resolve_layers import read_layers
from .per_layer import per_layer


class MoePruneGlm4MoeLiteForCausalLM(Glm4MoeLiteForCausalLM):
    """Glm4MoeLiteForCausalLM for checkpoints pruned by this package."""

    # A dict of its own: the constructor adds to it, which vLLM's must not see.
    packed_modules_mapping: dict[str, list[str]] = {  # noqa: RUF012
        "gate_up_proj": ["gate_proj", "up_proj"]
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Like ``Glm4MoeLiteForCausalLM``, after the checkpoint has been verified."""
        layers = read_layers(vllm_config, ARCH)
        with per_layer(Glm4MoeLite, layers, ARCH, vllm_config):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Those that are left, not those config.json counts.
        self.num_moe_layers = len(self.moe_layers)
        self.load_check = first_load_check(ARCH, layers, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load; the first time, demand every expert exactly once."""
        load = super().load_weights
        names = ("gate_proj", "up_proj", "down_proj")
        return load_counted(self, lambda each: load(one_by_one(each, *names)), weights)
