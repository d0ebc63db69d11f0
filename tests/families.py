"""What ``tests/tiny.py`` writes for each family: config fields and dense tensors.

The fields are those of the published checkpoints. CPU builds of vLLM run MLA with the
published latent sizes only (512 and 64), so the tiny models have them too.
"""

from collections.abc import Iterator
from typing import Any

Shapes = Iterator[tuple[str, tuple[int, int]]]

MLA = {
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
GROUPED = {"n_group": 4, "topk_group": 2}
LAYOUTS = {
    "mixtral": "block_sparse_moe.w1w2w3",
    "arctic": "block_sparse_moe.w1w2w3",
    "deepseek": "mlp.gate_up_down",
    "deepseek_v2": "mlp.gate_up_down",
    "deepseek_v3": "mlp.gate_up_down",
    "kimi_k2": "mlp.gate_up_down",
    "glm4_moe": "mlp.gate_up_down",
    "glm4_moe_lite": "mlp.gate_up_down",
    "minimax_m2": "block_sparse_moe.w1w2w3",
    "olmoe": "mlp.gate_up_down",
    "qwen2_moe": "mlp.gate_up_down",
    "qwen3_moe": "mlp.gate_up_down",
}
# Experts and how many of them a token uses, where not asked for otherwise.
EXPERTS = {"deepseek_v2": (16, 4), "deepseek_v3": (16, 4), "kimi_k2": (16, 4)}


# What the published files leave to the class of the configuration.
UNSAID = {
    "glm4_moe": ("bos_token_id",),
    "glm4_moe_lite": ("bos_token_id", "initializer_range", "use_cache"),
    # Nor are first and last token published, but the class's are not in tiny tables.
    "minimax_m2": ("attention_dropout", "initializer_range"),
    "olmoe": ("bos_token_id", "rms_norm_eps"),
}


def default_counts(model_type: str) -> tuple[int, int]:
    """Experts and top-k of a family's tiny checkpoint."""
    return EXPERTS.get(model_type, (8, 2))


def family_fields(
    model_type: str,
    experts: int,
    width: int,
    heads: int,
    sliding_window: int | None,
    layers: int,
) -> dict[str, Any]:
    """The keys of config.json that not every family has."""
    if model_type in ("mixtral", "arctic"):
        fields: dict[str, Any] = {
            "intermediate_size": width,
            "num_local_experts": experts,
            "router_aux_loss_coef": 0.02,
            "sliding_window": sliding_window,
        }
        if model_type == "mixtral":
            return fields | {"output_router_logits": False}
        return fields | {
            "enable_expert_tensor_parallelism": False,
            "moe_eval_capacity_factor": 1,
            "moe_layer_frequency": 1,
            "moe_min_capacity": 0,
            "moe_token_dropping": False,
            "moe_train_capacity_factor": 1,
            "parallel_attn_mlp_res": True,
            "use_residual": True,
        }
    if model_type == "olmoe":  # allenai/OLMoE-1B-7B-0924
        return {
            "attention_bias": False,
            "clip_qkv": None,
            "intermediate_size": width,
            "norm_topk_prob": False,
            "num_experts": experts,
            "num_key_value_heads": heads,
            "output_router_logits": False,
            "pad_token_id": 1,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
        }
    if model_type == "minimax_m2":  # MiniMaxAI/MiniMax-M2.1
        return {
            "attn_type_list": [1] * layers,
            "head_dim": 64,
            "intermediate_size": width,
            "mtp_transformer_layers": 1,
            "num_local_experts": experts,
            "num_mtp_modules": 3,
            "qk_norm_type": "per_layer",
            "rope_theta": 5000000,
            "rotary_dim": 32,
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "use_mtp": True,
            "use_qk_norm": True,
            "use_routing_bias": True,
        }
    if model_type == "qwen2_moe":  # Qwen/Qwen1.5-MoE-A2.7B
        return {
            "decoder_sparse_step": 1,
            "intermediate_size": 3 * width,
            "max_window_layers": 4,
            "moe_intermediate_size": width,
            "norm_topk_prob": False,
            "num_experts": experts,
            "num_key_value_heads": heads,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 80,  # no multiple of the experts' width
            "sliding_window": 32768,
            "use_sliding_window": False,
        }
    if model_type == "qwen3_moe":  # Qwen/Qwen3-30B-A3B
        return {
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 64,
            "intermediate_size": 3 * width,
            "max_window_layers": 4,
            "mlp_only_layers": [],
            "moe_intermediate_size": width,
            "norm_topk_prob": True,
            "num_experts": experts,
            "output_router_logits": False,
            "rope_scaling": None,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "use_sliding_window": False,
        }
    if model_type == "glm4_moe":  # zai-org/GLM-4.5-Air
        return {
            "attention_bias": True,
            "eos_token_id": [2],
            "first_k_dense_replace": 1,
            "head_dim": 64,
            "intermediate_size": 2 * width,
            "moe_intermediate_size": width,
            "n_group": 1,
            "n_routed_experts": experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 0,  # published: 1
            "pad_token_id": 0,
            "partial_rotary_factor": 0.5,
            "rope_scaling": None,
            "routed_scaling_factor": 1.0,
            "topk_group": 1,
            "use_qk_norm": False,
        }
    if model_type == "glm4_moe_lite":  # zai-org/GLM-4.7-Flash
        return MLA | {
            "attention_bias": False,
            "eos_token_id": [2],
            "first_k_dense_replace": 1,
            "intermediate_size": 2 * width,
            "moe_intermediate_size": width,
            "n_group": 1,
            "n_routed_experts": experts,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_key_value_heads": heads,
            "num_nextn_predict_layers": 0,  # published: 1
            "pad_token_id": 0,
            "partial_rotary_factor": 1.0,
            "q_lora_rank": 48,
            "rope_scaling": None,
            "routed_scaling_factor": 1.8,
            "topk_group": 1,
            "topk_method": "noaux_tc",
        }
    fields = {
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width,
        "moe_layer_freq": 1,
        "n_routed_experts": experts,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "seq_aux": True,
    }
    if model_type == "deepseek":
        return fields
    fields |= MLA | GROUPED | {"num_key_value_heads": heads}
    if model_type == "deepseek_v2":
        extra = {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5}
        return fields | extra
    fields |= {
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
        "n_shared_experts": 1,
        "q_lora_rank": 48,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    if model_type == "deepseek_v3":
        return fields
    # moonshotai/Kimi-K2-Instruct: one group, and a factor of its own.
    return fields | {
        "n_group": 1,
        "pretraining_tp": 1,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "topk_group": 1,
    }


def fp8_fields(model_type: str, layers: int) -> dict[str, Any]:
    """The keys of an FP8 checkpoint's quantization_config that not every one has."""
    if model_type == "minimax_m2":
        names = ["gate", "e_score_correction_bias", "lm_head"]
        return {"fmt": "float8_e4m3fn", "modules_to_not_convert": names}
    if model_type != "qwen3_moe":
        return {}
    parts = ("input_layernorm", "mlp.gate", "post_attention_layernorm")
    names = [
        f"model.layers.{index}.{part}" for index in range(layers) for part in parts
    ]
    return {"modules_to_not_convert": ["lm_head", *names]}


def attention(config: dict[str, Any]) -> tuple[Shapes, list[tuple[str, int]]]:
    """Matrices [rows, cols] of a layer's attention, and vectors with their sizes."""
    if "kv_lora_rank" in config:
        return _latent_attention(config), _latent_norms(config)
    vectors = []
    if config["model_type"] in ("olmoe", "minimax_m2"):
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        vectors = [
            ("self_attn.q_norm.weight", heads * size),
            ("self_attn.k_norm.weight", config["num_key_value_heads"] * size),
        ]
    elif config["model_type"] == "qwen3_moe" or config.get("use_qk_norm"):
        vectors = [
            (f"self_attn.{name}_norm.weight", config["head_dim"]) for name in "qk"
        ]
    if config.get("attention_bias") or config["model_type"] == "qwen2_moe":
        vectors += [
            (name.replace(".weight", ".bias"), rows)
            for name, (rows, _) in _plain_attention(config)
            if "o_proj" not in name
        ]
    return _plain_attention(config), vectors


def _plain_attention(config: dict[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    keys = config["num_key_value_heads"] * head_dim
    yield "self_attn.q_proj.weight", (heads * head_dim, hidden)
    yield "self_attn.k_proj.weight", (keys, hidden)
    yield "self_attn.v_proj.weight", (keys, hidden)
    yield "self_attn.o_proj.weight", (hidden, heads * head_dim)


def _latent_attention(config: dict[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    latent, value = config["kv_lora_rank"], config["v_head_dim"]
    queries = heads * (nope + rope)
    if rank := config["q_lora_rank"]:
        yield "self_attn.q_a_proj.weight", (rank, hidden)
        yield "self_attn.q_b_proj.weight", (queries, rank)
    else:
        yield "self_attn.q_proj.weight", (queries, hidden)
    yield "self_attn.kv_a_proj_with_mqa.weight", (latent + rope, hidden)
    yield "self_attn.kv_b_proj.weight", (heads * (nope + value), latent)
    yield "self_attn.o_proj.weight", (hidden, heads * value)


def _latent_norms(config: dict[str, Any]) -> list[tuple[str, int]]:
    norms = [("self_attn.kv_a_layernorm.weight", config["kv_lora_rank"])]
    if rank := config["q_lora_rank"]:
        norms.append(("self_attn.q_a_layernorm.weight", rank))
    return norms


def mtp_matrices(config: dict[str, Any], index: int) -> Shapes:
    """What a layer that predicts a further token has beside a decoder layer's."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    prefix = f"model.layers.{index}."
    yield prefix + "eh_proj.weight", (hidden, 2 * hidden)
    yield prefix + "embed_tokens.weight", (vocab, hidden)
    yield prefix + "shared_head.head.weight", (vocab, hidden)


MTP_NORMS = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")
