"""For counting routed tokens, and for routes in vLLM's server."""

from .symbol import Symbol, members

_CONFIG = "vllm.config"
_CONTEXT = "vllm.forward_context"
_ENDPOINTS = "vllm.plugins.endpoint_plugins.interface"
_FUSED_MOE = "vllm.model_executor.layers.fused_moe"

SYMBOLS = (
    # Counting.
    Symbol(_CONFIG, "get_current_vllm_config", ()),
    Symbol(_CONTEXT, "get_forward_context", ()),
    Symbol(_CONTEXT, "is_forward_context_available", ()),
    Symbol(_CONTEXT, "ForwardContext.slot_mapping"),
    Symbol(
        "vllm.model_executor.custom_op",
        "PluggableLayer.register_oot",
        ("name",),
    ),
    Symbol(f"{_FUSED_MOE}.runner.moe_runner", "MoERunner"),
    *members(
        f"{_FUSED_MOE}.runner.moe_runner",
        "MoERunner",
        "_quant_method",
        "layer_name",
        "moe_config",
        "router",
    ),
    Symbol(f"{_FUSED_MOE}.config", "FusedMoEConfig.num_logical_experts"),
    Symbol(f"{_FUSED_MOE}.fused_moe_method_base", "FusedMoEMethodBase.is_monolithic"),
    Symbol(f"{_FUSED_MOE}.router.base_router", "BaseRouter.capture_fn"),
    Symbol(
        f"{_FUSED_MOE}.router.base_router",
        "BaseRouter.set_capture_fn",
        ("capture_fn",),
    ),
    Symbol("vllm.v1.worker.worker_base", "WorkerBase.get_model", ()),
    *members("vllm.v1.worker.worker_base", "WorkerBase", "vllm_config"),
    *members(
        f"{_CONFIG}.parallel",
        "ParallelConfig",
        "data_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
        "worker_extension_cls",
    ),
    *members(f"{_CONFIG}.vllm", "VllmConfig", "additional_config"),
    # Routes: we are an EndpointPlugin, and are handed an EngineClient.
    *members(
        _ENDPOINTS,
        "EndpointPlugin",
        "attach_router",
        "init_state",
        "name",
        "required_tasks",
    ),
    *members("vllm.engine.protocol", "EngineClient", "collective_rpc", "vllm_config"),
)
