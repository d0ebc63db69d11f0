"""GLM-4.5, 4.6, 4.7: DeepSeek-V3's router, grouped-query attention in part rotated."""

from dataclasses import replace

from .deepseek_v3 import ARCH as DEEPSEEK_V3
from .spec import LLAMA_ATTENTION, Key, MoePattern, RouterKeys

HF = "transformers.models.glm4_moe."

ARCH = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe",
    checkpoints="GLM-4.5, 4.5-Air, 4.6, 4.7",
    tested=("transformers", "float64", "vLLM's class", "plugin", "two ranks"),
    stock_architecture="Glm4MoeForCausalLM",
    pruned_architecture="MoePruneGlm4MoeForCausalLM",
    router=RouterKeys(
        scores=Key(None, "sigmoid"),
        renormalize=Key("norm_topk_prob", True),
        scale=Key("routed_scaling_factor", 1.0),
        groups=Key("n_group", 1),
        top_groups=Key("topk_group", 1),
        group_best=2,
        fp32=True,
    ),
    pattern=MoePattern(first=Key("first_k_dense_replace", 1)),
    attention=LLAMA_ATTENTION,
    hf_config=f"{HF}configuration_glm4_moe:Glm4MoeConfig",
    hf_layer=f"{HF}modeling_glm4_moe:Glm4MoeDecoderLayer",
    hf_rotary=f"{HF}modeling_glm4_moe:Glm4MoeRotaryEmbedding",
    hf_norm=f"{HF}modeling_glm4_moe:Glm4MoeRMSNorm",
)
