"""Qwen1.5-MoE and Qwen2-57B-A14B: a shared expert, weighed token by token."""

from dataclasses import replace

from .qwen3_moe import ARCH as QWEN3_MOE
from .spec import ConfigKeys, GatedMlp, Key

HF = "transformers.models.qwen2_moe."

ARCH = replace(
    QWEN3_MOE,
    model_type="qwen2_moe",
    checkpoints="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    stock_architecture="Qwen2MoeForCausalLM",
    pruned_architecture="MoePruneQwen2MoeForCausalLM",
    config=ConfigKeys(
        experts="num_experts",
        top_k="num_experts_per_tok",
        width="moe_intermediate_size",
    ),
    shared=GatedMlp("mlp.shared_expert.", weighed_by="mlp.shared_expert_gate"),
    shared_width=Key("shared_expert_intermediate_size", 5632),
    # vLLM looks at no window; without one, all attention is alike.
    slides=False,
    empty_lists=("mlp_only_layers", "use_sliding_window"),
    hf_config=f"{HF}configuration_qwen2_moe:Qwen2MoeConfig",
    hf_layer=f"{HF}modeling_qwen2_moe:Qwen2MoeDecoderLayer",
    hf_rotary=f"{HF}modeling_qwen2_moe:Qwen2MoeRotaryEmbedding",
    hf_norm=f"{HF}modeling_qwen2_moe:Qwen2MoeRMSNorm",
)
