"""OLMoE: every layer has experts; queries and keys are normed over all heads."""

from .deepseek import LAYER, ROUTER, layouts
from .spec import ConfigKeys, Key, MoeArch, RouterKeys

HF = "transformers.models.olmoe."

ARCH = MoeArch(
    model_type="olmoe",
    checkpoints="OLMoE 1B-7B",
    tested=("transformers", "float64", "vLLM's class", "plugin", "two ranks"),
    stock_architecture="OlmoeForCausalLM",
    pruned_architecture="MoePruneOlmoeForCausalLM",
    config=ConfigKeys(
        experts="num_experts", top_k="num_experts_per_tok", width="intermediate_size"
    ),
    layouts=layouts(ROUTER),
    layer_prefix=LAYER,
    moe_members=("mlp.", "post_attention_layernorm."),
    skip_name="mlp",
    router=RouterKeys(renormalize=Key("norm_topk_prob", False)),
    hf_config=f"{HF}configuration_olmoe:OlmoeConfig",
    hf_layer=f"{HF}modeling_olmoe:OlmoeDecoderLayer",
    hf_rotary=f"{HF}modeling_olmoe:OlmoeRotaryEmbedding",
    hf_norm=f"{HF}modeling_olmoe:OlmoeRMSNorm",
)
