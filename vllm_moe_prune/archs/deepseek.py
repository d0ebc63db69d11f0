"""DeepSeek-MoE 16B: leading dense layers, shared experts, attention as in Llama."""

from .spec import ConfigKeys, GatedMlp, Key, Layout, MoeArch, MoePattern, RouterKeys
from .spec import TensorRule as R

LAYER = "model.layers.{layer}."
MLP = LAYER + "mlp."


def layouts(*router: R) -> tuple[Layout, ...]:
    """The Hub's spelling, and the packed weights that transformers 5 can save."""
    return (
        Layout(
            "mlp.gate_up_down",
            (
                *router,
                R(MLP + "experts.{expert}.gate_proj.weight", "F D", "gate"),
                R(MLP + "experts.{expert}.up_proj.weight", "F D", "up"),
                R(MLP + "experts.{expert}.down_proj.weight", "D F", "down"),
            ),
            stock_vllm=True,
        ),
        Layout(
            "mlp.packed",
            (
                *router,
                R(MLP + "experts.gate_up_proj", "E 2F D", "gate_up"),
                R(MLP + "experts.down_proj", "E D F", "down"),
            ),
            stock_vllm=False,
        ),
    )


ROUTER = R(MLP + "gate.weight", "E D", "router")

ARCH = MoeArch(
    model_type="deepseek",
    checkpoints="DeepSeek-MoE 16B",
    tested=("float64", "plugin", "two ranks"),
    stock_architecture="DeepseekForCausalLM",
    pruned_architecture="MoePruneDeepseekForCausalLM",
    config=ConfigKeys(
        experts="n_routed_experts",
        top_k="num_experts_per_tok",
        width="moe_intermediate_size",
    ),
    layouts=layouts(ROUTER),
    layer_prefix=LAYER,
    moe_members=("mlp.", "post_attention_layernorm."),
    skip_name="mlp",
    router=RouterKeys(
        scores=Key("scoring_func", "softmax"),
        renormalize=Key("norm_topk_prob", False),
    ),
    pattern=MoePattern(
        first=Key("first_k_dense_replace", 0), frequency=Key("moe_layer_freq", 1)
    ),
    dense_mlp=GatedMlp("mlp."),
    shared=GatedMlp("mlp.shared_experts."),
    shared_count=Key("n_shared_experts", 0),
    hf_config="transformers.models.llama.configuration_llama:LlamaConfig",
    hf_layer="transformers.models.llama.modeling_llama:LlamaDecoderLayer",
    hf_rotary="transformers.models.llama.modeling_llama:LlamaRotaryEmbedding",
    hf_norm="transformers.models.llama.modeling_llama:LlamaRMSNorm",
)
