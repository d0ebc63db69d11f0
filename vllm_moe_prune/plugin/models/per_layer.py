"""Build one of vLLM's MoE models with a configuration per layer, copying nothing of it.

vLLM's models make their decoder layers through ``make_layers``, one by one and by name.
While a model is built, its module sees another ``make_layers``, which says which layer
it is; a configuration that answers for that layer; and a MoE class that hands on what
it gets where the sublayer was dropped, and routes as the remap table says.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index

from ...archs.spec import MoeArch, RouterRule
from ..compat import lacks_router
from ..load.resolve_layers import rule_of
from ..load.served_layer import ServedLayer
from .identity import Identity
from .moe_parts import connect_rows, count_experts, row_table
from .routing import route_rows

FUSED_SHARED = "resolve_layer_fused_shared_expert"
"""AMD's way to run shared experts as further routed ones, after one global number."""


@contextmanager
def per_layer(
    moe_class: type[nn.Module],
    layers: Sequence[ServedLayer],
    arch: MoeArch,
    vllm_config: VllmConfig,
) -> Iterator[None]:
    """Let the constructors of a module of vLLM's build each layer as it is.

    Args:
        moe_class: Of vLLM's, in the module of the model; in layers that have
            ``post_attention_layernorm``.
        layers: What each layer is.
        arch: The family's table.
        vllm_config: vLLM's, whose model configuration is another one meanwhile.
    """
    module, moe_name = sys.modules[moe_class.__module__], moe_class.__name__
    model_config = vllm_config.model_config
    views = model_config.hf_config.per_layer_config
    config = _answering(model_config.hf_config)
    # vLLM's loaders map as many experts as this says, so the largest layer's.
    largest = max(layers, key=lambda layer: layer.experts)
    object.__setattr__(config, "_answers", views[largest.index])
    rule = rule_of(model_config, arch)
    building: list[ServedLayer] = []

    def make_layers(count: int, layer_fn: Callable[..., nn.Module], prefix: str) -> Any:
        def build(prefix: str) -> nn.Module:
            layer = layers[extract_layer_index(prefix)]
            building.append(layer)
            view = copy.copy(views[layer.index])
            if layer.has_moe:
                # Gates and their biases are as long as it says; experts are told.
                setattr(view, arch.config.experts, layer.router_rows)
            object.__setattr__(config, "_answers", view)
            built = layer_fn(prefix=prefix)
            object.__setattr__(config, "_answers", views[largest.index])
            building.pop()
            if arch.dense_mlp and not (layer.has_moe or layer.dense):
                # Some layers without experts make themselves a dense MLP.
                setattr(built, arch.skip_name, Identity())
            if not (layer.has_moe or layer.dense or layer.norm_only):
                built.post_attention_layernorm = Identity()
            return built

        return made_by(count, build, prefix=prefix)

    made_by: Any = module.make_layers
    moe = _pruned(moe_class, building, rule, vllm_config)
    with (
        _set(module, {"make_layers": make_layers, moe_name: moe}),
        _set(model_config, {"hf_config": config, "hf_text_config": config}),
    ):
        yield


def _answering(config: Any) -> Any:
    """A configuration of the same class, whose every attribute is that of another."""

    class Answering(type(config)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            # Not through this method again.
            own = object.__getattribute__(self, "__dict__")
            if name in ("__class__", "__dict__"):
                return object.__getattribute__(self, name)
            # What a constructor set is there for those that follow.
            return own[name] if name in own else getattr(own["_answers"], name)

    return Answering.__new__(Answering)


def _pruned(
    stock: Any, building: list[ServedLayer], rule: RouterRule, vllm_config: VllmConfig
) -> type[nn.Module]:
    # Where the constructor is, which the class may have from another module.
    home = sys.modules[stock.__init__.__module__]

    class PrunedMoE(stock):
        def __new__(cls, *_args: Any, **_options: Any) -> Any:
            """Nothing with experts where there are none: ``__init__`` is not run."""
            return super().__new__(cls) if building[-1].has_moe else Identity()

        def __init__(self, *args: Any, **options: Any) -> None:
            with _set(home, _parts(home, self, building[-1], rule, vllm_config)):
                super().__init__(*args, **options)
            connect_rows(self, vllm_config)

    return PrunedMoE


def _parts(
    home: ModuleType,
    moe: Any,
    layer: ServedLayer,
    rule: RouterRule,
    vllm_config: VllmConfig,
) -> dict[str, Any]:
    """What the constructor of a MoE block takes from its module, for one layer."""
    make_experts: Any = home.FusedMoEFactory

    def experts(**options: Any) -> Any:
        count_experts(moe, layer, vllm_config)
        sigmoid, grouped = rule.scores == "sigmoid", options.get("use_grouped_topk")
        lacking = lacks_router(sigmoid=sigmoid, grouped=bool(grouped))
        moe.rows = row_table(moe, layer, vllm_config, always=lacking)
        bias_R = options.get("e_score_correction_bias")

        def route(
            hidden_states: Any, gating_output: Any, topk: int, renormalize: bool
        ) -> Any:
            return route_rows(
                gating_output,
                moe.rows,
                top_k=topk,
                renormalize=renormalize,
                sigmoid=sigmoid,
                bias_R=bias_R,
                top_groups=rule.top_groups,
            )

        options |= {"num_experts": layer.experts, "renormalize": rule.renormalize}
        if "num_expert_group" in options:
            options["num_expert_group"] = rule.groups
        if "routed_scaling_factor" in options:
            # vLLM's routers do not all scale, its runner always does.
            options["apply_routed_scale_to_output"] = True
        if moe.rows is not None:
            options["custom_routing_function"] = route
            # Our routing adds the bias itself, and knows groups of unequal size.
            options |= {"use_grouped_topk": False, "e_score_correction_bias": None}
        return make_experts(**options)

    parts: dict[str, Any] = {"FusedMoEFactory": experts}
    if hasattr(home, FUSED_SHARED):
        parts[FUSED_SHARED] = lambda *_args: False
    return parts


@contextmanager
def _set(owner: Any, values: dict[str, Any]) -> Iterator[None]:
    """Other attributes for a while."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
