"""DeepSeek-V2 and V2-Lite: MLA; groups of experts, of which the best are chosen."""

from dataclasses import replace

from .deepseek import ARCH as DEEPSEEK
from .spec import LATENT_ATTENTION, Key, RouterKeys

HF = "transformers.models.deepseek_v2."

ARCH = replace(
    DEEPSEEK,
    model_type="deepseek_v2",
    checkpoints="DeepSeek-V2, V2-Lite",
    tested=("transformers", "float64", "plugin", "two ranks"),
    stock_architecture="DeepseekV2ForCausalLM",
    pruned_architecture="MoePruneDeepseekV2ForCausalLM",
    router=RouterKeys(
        scores=Key("scoring_func", "softmax"),
        renormalize=Key("norm_topk_prob", False),
        scale=Key("routed_scaling_factor", 1.0),
        groups=Key("n_group", 1),
        top_groups=Key("topk_group", 1),
        method=Key("topk_method", "greedy"),
        methods=("greedy", "group_limited_greedy"),
        # greedy takes the top-k of all experts, whatever n_group says.
        ungrouped=("greedy",),
        # DeepseekV2TopkRouter of transformers casts input and weight to fp32.
        fp32=True,
    ),
    shared_count=Key("n_shared_experts", 2),
    attention=LATENT_ATTENTION,
    hf_config=f"{HF}configuration_deepseek_v2:DeepseekV2Config",
    hf_layer=f"{HF}modeling_deepseek_v2:DeepseekV2DecoderLayer",
    hf_rotary=f"{HF}modeling_deepseek_v2:DeepseekV2RotaryEmbedding",
    hf_norm=f"{HF}modeling_deepseek_v2:DeepseekV2RMSNorm",
)
