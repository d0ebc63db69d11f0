"""The demonstration models: their configurations, and how long each is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import corpus
from arctic_model import ArcticConfig
from training_text import SPECIAL_IDS, VOCABULARY
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    PreTrainedConfig,
)

#: The same in every family.
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    **SPECIAL_IDS,
}

MIXTRAL = COMMON | {
    "intermediate_size": 128,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.01,
}


def mixtral() -> PreTrainedConfig:
    """Sixteen experts of which two are used, in four layers.

    Head size 32 is the smallest that vLLM's processor backend takes; two key
    heads and widths of 128 leave room for two tensor-parallel ranks and for
    block-wise quantization.
    """
    return MixtralConfig(**MIXTRAL)


def arctic() -> PreTrainedConfig:
    """Mixtral's sizes, with Arctic's residual MLP beside the experts."""
    return ArcticConfig(**MIXTRAL)


#: The same in every DeepSeek: a dense layer, then layers of 24 experts in 4 groups,
#: of which the best 2 are chosen from, and an expert that every token uses. The latent
#: sizes of MLA are the published ones, as vLLM's processor backend knows no others.
DEEPSEEK = COMMON | {
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 24,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}


def deepseek_v2() -> PreTrainedConfig:
    """Softmax scores; a group is as good as its best expert."""
    return DeepseekV2Config(
        **DEEPSEEK,
        topk_method="group_limited_greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=4.0,
    )


def deepseek_v3() -> PreTrainedConfig:
    """Sigmoid scores with a bias that balances the load; latent queries too."""
    return DeepseekV3Config(
        **{**DEEPSEEK, "q_lora_rank": 64},
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=0,
    )


#: A family is added here, with one function that makes its configuration.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": mixtral,
    "arctic": arctic,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
}


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train."""

    seed: int = 1
    steps: int = 700
    batch_tokens: int = 4096
    window: int = 256
    long_window: int = 1024
    long_share: float = 0.15
    learning_rate: float = 4e-3
    warmup: int = 100
    balance: float = 0.01
    z_loss: float = 1e-4
    bias_step: float = 2e-3
    hold: float = 0.0
    result_weight: float = 1.0
    mixture: dict[str, float] = field(default_factory=lambda: corpus.MIXTURE)

    def window_at(self, step: int) -> int:
        """Short windows first, as they are cheap; long ones for the last part."""
        late = step >= self.steps * (1 - self.long_share)
        return self.long_window if late else self.window

    def rate_at(self, step: int) -> float:
        """Linear warm-up, constant for ``hold`` of the steps, cosine to a hundredth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        falls_at = max(self.warmup, round(self.steps * self.hold))
        done = max(step - falls_at, 0) / (self.steps - falls_at)
        return self.learning_rate * (0.01 + 0.495 * (1 + math.cos(math.pi * done)))


#: The demo Mixtral shall add, so it sees more sums and is told to care for results.
RECIPES: dict[str, Recipe] = {
    "mixtral": Recipe(
        steps=4200,
        batch_tokens=2048,
        window=128,
        learning_rate=3e-3,
        hold=0.6,
        result_weight=3.0,
        mixture={
            "python": 0.14,
            "prose": 0.18,
            "licence": 0.08,
            "arithmetic": 0.12,
            "chat": 0.48,
        },
    ),
}
