"""MiniMax-M2: every layer has experts; the router's bias is on the block."""

from .mixtral import LAYER
from .spec import ConfigKeys, Key, Layout, MoeArch, RouterKeys
from .spec import TensorRule as R

HF = "transformers.models.minimax_m2."


def _layouts() -> tuple[Layout, ...]:
    """The Hub's spelling, and the packed weights that transformers 5 can save."""
    router = {
        moe: (
            R(f"{LAYER}{moe}.gate.weight", "E D", "router"),
            R(f"{LAYER}{moe}.e_score_correction_bias", "E", "router_bias"),
        )
        for moe in ("block_sparse_moe", "mlp")
    }
    each = LAYER + "block_sparse_moe.experts.{expert}."
    return (
        Layout(
            "block_sparse_moe.w1w2w3",
            (
                *router["block_sparse_moe"],
                R(each + "w1.weight", "F D", "gate"),
                R(each + "w3.weight", "F D", "up"),
                R(each + "w2.weight", "D F", "down"),
            ),
            stock_vllm=True,
        ),
        Layout(
            "mlp.packed",
            (
                *router["mlp"],
                R(LAYER + "mlp.experts.gate_up_proj", "E 2F D", "gate_up"),
                R(LAYER + "mlp.experts.down_proj", "E D F", "down"),
            ),
            stock_vllm=False,
        ),
    )


ARCH = MoeArch(
    model_type="minimax_m2",
    checkpoints="MiniMax-M2, M2.1, M2.5",
    # vLLM's own class stops at an assertion of its CPU router.
    tested=("transformers", "float64", "plugin", "two ranks"),
    stock_architecture="MiniMaxM2ForCausalLM",
    pruned_architecture="MoePruneMiniMaxM2ForCausalLM",
    config=ConfigKeys(
        experts="num_local_experts",
        top_k="num_experts_per_tok",
        width="intermediate_size",
    ),
    layouts=_layouts(),
    layer_prefix=LAYER,
    moe_members=("block_sparse_moe.", "mlp.", "post_attention_layernorm."),
    skip_name="mlp",
    router=RouterKeys(
        scores=Key(None, "sigmoid"),
        # transformers looks at no key; vLLM at this one.
        method=Key("scoring_func", "sigmoid"),
        methods=("sigmoid",),
        fp32=True,
    ),
    # Kinds of attention, of which the published models have one.
    per_layer_lists=("layer_types", "attn_type_list"),
    hf_config=f"{HF}configuration_minimax_m2:MiniMaxM2Config",
    hf_layer=f"{HF}modeling_minimax_m2:MiniMaxM2DecoderLayer",
    hf_rotary=f"{HF}modeling_minimax_m2:MiniMaxM2RotaryEmbedding",
    hf_norm=f"{HF}modeling_minimax_m2:MiniMaxM2RMSNorm",
    vllm_names=((".mlp.", ".block_sparse_moe."),),
)
