"""DeepSeek-V3, R1, Moonlight, Kimi-K2: MLA; sigmoid scores; a bias only chooses."""

from dataclasses import replace

from .deepseek import ARCH as DEEPSEEK
from .deepseek import MLP, ROUTER, layouts
from .spec import LATENT_ATTENTION, Key, RouterKeys
from .spec import TensorRule as R

BIAS = R(MLP + "gate.e_score_correction_bias", "E", "router_bias")
HF = "transformers.models.deepseek_v3."

ARCH = replace(
    DEEPSEEK,
    model_type="deepseek_v3",
    checkpoints="DeepSeek-V3, R1, Moonlight",
    tested=("transformers", "float64", "vLLM's class", "plugin", "two ranks"),
    stock_architecture="DeepseekV3ForCausalLM",
    pruned_architecture="MoePruneDeepseekV3ForCausalLM",
    config=replace(DEEPSEEK.config, mtp_layers="num_nextn_predict_layers"),
    layouts=layouts(ROUTER, BIAS),
    router=RouterKeys(
        scores=Key("scoring_func", "sigmoid"),
        renormalize=Key("norm_topk_prob", True),
        scale=Key("routed_scaling_factor", 2.5),
        groups=Key("n_group", 8),
        top_groups=Key("topk_group", 4),
        method=Key("topk_method", "noaux_tc"),
        methods=("noaux_tc",),
        # DeepseekV3TopkRouter ranks groups by the sum of their two best biased scores.
        group_best=2,
        fp32=True,
    ),
    shared_count=Key("n_shared_experts", 1),
    pattern=replace(DEEPSEEK.pattern, first=Key("first_k_dense_replace", 3)),
    attention=LATENT_ATTENTION,
    hf_config=f"{HF}configuration_deepseek_v3:DeepseekV3Config",
    hf_layer=f"{HF}modeling_deepseek_v3:DeepseekV3DecoderLayer",
    hf_rotary=f"{HF}modeling_deepseek_v3:DeepseekV3RotaryEmbedding",
    hf_norm=f"{HF}modeling_deepseek_v3:DeepseekV3RMSNorm",
)
