"""The vLLM we stand on: versions, quirks, and every symbol the plugin uses.

The only file that compares versions. ``SYMBOLS`` is checked against the installed vLLM
by ``tests/contract/test_vllm_symbols.py``, which reads sources and imports nothing.
"""

from dataclasses import dataclass
from typing import Any

from ..checkpoint.compressed import METHOD
from ..errors import ServeError

OLDEST = "0.32"


def check_version() -> None:
    """Refuse a vLLM older than the oldest supported one.

    Raises:
        ServeError: Naming the version found and the one needed.
    """
    from packaging.version import InvalidVersion, Version
    from vllm import __version__ as found

    try:
        supported = Version(found) >= Version(OLDEST)
    except InvalidVersion as error:
        raise ServeError(
            f"vLLM calls itself {found!r}; a release from {OLDEST} on is needed."
        ) from error
    if not supported:
        raise ServeError(
            f"vLLM {found} is installed, but vllm-moe-prune needs {OLDEST} or newer. "
            "Upgrade vLLM, or set VLLM_PLUGINS to leave this plugin out."
        )


def allow_amx() -> None:
    """Ask the kernel for this process's AMX tiles, where the processor has them.

    Linux kills a process that uses tiles without having asked. vLLM's CPU attention
    uses them as soon as it sees them, and only some of its paths ask first.
    """
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def wants_local_ids(vllm_config: Any) -> bool:
    """Whether the MoE kernel ignores the expert map, so that routing must apply it.

    vLLM's CPU kernel indexes the experts of its own process with global ids: under
    expert parallelism it reads past their end. Our own kernel applies the map.
    """
    from vllm.platforms import current_platform

    quant_config = vllm_config.quant_config
    ours = quant_config is not None and quant_config.get_name() == METHOD
    return bool(
        current_platform.is_cpu()
        and vllm_config.parallel_config.enable_expert_parallel
        and not ours
    )


@dataclass(frozen=True)
class Symbol:
    """Something of vLLM's that we import, subclass, call or read."""

    module: str
    """Where we import it from, or where its class is defined."""
    name: str
    """Its name there; ``Class.member`` for what we call, override or read."""
    parameters: tuple[str, ...] | None = None
    """Every parameter that we pass, or accept when overriding; None: not called."""


def _members(module: str, owner: str, *names: str) -> tuple[Symbol, ...]:
    return tuple(Symbol(module, f"{owner}.{name}") for name in names)


_CONFIG = "vllm.config"
_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_LAYERS = "vllm.model_executor.layers"
_LOADER = "vllm.model_executor.model_loader"
_MIXTRAL = "vllm.model_executor.models.mixtral"
_MODELS = "vllm.model_executor.models"
_QUANTIZATION = "vllm.model_executor.layers.quantization"

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
    # Configuration.
    Symbol(_CONFIG, "ModelConfig"),
    Symbol(f"{_CONFIG}.model", "ModelConfig.get_model_arch_config", ()),
    *_members(f"{_CONFIG}.model", "ModelConfig", "model", "revision", "hf_config"),
    *_members(f"{_CONFIG}.model", "ModelConfig", "model_arch_config"),
    Symbol(_CONFIG, "VllmConfig"),
    *_members(f"{_CONFIG}.vllm", "VllmConfig", "model_config", "load_config"),
    *_members(f"{_CONFIG}.vllm", "VllmConfig", "cache_config", "quant_config"),
    *_members(f"{_CONFIG}.vllm", "VllmConfig", "parallel_config"),
    Symbol(f"{_CONFIG}.load", "LoadConfig"),
    *_members(f"{_CONFIG}.load", "LoadConfig", "load_format", "download_dir"),
    *_members(f"{_CONFIG}.load", "LoadConfig", "model_loader_extra_config"),
    *_members(
        f"{_CONFIG}.parallel",
        "ParallelConfig",
        "enable_eplb",
        "enable_ep_weight_filter",
        "enable_expert_parallel",
        "eplb_config",
        "data_parallel_size",
        "prefill_context_parallel_size",
        "tensor_parallel_size",
    ),
    *_members(f"{_CONFIG}.parallel", "EPLBConfig", "num_redundant_experts"),
    # What a Mixtral is built from.
    Symbol("vllm.platforms", "current_platform"),
    Symbol("vllm.compilation.decorators", "support_torch_compile"),
    Symbol("vllm.distributed", "get_ep_group", ()),
    Symbol(_FUSED_MOE, "GateLinear"),
    Symbol(
        f"{_FUSED_MOE}.router.gate_linear",
        "GateLinear.__init__",
        ("input_size", "output_size", "prefix"),
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
        ),
    ),
    *_members(f"{_FUSED_MOE}.runner.moe_runner", "MoERunner", "routed_experts"),
    *_members(f"{_FUSED_MOE}.routed_experts", "RoutedExperts", "expert_map"),
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
    *_members(f"{_MODELS}.utils", "WeightsMapper", "orig_to_new_substr", "__or__"),
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
    *_members(_MIXTRAL, "MixtralModel", "hf_to_vllm_mapper"),
    Symbol(_MIXTRAL, "MixtralForCausalLM"),
    Symbol(_MIXTRAL, "MixtralForCausalLM.__init__", ("vllm_config", "prefix")),
    Symbol(_MIXTRAL, "MixtralForCausalLM.load_weights", ("weights",)),
    # The quantisation method.
    Symbol(_QUANTIZATION, "register_quantization_config", ("quantization",)),
    Symbol(f"{_QUANTIZATION}.base_config", "QuantizationConfig"),
    *_members(
        f"{_QUANTIZATION}.base_config",
        "QuantizationConfig",
        "get_name",
        "get_supported_act_dtypes",
        "get_min_capability",
        "get_config_filenames",
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
    Symbol(f"{_LAYERS}.linear", "UnquantizedLinearMethod"),
    Symbol("vllm.model_executor.utils", "set_weight_attrs", ("weight", "weight_attrs")),
    Symbol(f"{_FUSED_MOE}.activation", "MoEActivation"),
    *_members(f"{_FUSED_MOE}.activation", "MoEActivation", "SILU"),
    Symbol(f"{_FUSED_MOE}.config", "FusedMoEConfig"),
    *_members(
        f"{_FUSED_MOE}.config",
        "FusedMoEConfig",
        "activation",
        "has_bias",
        "moe_parallel_config",
    ),
    *_members(f"{_FUSED_MOE}.config", "FusedMoEParallelConfig", "tp_size", "tp_rank"),
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
    *_members(
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
