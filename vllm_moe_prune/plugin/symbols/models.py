"""For registration, the loader, configurations and model classes."""

from .symbol import Symbol, members

_CONFIG = "vllm.config"
_CONVERTOR = "vllm.transformers_utils.model_arch_config_convertor"
_DEEPSEEK = "vllm.model_executor.models.deepseek_v2"
_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_LAYERS = "vllm.model_executor.layers"
_LOADER = "vllm.model_executor.model_loader"
_MIXTRAL = "vllm.model_executor.models.mixtral"
_MODELS = "vllm.model_executor.models"

# Shared by vLLM's attentions, and what latent attention has beside it.
_ATTENTION = (
    "vllm_config",
    "config",
    "hidden_size",
    "num_heads",
    "max_position_embeddings",
    "cache_config",
    "quant_config",
    "reduce_results",
    "prefix",
)
_LATENT = (
    *_ATTENTION,
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "q_lora_rank",
    "kv_lora_rank",
)

SYMBOLS = (
    # Registration.
    Symbol("vllm", "__version__"),
    Symbol("vllm", "ModelRegistry"),
    Symbol(
        f"{_MODELS}.registry",
        "_ModelRegistry.register_model",
        ("model_arch", "model_cls"),
    ),
    Symbol(_LOADER, "register_model_loader", ("load_format",)),
    # Experts in vLLM's own classes.
    Symbol(f"{_FUSED_MOE}.routed_experts", "RoutedExperts"),
    Symbol("vllm.model_executor.custom_op", "op_registry_oot"),
    Symbol(_LOADER, "DefaultModelLoader"),
    Symbol(_LOADER, "get_model_loader", ("load_config",)),
    *members(f"{_CONFIG}.model", "ModelConfig", "architecture"),
    # The loader.
    Symbol(f"{_LOADER}.base_loader", "BaseModelLoader"),
    Symbol(f"{_LOADER}.base_loader", "BaseModelLoader.__init__", ("load_config",)),
    Symbol(
        f"{_LOADER}.base_loader", "BaseModelLoader.download_model", ("model_config",)
    ),
    Symbol(
        f"{_LOADER}.base_loader",
        "BaseModelLoader.load_weights",
        ("model", "model_config"),
    ),
    Symbol(
        f"{_LOADER}.base_loader",
        "BaseModelLoader.load_model",
        ("vllm_config", "model_config", "prefix"),
    ),
    # The tokenizer.
    Symbol(
        "vllm.tokenizers.hf",
        "CachedHfTokenizer.from_pretrained",
        ("path_or_repo_id", "trust_remote_code"),
    ),
    Symbol("vllm.tokenizers.hf", "CachedHfTokenizer"),
    Symbol("vllm.tokenizers.hf", "get_cached_tokenizer", ("tokenizer",)),
    # Configuration.
    Symbol(_CONFIG, "ModelConfig"),
    Symbol(f"{_CONFIG}.model", "ModelConfig.get_model_arch_config", ()),
    *members(f"{_CONFIG}.model", "ModelConfig", "model", "revision", "hf_config"),
    *members(f"{_CONFIG}.model", "ModelConfig", "model_arch_config"),
    Symbol(_CONFIG, "VllmConfig"),
    *members(f"{_CONFIG}.vllm", "VllmConfig", "model_config", "load_config"),
    *members(f"{_CONFIG}.vllm", "VllmConfig", "cache_config", "quant_config"),
    *members(f"{_CONFIG}.vllm", "VllmConfig", "parallel_config"),
    Symbol(f"{_CONFIG}.load", "LoadConfig"),
    *members(f"{_CONFIG}.load", "LoadConfig", "load_format", "download_dir"),
    *members(f"{_CONFIG}.load", "LoadConfig", "model_loader_extra_config"),
    *members(
        f"{_CONFIG}.parallel",
        "ParallelConfig",
        "enable_eplb",
        "enable_ep_weight_filter",
        "enable_expert_parallel",
        "eplb_config",
        "data_parallel_size",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "tensor_parallel_size",
        "use_sequence_parallel_moe",
    ),
    *members(f"{_CONFIG}.parallel", "EPLBConfig", "num_redundant_experts"),
    # Configuration of layers that differ.
    Symbol(_CONVERTOR, "MODEL_ARCH_CONFIG_CONVERTORS"),
    Symbol(_CONVERTOR, "ModelArchConfigConvertorBase"),
    Symbol(
        _CONVERTOR,
        "ModelArchConfigConvertorBase.__init__",
        ("hf_config", "hf_text_config", "revision"),
    ),
    Symbol(
        _CONVERTOR, "ModelArchConfigConvertorBase.convert", ("supports_multimodal",)
    ),
    Symbol(
        _CONVERTOR,
        "ModelArchConfigConvertorBase.convert_layer",
        ("supports_multimodal",),
    ),
    Symbol(_CONVERTOR, "ModelArchConfigConvertorBase.get_architectures", ()),
    Symbol(_CONVERTOR, "ModelArchConfigConvertorBase.get_head_size", ()),
    Symbol(_CONVERTOR, "ModelArchConfigConvertorBase.get_per_layer_hf_configs", ()),
    Symbol(f"{_CONFIG}.model_arch", "ModelArchitectureConfig"),
    Symbol(f"{_CONFIG}.model_arch", "ModelArchitectureConfig.from_layers", ("layers",)),
    # What models are built from.
    Symbol("vllm.platforms", "current_platform"),
    Symbol("vllm.compilation.decorators", "support_torch_compile"),
    Symbol("vllm.distributed", "get_ep_group", ()),
    Symbol("vllm.distributed", "get_pp_group", ()),
    Symbol("vllm.distributed", "get_tensor_model_parallel_rank", ()),
    Symbol("vllm.distributed", "get_tensor_model_parallel_world_size", ()),
    Symbol(_FUSED_MOE, "GateLinear"),
    Symbol(
        f"{_FUSED_MOE}.router.gate_linear",
        "GateLinear.__init__",
        ("input_size", "output_size", "out_dtype", "prefix"),
    ),
    Symbol(
        _FUSED_MOE,
        "FusedMoEFactory",
        (
            "num_experts",
            "top_k",
            "hidden_size",
            "intermediate_size",
            "renormalize",
            "quant_config",
            "prefix",
            "custom_routing_function",
            "enable_eplb",
            "num_redundant_experts",
            "ckpt_names",
            "shared_experts",
            "gate",
            "use_grouped_topk",
            "num_expert_group",
            "topk_group",
            "scoring_func",
            "routed_scaling_factor",
            "apply_routed_scale_to_output",
            "e_score_correction_bias",
            "is_sequence_parallel",
            "router_logits_dtype",
        ),
    ),
    *members(f"{_FUSED_MOE}.runner.moe_runner", "MoERunner", "routed_experts"),
    *members(f"{_FUSED_MOE}.routed_experts", "RoutedExperts", "expert_map"),
    Symbol(f"{_LAYERS}.activation", "SiluAndMul"),
    Symbol(f"{_LAYERS}.linear", "MergedColumnParallelLinear"),
    Symbol(
        f"{_LAYERS}.linear",
        "MergedColumnParallelLinear.__init__",
        ("input_size", "output_sizes", "bias", "quant_config", "prefix"),
    ),
    Symbol(f"{_LAYERS}.linear", "RowParallelLinear"),
    Symbol(
        f"{_LAYERS}.linear",
        "RowParallelLinear.__init__",
        ("input_size", "output_size", "bias", "quant_config", "prefix"),
    ),
    Symbol(f"{_LAYERS}.rotary_embedding", "RotaryEmbedding"),
    Symbol(
        f"{_LAYERS}.rotary_embedding",
        "RotaryEmbedding.forward_cpu",
        ("positions", "query", "key"),
    ),
    Symbol(
        f"{_LAYERS}.rotary_embedding",
        "RotaryEmbedding.forward_native",
        ("positions", "query", "key"),
    ),
    Symbol("vllm.model_executor.custom_op", "CustomOp.register_oot", ("name",)),
    Symbol(f"{_LAYERS}.layernorm", "RMSNorm"),
    Symbol(f"{_LAYERS}.layernorm", "RMSNorm.__init__", ("hidden_size", "eps")),
    Symbol(f"{_LAYERS}.logits_processor", "LogitsProcessor"),
    Symbol(f"{_LAYERS}.logits_processor", "LogitsProcessor.__init__", ("vocab_size",)),
    Symbol(f"{_LAYERS}.vocab_parallel_embedding", "ParallelLMHead"),
    Symbol(
        f"{_LAYERS}.vocab_parallel_embedding",
        "ParallelLMHead.__init__",
        ("num_embeddings", "embedding_dim", "quant_config", "prefix"),
    ),
    Symbol(
        f"{_LAYERS}.vocab_parallel_embedding",
        "ParallelLMHead.tie_weights",
        ("embed_tokens",),
    ),
    Symbol(f"{_LAYERS}.vocab_parallel_embedding", "VocabParallelEmbedding"),
    Symbol(
        f"{_LAYERS}.vocab_parallel_embedding",
        "VocabParallelEmbedding.__init__",
        ("num_embeddings", "embedding_dim"),
    ),
    Symbol(f"{_MODELS}.utils", "PPMissingLayer"),
    Symbol(f"{_MODELS}.utils", "WeightsMapper"),
    *members(
        f"{_MODELS}.utils",
        "WeightsMapper",
        "orig_to_new_stacked",
        "orig_to_new_substr",
        "__or__",
    ),
    Symbol(f"{_MODELS}.utils", "extract_layer_index", ("layer_name",)),
    Symbol(
        f"{_MODELS}.utils", "make_layers", ("num_hidden_layers", "layer_fn", "prefix")
    ),
    Symbol(
        f"{_MODELS}.utils",
        "make_empty_intermediate_tensors_factory",
        ("keys", "hidden_size"),
    ),
    Symbol(f"{_MODELS}.utils", "maybe_prefix", ("prefix", "name")),
    # The classes whose constructors we replace.
    Symbol(_MIXTRAL, "MixtralAttention"),
    Symbol(
        _MIXTRAL,
        "MixtralAttention.__init__",
        (
            "config",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "max_position",
            "cache_config",
            "quant_config",
            "prefix",
        ),
    ),
    Symbol(_MIXTRAL, "MixtralMoE"),
    Symbol(_MIXTRAL, "MixtralDecoderLayer"),
    Symbol(
        _MIXTRAL,
        "MixtralDecoderLayer.forward",
        ("positions", "hidden_states", "residual"),
    ),
    Symbol(_MIXTRAL, "MixtralModel"),
    Symbol(_MIXTRAL, "MixtralModel.__init__", ("vllm_config", "prefix")),
    *members(_MIXTRAL, "MixtralModel", "hf_to_vllm_mapper"),
    Symbol(_MIXTRAL, "MixtralForCausalLM"),
    Symbol(_MIXTRAL, "MixtralForCausalLM.__init__", ("vllm_config", "prefix")),
    Symbol(_MIXTRAL, "MixtralForCausalLM.load_weights", ("weights",)),
    *(
        Symbol(_DEEPSEEK, name)
        for name in (
            "DeepseekAttention",
            "DeepseekV2Attention",
            "DeepseekV2DecoderLayer",
            "DeepseekV2ForCausalLM",
            "DeepseekV2MLAAttention",
            "DeepseekV2MLP",
            "DeepseekV2Model",
            "DeepseekV2MoE",
        )
    ),
    Symbol(_DEEPSEEK, "DeepseekAttention.__init__", _ATTENTION),
    Symbol(_DEEPSEEK, "DeepseekV2Attention.__init__", _LATENT),
    Symbol(_DEEPSEEK, "DeepseekV2MLAAttention.__init__", _LATENT),
    Symbol(
        _DEEPSEEK,
        "DeepseekV2MLP.__init__",
        (
            "hidden_size",
            "intermediate_size",
            "hidden_act",
            "quant_config",
            "reduce_results",
            "is_sequence_parallel",
            "prefix",
        ),
    ),
    Symbol(
        _DEEPSEEK,
        "DeepseekV2DecoderLayer.forward",
        ("positions", "hidden_states", "residual", "llama_4_scaling"),
    ),
    Symbol(_DEEPSEEK, "DeepseekV2Model.__init__", ("vllm_config", "prefix")),
    Symbol(_DEEPSEEK, "DeepseekV2Model.load_weights", ("weights",)),
    Symbol(_DEEPSEEK, "DeepseekV2ForCausalLM.__init__", ("vllm_config", "prefix")),
    Symbol(_DEEPSEEK, "DeepseekV2ForCausalLM.load_weights", ("weights",)),
    Symbol(_DEEPSEEK, "DeepseekV2ForCausalLM.set_moe_parameters", ()),
)
