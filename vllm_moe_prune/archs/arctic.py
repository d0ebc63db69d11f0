"""Snowflake Arctic: a dense MLP beside the experts; w1 = gate, w3 = up, w2 = down.

With ``parallel_attn_mlp_res`` the experts read the normed *input* of the layer, before
attention, while a dense residual MLP reads what attention gives. transformers has no
Arctic; its attention is Mixtral's, from which the calibration layer takes it.
"""

from .spec import (
    ConfigKeys,
    GatedMlp,
    Key,
    Layout,
    MoeArch,
    MoePattern,
    Residual,
    RouterKeys,
)
from .spec import TensorRule as R

LAYER = "model.layers.{layer}."
EXPERT = LAYER + "block_sparse_moe.experts.{expert}."

ARCH = MoeArch(
    model_type="arctic",
    checkpoints="Snowflake Arctic",
    tested=("float64", "plugin", "two ranks"),
    stock_architecture="ArcticForCausalLM",
    pruned_architecture="MoePruneArcticForCausalLM",
    config=ConfigKeys(
        experts="num_local_experts",
        top_k="num_experts_per_tok",
        width="intermediate_size",
    ),
    layouts=(
        Layout(
            "block_sparse_moe.w1w2w3",
            (
                R(LAYER + "block_sparse_moe.gate.weight", "E D", "router"),
                R(EXPERT + "w1.weight", "F D", "gate"),
                R(EXPERT + "w3.weight", "F D", "up"),
                R(EXPERT + "w2.weight", "D F", "down"),
            ),
            stock_vllm=True,
        ),
    ),
    layer_prefix=LAYER,
    moe_members=("block_sparse_moe.", "post_attention_layernorm."),
    skip_name="block_sparse_moe",
    # Renormalized where top_k > 1; the one weight of top-1 stays its score.
    router=RouterKeys(renormalize_single=False),
    # Layer i has experts where (i + 1) % moe_layer_frequency == 0.
    pattern=MoePattern(frequency=Key("moe_layer_frequency", 2), offset=1),
    # Layers without experts have their MLP under the same module.
    dense_mlp=GatedMlp("block_sparse_moe.mlp.", "w1", "w3", "w2"),
    residual=Residual(
        mlp=GatedMlp("residual_mlp.", "w1", "w3", "w2"),
        norm="residual_layernorm",
        present=Key("parallel_attn_mlp_res", False),
    ),
    slides=True,
    hf_config="transformers.models.mixtral.configuration_mixtral:MixtralConfig",
    hf_layer="transformers.models.mixtral.modeling_mixtral:MixtralDecoderLayer",
    hf_rotary="transformers.models.mixtral.modeling_mixtral:MixtralRotaryEmbedding",
    hf_norm="transformers.models.mixtral.modeling_mixtral:MixtralRMSNorm",
    stock_vllm=False,
)
