"""Writing layers that lost experts so that stock vLLM from 0.33 on serves them.

The compact form, experts renumbered and layers that differ, becomes expert substitution
(``checkpoint/substitution.py``): the removed get vectors, the router all its rows.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..archs.spec import TensorRule
from ..checkpoint.config_values import MTP_OVERRIDES, OVERRIDES
from ..checkpoint.expert_tensors import EXPERT
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import DTYPES, read_tensor
from ..checkpoint.remap import CONFIG_BLOCK
from ..checkpoint.substitution import BLOCK, KEY, NEVER, SUFFIX, Spelled, Substituted
from ..checkpoint.writer import TensorSpec
from ..decide.cut_plan import CutPlan
from ..errors import PlanError
from .build_remap import build_remap
from .config import pruned_config
from .layer_cut import layer_cuts
from .slice import OutputTensor, StoredPart

Means = Mapping[int, Mapping[int, torch.Tensor]]
"""Output layer -> removed expert -> the mean of its outputs [D]."""


@dataclass(frozen=True)
class Spelling:
    """What becomes of the tensors of a compact checkpoint."""

    layers: dict[int, Substituted]
    """By output layer; those that lost no expert are not in."""
    masked: bool
    """Whether rows of removed experts are added, never to be chosen."""


def spelling_of(checkpoint: Checkpoint) -> Spelling:
    """The spelling of a checkpoint that was cut, in its compact form.

    Raises:
        PlanError: Stock vLLM could not serve it so; why.
    """
    remap = checkpoint.remap
    if remap is None:
        raise PlanError(
            f"{checkpoint.folder}: was never cut; stock vLLM serves it as it is."
        )
    if is_stock(checkpoint, checkpoint.config):
        return Spelling({}, masked=False)
    layers = {}
    for layer, entry in zip(checkpoint.layers, remap.all_layers, strict=True):
        if entry.moe and len(entry.kept) < entry.experts_before:
            masked = remap.routing == "drop"
            if not masked and entry.router_rows != tuple(range(entry.experts_before)):
                raise PlanError(
                    f"layer {layer.index}: its router lacks rows of an earlier cut. "
                    "Cut the original instead."
                )
            gone = set(range(entry.experts_before)) - set(entry.kept)
            layers[layer.index] = Substituted(entry.experts_before, tuple(sorted(gone)))
            _check_layer(layer, entry.kept, entry.redirect, masked=masked)
        elif entry.moe_dropped:
            raise PlanError(
                f"layer {layer.index}: its MoE sublayer is dropped, and stock vLLM "
                "needs at least one expert in each. Serve it with the plugin."
            )
    if unknown := sorted(_overridden(checkpoint) - layers.keys()):
        raise PlanError(
            f"{checkpoint.folder}: layer {unknown[0]} has fewer experts, but which "
            "were removed is not known. Cut the original."
        )
    check_form(checkpoint, masked=remap.routing == "drop" and bool(layers))
    return Spelling(layers, remap.routing == "drop")


def is_stock(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether stock vLLM serves it by a config.json without any other spelling."""
    return bool(config["architectures"] == [checkpoint.arch.stock_architecture])


def _overridden(checkpoint: Checkpoint) -> set[int]:
    """Layers that have another number of experts by config.json."""
    found, count = set(), len(checkpoint.decoder_layers)
    for key, first in ((OVERRIDES, 0), (MTP_OVERRIDES, count)):
        for at, values in (checkpoint.config.get(key) or {}).items():
            if checkpoint.arch.config.experts in values:
                found.add(first + int(at))
    return found


def planned_parts(
    checkpoint: Checkpoint, plan: CutPlan, tensors: Sequence[OutputTensor]
) -> list[TensorSpec]:
    """Every tensor of the spelled output of a plan, in the order of the compact one."""
    config = pruned_config(checkpoint, plan, build_remap(checkpoint, plan))
    if is_stock(checkpoint, config):
        return list(tensors)
    layers, new = {}, {}
    for cut in layer_cuts(checkpoint, plan):
        one = cut.layer_plan
        if not cut.drops_block:
            new[cut.index] = cut.new_index
            if one.keep and len(one.keep) < one.experts:
                gone = set(range(one.experts)) - set(one.keep)
                layers[cut.new_index] = Substituted(one.experts, tuple(sorted(gone)))
    spelling = Spelling(layers, plan.routing == "drop")
    rules = checkpoint.layout.router_parts
    parts: list[TensorSpec] = [
        spelled_part(
            spelling, tensor, None if tensor.layer is None else new[tensor.layer], rules
        )
        for tensor in tensors
    ]
    for index, substituted in sorted(layers.items()):
        parts += constant_parts(checkpoint, index, substituted)
    return parts


def check_spelling(checkpoint: Checkpoint, plan: CutPlan) -> None:
    """Refuse before the cut what stock vLLM would refuse of its output.

    Raises:
        PlanError: Naming what it is.
    """
    config = pruned_config(checkpoint, plan, build_remap(checkpoint, plan))
    if is_stock(checkpoint, config):
        return
    cuts = [cut for cut in layer_cuts(checkpoint, plan) if not cut.drops_block]
    gone = False
    for cut in cuts:
        one = cut.layer_plan
        if one.drops_moe:
            raise PlanError(
                f"layer {cut.index}: spelling stock-vllm cannot drop a MoE sublayer: "
                "vLLM needs at least one expert in each. Drop the block, or keep some."
            )
        if one.narrows:
            raise PlanError(
                f"layer {cut.index}: spelling stock-vllm has one width for all "
                "layers. Set narrow.share: 0."
            )
        if cut.layer.has_moe and len(one.keep) < one.experts:
            gone = True
            redirect = cut.redirect if cut.keeps_router else None
            kept = one.keep
            _check_layer(cut.layer, kept, redirect, masked=plan.routing == "drop")
    if plan.is_quantized or plan.recipe.storage != "dense":
        raise PlanError(
            "spelling stock-vllm: vLLM substitutes experts in plain weights only. Set "
            "quantize.method: none and storage: dense."
        )
    check_form(checkpoint, masked=plan.routing == "drop" and gone)


def _check_layer(
    layer: Layer,
    kept: tuple[int, ...],
    redirect: tuple[int | None, ...] | None,
    *,
    masked: bool,
) -> None:
    at = f"layer {layer.index}: spelling stock-vllm"
    if layer.mtp:
        raise PlanError(
            f"{at} cannot remove experts of a layer that predicts further tokens. Set "
            "layers.mtp: drop."
        )
    if tuple(sorted(kept)) != kept:
        raise PlanError(f"{at} keeps experts in their order; sort the plan's keep.")
    served = [one for one in redirect or () if one is not None]
    if len({*served}) < len(served):
        raise PlanError(
            f"{at} has no redirects: rows of removed experts lead nowhere (routing: "
            "preserve or mean) or leave (drop)."
        )
    if masked and len(kept) < layer.top_k:
        raise PlanError(
            f"{at} keeps {len(kept)} experts, fewer than the {layer.top_k} that a "
            "token chooses, so rows that must not be chosen would be. Keep more, or "
            "set routing: preserve."
        )


def check_form(checkpoint: Checkpoint, *, masked: bool) -> None:
    """Refuse a family, a layout or weights that vLLM does not substitute.

    Args:
        checkpoint: The input, or the compact form of the output.
        masked: Whether rows of removed experts must never be chosen.

    Raises:
        PlanError: Naming what it is.
    """
    arch, where = checkpoint.arch, checkpoint.folder
    if not arch.stock_vllm:
        raise PlanError(f"{where}: stock vLLM has no {arch.model_type}.")
    if checkpoint.form is not None or checkpoint.blocks is not None:
        raise PlanError(
            f"{where}: its experts are quantized, which vLLM does not substitute. "
            "Start from bf16 weights, or leave spelling: moe-prune."
        )
    packed = not all(rule.per_expert for rule in checkpoint.layout.experts)
    if packed or not checkpoint.layout.stock_vllm:
        raise PlanError(
            f"{where}: vLLM substitutes experts that have tensors of their own, under "
            f"the Hub's names; these are laid out as {checkpoint.layout.name}. Save "
            "the model with its experts apart, as the Hub has it."
        )
    if masked and checkpoint.layout.rule("router_bias") is None:
        raise PlanError(
            f"{where}: routing: drop in stock vLLM needs a router with a bias that "
            "only chooses, which this family has not. Set routing: mean or preserve."
        )


def spelled_part(
    spelling: Spelling, part: TensorSpec, layer: int | None, rules: Iterable[TensorRule]
) -> StoredPart:
    """A tensor of the compact form as it is stored: its name, and a router's rows.

    Args:
        spelling: Of the whole checkpoint.
        part: The tensor.
        layer: Its output layer.
        rules: Of routers.
    """
    one = spelling.layers.get(layer) if layer is not None else None
    if one is None or layer is None:
        return StoredPart(part.name, part.dtype, part.shape)
    if spelling.masked and part.name in {rule.name(layer) for rule in rules}:
        return StoredPart(part.name, part.dtype, (one.experts, *part.shape[1:]))
    name = part.name
    if match := EXPERT.match(name):
        old = one.kept[int(match["expert"])]
        name = f"{match['before']}{old}{match['after']}"
    return StoredPart(name, part.dtype, part.shape)


def constant_parts(
    checkpoint: Checkpoint, layer: int, one: Substituted
) -> list[StoredPart]:
    """The vectors of a layer's removed experts, in the dtype of their weights."""
    rule = checkpoint.layout.experts[0]
    prefix = EXPERT.match(rule.name(layer, 0))
    assert prefix is not None
    source = checkpoint.moe_layers[0].index
    dtype = checkpoint.tensors[rule.name(source, 0)].dtype
    hidden = checkpoint.config[checkpoint.arch.config.hidden]
    return [
        StoredPart(f"{prefix['before']}{expert}{SUFFIX}", dtype, (hidden,))
        for expert in one.removed
    ]


def all_rows(compact: torch.Tensor, one: Substituted, rule: TensorRule) -> torch.Tensor:
    """A router [E, D] or its bias [E] with rows for removed experts, never chosen."""
    fill = NEVER if rule.role == "router_bias" else 0.0
    shape = (one.experts, *compact.shape[1:])
    rows = torch.full(shape, fill, dtype=compact.dtype)
    rows[torch.tensor(one.kept)] = compact
    return rows


def constant(part: StoredPart, layer: int, means: Means | None) -> torch.Tensor:
    """The vector of one removed expert."""
    dtype = DTYPES[part.dtype]
    if means is None:
        return torch.zeros(part.shape, dtype=dtype)
    match = EXPERT.match(part.name)
    assert match is not None
    return means[layer][int(match["expert"])].to(dtype)


def spelled_config(
    checkpoint: Checkpoint, spelling: Spelling, *, means: bool
) -> dict[str, Any]:
    """config.json of the spelled form of a compact checkpoint.

    Raises:
        PlanError: A layer differs otherwise than in its experts.
    """
    config, arch = copy.deepcopy(checkpoint.config), checkpoint.arch
    keys = arch.config
    allowed = {keys.experts, arch.router.groups.name}
    for key in (OVERRIDES, MTP_OVERRIDES):
        for layer, values in config.get(key, {}).items():
            if other := sorted(values.keys() - allowed):
                raise PlanError(
                    f"layer {layer}: stock vLLM has one {other[0]} for all layers, but "
                    "this one differs. Serve it with the plugin."
                )
    if not spelling.layers:
        return config
    counts = {one.experts for one in spelling.layers.values()}
    counts |= {
        layer.num_experts
        for layer in checkpoint.moe_layers
        if layer.index not in spelling.layers
    }
    if len(counts) > 1:
        raise PlanError(
            f"{checkpoint.folder}: routers of {sorted(counts)} experts; stock vLLM has "
            "one number. Cut the original instead."
        )
    changed: dict[str, Any] = {
        keys.experts: counts.pop(),
        "architectures": [arch.stock_architecture],
        **dict.fromkeys((OVERRIDES, MTP_OVERRIDES)),
    }
    restored = {
        key: config.get(key)
        for key, value in changed.items()
        if value != config.get(key)
    }
    for key in restored:
        if changed[key] is None:
            del config[key]
        else:
            config[key] = changed[key]
    config[KEY] = {
        str(index): list(one.removed) for index, one in sorted(spelling.layers.items())
    }
    spelled = Spelled(
        router="masked" if spelling.masked else "kept",
        constants="means" if means else "zeros",
        restored=restored,
    )
    config[CONFIG_BLOCK][BLOCK] = spelled.model_dump(mode="json")
    return config


def spelled_rows(
    checkpoint: Checkpoint, name: str, layer: int, spelling: Spelling
) -> torch.Tensor:
    """A tensor of a router, with a row for every expert."""
    parts = checkpoint.layout.router_parts
    rule = next(rule for rule in parts if rule.name(layer) == name)
    compact = read_tensor(checkpoint.tensors[name])
    return all_rows(compact, spelling.layers[layer], rule)
