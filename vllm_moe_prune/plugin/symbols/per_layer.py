"""For models of vLLM's that are built with a configuration per layer."""

from .symbol import Symbol

_CLASSES = {
    "glm4_moe": ("Glm4MoE", "Glm4MoeForCausalLM"),
    "glm4_moe_lite": ("Glm4MoeLite", "Glm4MoeLiteForCausalLM"),
    "minimax_m2": ("MiniMaxM2MoE", "MiniMaxM2ForCausalLM"),
    "olmoe": ("OlmoeMoE", "OlmoeForCausalLM"),
    "qwen2_moe": ("Qwen2MoeSparseMoeBlock", "Qwen2MoeForCausalLM"),
    "qwen3_moe": ("Qwen3MoeSparseMoeBlock", "Qwen3MoeForCausalLM"),
}
"""By vLLM's module: the MoE block, and the model."""


def _of(family: str) -> tuple[Symbol, ...]:
    module = f"vllm.model_executor.models.{family}"
    block, model = _CLASSES[family]
    return (
        Symbol(module, block),
        Symbol(module, model),
        Symbol(module, f"{model}.__init__", ("vllm_config", "prefix")),
        Symbol(module, f"{model}.load_weights", ("weights",)),
    )


PATCHED = tuple(
    Symbol(f"vllm.model_executor.models.{family}", name)
    for family in _CLASSES
    for name in ("FusedMoEFactory", "make_layers")
    if (family, name) != ("glm4_moe_lite", "FusedMoEFactory")
)
"""Not imported: others stand in their place while a model is built."""

SYMBOLS = tuple(symbol for family in _CLASSES for symbol in _of(family)) + PATCHED
