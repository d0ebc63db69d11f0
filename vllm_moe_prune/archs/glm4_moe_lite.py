"""GLM-4.7-Flash: GLM-4.5's router, latent attention; two keys name dense layers."""

from dataclasses import replace

from .glm4_moe import ARCH as GLM4_MOE
from .spec import LATENT_ATTENTION, Key, MoePattern

HF = "transformers.models.glm4_moe_lite."

ARCH = replace(
    GLM4_MOE,
    model_type="glm4_moe_lite",
    checkpoints="GLM-4.7-Flash",
    tested=("transformers", "float64", "vLLM's class", "plugin", "two ranks"),
    stock_architecture="Glm4MoeLiteForCausalLM",
    pruned_architecture="MoePruneGlm4MoeLiteForCausalLM",
    router=replace(GLM4_MOE.router, scale=Key("routed_scaling_factor", 1.8)),
    pattern=MoePattern(first=Key("first_k_dense_replace", 1), types="mlp_layer_types"),
    attention=LATENT_ATTENTION,
    per_layer_lists=("layer_types", "mlp_layer_types"),
    hf_config=f"{HF}configuration_glm4_moe_lite:Glm4MoeLiteConfig",
    hf_layer=f"{HF}modeling_glm4_moe_lite:Glm4MoeLiteDecoderLayer",
    hf_rotary=f"{HF}modeling_glm4_moe_lite:Glm4MoeLiteRotaryEmbedding",
    hf_norm=f"{HF}modeling_glm4_moe_lite:Glm4MoeLiteRMSNorm",
)
