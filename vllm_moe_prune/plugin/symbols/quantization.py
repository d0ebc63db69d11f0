"""For the quantization method."""

from .symbol import Symbol, members

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_LAYERS = "vllm.model_executor.layers"
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_COMPRESSED = f"{_QUANTIZATION}.compressed_tensors.compressed_tensors"
_SCHEMES = f"{_QUANTIZATION}.compressed_tensors.schemes"

SYMBOLS = (
    Symbol(_QUANTIZATION, "register_quantization_config", ("quantization",)),
    Symbol(_QUANTIZATION, "get_quantization_config", ("quantization",)),
    Symbol(f"{_QUANTIZATION}.base_config", "QuantizationConfig"),
    *members(
        f"{_QUANTIZATION}.base_config",
        "QuantizationConfig",
        "get_name",
        "get_supported_act_dtypes",
        "get_min_capability",
        "get_config_filenames",
        "packed_modules_mapping",
    ),
    Symbol(
        f"{_QUANTIZATION}.base_config",
        "QuantizationConfig.apply_vllm_mapper",
        ("hf_to_vllm_mapper",),
    ),
    Symbol(f"{_QUANTIZATION}.fp8", "Fp8Config"),
    *members(
        f"{_QUANTIZATION}.fp8",
        "Fp8Config",
        "from_config",
        "get_quant_method",
        "get_supported_act_dtypes",
        "weight_block_size",
    ),
    Symbol(f"{_QUANTIZATION}.fp8", "Fp8LinearMethod"),
    *members(f"{_QUANTIZATION}.fp8", "Fp8MoEMethod", "experts_cls"),
    *members(
        f"{_QUANTIZATION}.compressed_tensors.compressed_tensors_moe"
        ".compressed_tensors_moe_w8a8_fp8",
        "CompressedTensorsW8A8Fp8MoEMethod",
        "experts_cls",
    ),
    Symbol(
        f"{_QUANTIZATION}.base_config", "QuantizationConfig.from_config", ("config",)
    ),
    Symbol(
        f"{_QUANTIZATION}.base_config",
        "QuantizationConfig.get_quant_method",
        ("layer", "prefix"),
    ),
    Symbol(f"{_LAYERS}.linear", "LinearBase"),
    *members(f"{_LAYERS}.linear", "LinearBase", "params_dtype", "quant_method"),
    Symbol(f"{_LAYERS}.linear", "LinearMethodBase"),
    Symbol(
        f"{_LAYERS}.linear",
        "LinearMethodBase.create_weights",
        (
            "layer",
            "input_size_per_partition",
            "output_partition_sizes",
            "input_size",
            "output_size",
            "params_dtype",
        ),
    ),
    Symbol(f"{_LAYERS}.linear", "LinearMethodBase.apply", ("layer", "x", "bias")),
    Symbol(f"{_LAYERS}.linear", "UnquantizedLinearMethod"),
    Symbol(
        f"{_LAYERS}.linear",
        "UnquantizedLinearMethod.process_weights_after_loading",
        ("layer",),
    ),
    Symbol(_COMPRESSED, "CompressedTensorsConfig"),
    Symbol(_COMPRESSED, "CompressedTensorsLinearMethod"),
    Symbol(_SCHEMES, "CompressedTensorsW8A8Fp8"),
    Symbol(_SCHEMES, "CompressedTensorsW8A16Fp8"),
    *members(
        f"{_SCHEMES}.compressed_tensors_w8a8_fp8",
        "CompressedTensorsW8A8Fp8",
        "strategy",
    ),
    *members(
        f"{_SCHEMES}.compressed_tensors_w8a16_fp8",
        "CompressedTensorsW8A16Fp8",
        "strategy",
    ),
    Symbol(
        _COMPRESSED,
        "CompressedTensorsConfig.get_quant_method",
        ("layer", "prefix"),
    ),
    *members(_COMPRESSED, "CompressedTensorsConfig", "config"),
    Symbol("vllm.model_executor.utils", "set_weight_attrs", ("weight", "weight_attrs")),
    Symbol(f"{_FUSED_MOE}.activation", "MoEActivation"),
    *members(f"{_FUSED_MOE}.activation", "MoEActivation", "SILU"),
    Symbol(f"{_FUSED_MOE}.config", "FusedMoEConfig"),
    *members(
        f"{_FUSED_MOE}.config",
        "FusedMoEConfig",
        "activation",
        "has_bias",
        "in_dtype",
        "moe_parallel_config",
        "swiglu_limit",
        "swiglu_alpha",
        "swiglu_beta",
    ),
    *members(f"{_FUSED_MOE}.config", "FusedMoEParallelConfig", "tp_size", "tp_rank"),
    Symbol(f"{_FUSED_MOE}.config", "FusedMoEQuantConfig"),
    Symbol(_FUSED_MOE, "FusedMoEMethodBase"),
    Symbol(
        f"{_FUSED_MOE}.fused_moe_method_base",
        "FusedMoEMethodBase.create_weights",
        (
            "layer",
            "num_experts",
            "hidden_size",
            "intermediate_size_per_partition",
            "params_dtype",
        ),
    ),
    Symbol(
        f"{_FUSED_MOE}.fused_moe_method_base",
        "FusedMoEMethodBase.apply",
        (
            "layer",
            "x",
            "topk_weights",
            "topk_ids",
            "shared_experts",
            "shared_experts_input",
        ),
    ),
    Symbol(
        f"{_FUSED_MOE}.fused_moe_method_base",
        "FusedMoEMethodBase.get_fused_moe_quant_config",
        ("layer",),
    ),
    Symbol(_FUSED_MOE, "RoutedExperts"),
    *members(
        f"{_FUSED_MOE}.routed_experts",
        "RoutedExperts",
        "apply_router_weight_on_input",
        "layer_name",
        "moe_config",
        "use_ep",
    ),
    Symbol(
        f"{_FUSED_MOE}.routed_experts",
        "RoutedExperts._map_global_expert_id_to_local_expert_id",
        ("expert_id",),
    ),
    Symbol(
        f"{_FUSED_MOE}.routed_experts",
        "RoutedExperts._replace_quant_method",
        ("quant_method",),
    ),
    Symbol(f"{_FUSED_MOE}.unquantized_fused_moe_method", "UnquantizedFusedMoEMethod"),
    *members(
        f"{_FUSED_MOE}.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod",
        "experts_cls",
    ),
    Symbol(
        f"{_FUSED_MOE}.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod.__init__",
        ("moe",),
    ),
    Symbol(
        f"{_FUSED_MOE}.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod.process_weights_after_loading",
        ("layer",),
    ),
    Symbol(
        f"{_FUSED_MOE}.unquantized_fused_moe_method",
        "UnquantizedFusedMoEMethod.maybe_roundup_sizes",
        (
            "hidden_size",
            "intermediate_size_per_partition",
            "act_dtype",
            "moe_parallel_config",
        ),
    ),
    Symbol(
        _FUSED_MOE,
        "fused_experts",
        (
            "hidden_states",
            "w1",
            "w2",
            "topk_weights",
            "topk_ids",
            "global_num_experts",
            "expert_map",
        ),
    ),
)
