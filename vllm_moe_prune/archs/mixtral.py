"""Mixtral 8x7B and 8x22B: every layer is MoE; w1 = gate, w3 = up, w2 = down."""

from .spec import ConfigKeys, Layout, MoeArch
from .spec import TensorRule as R

LAYER = "model.layers.{layer}."


def _layouts() -> tuple[Layout, ...]:
    found = []
    # The Hub says block_sparse_moe; transformers 5 saves packed weights under mlp.
    for moe in ("block_sparse_moe", "mlp"):
        router = R(f"{LAYER}{moe}.gate.weight", "E D", "router")
        each = f"{LAYER}{moe}.experts.{{expert}}."
        hub = moe == "block_sparse_moe"
        found += [
            Layout(
                f"{moe}.w1w2w3",
                (
                    router,
                    R(each + "w1.weight", "F D", "gate"),
                    R(each + "w3.weight", "F D", "up"),
                    R(each + "w2.weight", "D F", "down"),
                ),
                stock_vllm=hub,
            ),
            Layout(
                f"{moe}.gate_up_down",
                (
                    router,
                    R(each + "gate_proj.weight", "F D", "gate"),
                    R(each + "up_proj.weight", "F D", "up"),
                    R(each + "down_proj.weight", "D F", "down"),
                ),
                stock_vllm=hub,
            ),
            Layout(
                f"{moe}.packed",
                (
                    router,
                    R(f"{LAYER}{moe}.experts.gate_up_proj", "E 2F D", "gate_up"),
                    R(f"{LAYER}{moe}.experts.down_proj", "E D F", "down"),
                ),
                stock_vllm=False,
            ),
        ]
    return tuple(found)


ARCH = MoeArch(
    model_type="mixtral",
    checkpoints="Mixtral 8x7B, 8x22B",
    tested=("transformers", "float64", "vLLM's class", "plugin", "two ranks"),
    stock_architecture="MixtralForCausalLM",
    pruned_architecture="MoePruneMixtralForCausalLM",
    config=ConfigKeys(
        experts="num_local_experts",
        top_k="num_experts_per_tok",
        width="intermediate_size",
    ),
    layouts=_layouts(),
    layer_prefix=LAYER,
    moe_members=("block_sparse_moe.", "mlp.", "post_attention_layernorm."),
    skip_name="mlp",
    slides=True,
    hf_config="transformers.models.mixtral.configuration_mixtral:MixtralConfig",
    hf_layer="transformers.models.mixtral.modeling_mixtral:MixtralDecoderLayer",
    hf_rotary="transformers.models.mixtral.modeling_mixtral:MixtralRotaryEmbedding",
    hf_norm="transformers.models.mixtral.modeling_mixtral:MixtralRMSNorm",
    vllm_names=(
        (".mlp.", ".block_sparse_moe."),
        (".gate_proj", ".w1"),
        (".up_proj", ".w3"),
        (".down_proj", ".w2"),
    ),
)
