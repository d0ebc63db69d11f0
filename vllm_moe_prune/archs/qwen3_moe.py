"""Qwen3-MoE: every layer has experts in what is published; q and k normed per head."""

from .deepseek import LAYER, ROUTER, layouts
from .spec import ConfigKeys, GatedMlp, Key, MoeArch, MoePattern, RouterKeys

HF = "transformers.models.qwen3_moe."

ARCH = MoeArch(
    model_type="qwen3_moe",
    checkpoints="Qwen3-30B-A3B, 235B-A22B",
    tested=("transformers", "float64", "vLLM's class", "plugin", "two ranks"),
    stock_architecture="Qwen3MoeForCausalLM",
    pruned_architecture="MoePruneQwen3MoeForCausalLM",
    config=ConfigKeys(
        experts="num_local_experts",
        experts_in_files="num_experts",
        top_k="num_experts_per_tok",
        width="moe_intermediate_size",
    ),
    layouts=layouts(ROUTER),
    layer_prefix=LAYER,
    moe_members=("mlp.", "post_attention_layernorm."),
    skip_name="mlp",
    router=RouterKeys(renormalize=Key("norm_topk_prob", False)),
    pattern=MoePattern(frequency=Key("decoder_sparse_step", 1), offset=1),
    dense_mlp=GatedMlp("mlp."),
    # Indices of dense layers: lists no cut renumbers yet. Published ones are empty.
    empty_lists=("mlp_only_layers",),
    slides=True,
    hf_config=f"{HF}configuration_qwen3_moe:Qwen3MoeConfig",
    hf_layer=f"{HF}modeling_qwen3_moe:Qwen3MoeDecoderLayer",
    hf_rotary=f"{HF}modeling_qwen3_moe:Qwen3MoeRotaryEmbedding",
    hf_norm=f"{HF}modeling_qwen3_moe:Qwen3MoeRMSNorm",
)
