"""config.json of the output: every field kept that the plan does not change."""

import copy
import dataclasses
import hashlib
from typing import Any

from ..checkpoint.config_values import MTP_OVERRIDES, OVERRIDES
from ..checkpoint.module_names import CONFIG_KEY
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.remap import (
    CONFIG_BLOCK,
    FILE_NAME,
    FORMAT_VERSION,
    ExpertRemap,
    RemapLayer,
    dump_remap,
)
from ..decide.cut_plan import CutPlan
from .quantized_config import quantization_config
from .renumbered_config import renumbered


def pruned_config(
    checkpoint: Checkpoint, plan: CutPlan, remap: ExpertRemap
) -> dict[str, Any]:
    """The output's configuration.

    A uniform plan leaves plain counts and the stock architecture. Layers that differ
    go into ``per_layer_config`` under the class's real attribute names, so that a
    stack without the plugin refuses to load instead of misreading.
    """
    arch, keys = checkpoint.arch, checkpoint.arch.config
    config = copy.deepcopy(checkpoint.config)
    left = [layer.layer for layer in plan.layers if layer.action != "drop-block"]
    decoders = len(checkpoint.decoder_layers)
    survivors = [index for index in left if index < decoders]
    # MTP layers follow the decoder layers and have a count of their own.
    further = [index for index in left if index >= decoders]
    for key in arch.per_layer_lists:
        if isinstance(config.get(key), list):
            config[key] = [config[key][index] for index in survivors]
    config[keys.layers] = len(survivors)
    if keys.mtp_layers is not None and config.get(keys.mtp_layers) is not None:
        config[keys.mtp_layers] = len(further)
    # The largest count is the global one; smaller ones go into per_layer_config.
    config[keys.experts] = max(len(entry.kept) for entry in remap.all_layers)
    # A router cannot choose more rows than it has.
    top_k = max(layer.top_k for layer in checkpoint.moe_layers)
    config[keys.top_k] = min(
        top_k, max(len(entry.router_rows) for entry in remap.all_layers)
    )
    _set_widths(checkpoint, plan, left, config)
    patterns = _patterns(checkpoint, survivors, remap, config)
    overrides = {
        OVERRIDES: _overrides(checkpoint, plan, survivors, remap, config, patterns),
        MTP_OVERRIDES: _mtp_overrides(checkpoint, plan, further, remap, config),
    }
    # The overrides of an earlier cut speak of other layers and counts.
    for key, values in overrides.items():
        config.pop(key, None)
        if values:
            config[key] = values
    # Stock vLLM has one expert count, no redirects and groups of equal size.
    stock = (
        not any(overrides.values())
        and plan.routing == "drop"
        and checkpoint.layout.stock_vllm
        and all(
            _equal_groups(entry, checkpoint.rule.groups) for entry in remap.all_layers
        )
    )
    config["architectures"] = [
        arch.stock_architecture if stock else arch.pruned_architecture
    ]
    if plan.is_quantized:
        config[CONFIG_KEY] = quantization_config(checkpoint, plan)
    elif isinstance(config.get(CONFIG_KEY), dict):
        config[CONFIG_KEY] = renumbered(checkpoint, plan)
    config[CONFIG_BLOCK] = {
        "format_version": FORMAT_VERSION,
        "tool_version": plan.tool_version,
        "remap": FILE_NAME,
        # load_remap refuses a table with other bytes.
        "remap_sha256": hashlib.sha256(dump_remap(remap)).hexdigest(),
    }
    return config


def _overrides(
    checkpoint: Checkpoint,
    plan: CutPlan,
    survivors: list[int],
    remap: ExpertRemap,
    config: dict[str, Any],
    patterns: dict[int, dict[str, int]],
) -> dict[str, dict[str, Any]]:
    """``per_layer_config``: what differs from the global values, and nothing else."""
    keys, skip_name = checkpoint.arch.config, checkpoint.arch.skip_name
    earlier = config.get(OVERRIDES) or {}
    overrides = {}
    for new, old in enumerate(survivors):
        entry = remap.layers[new]
        told = earlier.get(str(old), {})
        # Keys that follow from this plan; what else was told of a layer stays.
        rewritten = {*checkpoint.arch.pattern.keys}
        if entry.moe or entry.moe_dropped:
            groups = checkpoint.arch.router.groups.name
            rewritten |= {keys.experts, keys.top_k, groups or ""}
        rewritten |= {keys.width, checkpoint.arch.shared_count.name or ""}
        layer = {key: told[key] for key in told if key not in rewritten}
        layer |= patterns.get(new, {})
        layer |= _widths(checkpoint, plan, old, config)
        if entry.moe_dropped:
            # A count of 0 makes readers of the global count fail, as they must.
            skipped = [name for name in told.get("skip", ()) if name != skip_name]
            layer |= {keys.experts: 0, "skip": [*skipped, skip_name]}
        elif entry.moe:
            layer |= _counts(checkpoint, old, entry, config)
        if layer:
            overrides[str(new)] = layer
    return overrides


def _set_widths(
    checkpoint: Checkpoint, plan: CutPlan, left: list[int], config: dict[str, Any]
) -> None:
    """Give all layers the widest experts' width; what differs is said of each layer."""
    arch = checkpoint.arch
    widths = {
        layer.width: layer.shared_width
        for layer in (_left(checkpoint, plan, index) for index in left)
        if layer.has_moe and not plan.layers[layer.index].drops_moe
    }
    config[arch.config.width] = widest = max(widths)
    shared, count = arch.shared_count, widths[widest] // widest
    if shared.name is not None and shared.read(config) != count:
        config[shared.name] = count


def _left(checkpoint: Checkpoint, plan: CutPlan, index: int) -> Layer:
    """A layer with the width that its experts have afterwards."""
    layer, width = checkpoint.layers[index], plan.layers[index].width
    return layer if width is None else dataclasses.replace(layer, width=width)


def _widths(
    checkpoint: Checkpoint, plan: CutPlan, old: int, config: dict[str, Any]
) -> dict[str, int]:
    """A layer's widths where they are not what the global keys make of it."""
    arch, layer = checkpoint.arch, _left(checkpoint, plan, old)
    found = {}
    if layer.has_moe and not plan.layers[old].drops_moe:
        if layer.width != config[arch.config.width]:
            found[arch.config.width] = layer.width
        shared, count = arch.shared_count, layer.shared_width // layer.width
        if shared.name is not None and count != shared.read(config):
            found[shared.name] = count
    # Arctic's dense layers go by the key of the experts' width.
    dense = not layer.has_moe and not layer.dropped and layer.dense_width > 0
    if dense and layer.dense_width != config[arch.dense_width]:
        found[arch.dense_width] = layer.dense_width
    return found


def _counts(
    checkpoint: Checkpoint, old: int, entry: RemapLayer, config: dict[str, Any]
) -> dict[str, int]:
    """A layer's numbers of experts and groups where they are not the global ones."""
    keys = checkpoint.arch.config
    found: dict[str, int] = {
        keys.experts: len(entry.kept),
        keys.top_k: min(checkpoint.layers[old].top_k, len(entry.router_rows)),
    }
    groups = checkpoint.arch.router.groups.name
    if groups is not None and not _equal_groups(entry, checkpoint.rule.groups):
        # No number says which groups they are; readers of the global one fail. Not
        # null: some families' classes want a whole number.
        found[groups] = 0
    return {key: value for key, value in found.items() if value != config[key]}


def _mtp_overrides(
    checkpoint: Checkpoint,
    plan: CutPlan,
    further: list[int],
    remap: ExpertRemap,
    config: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """The same for layers that predict further tokens, counted from 0."""
    overrides = {
        str(new): _counts(checkpoint, old, entry, config)
        | _widths(checkpoint, plan, old, config)
        for new, (old, entry) in enumerate(zip(further, remap.mtp_layers, strict=True))
    }
    return {key: values for key, values in overrides.items() if values}


def _patterns(
    checkpoint: Checkpoint,
    survivors: list[int],
    remap: ExpertRemap,
    config: dict[str, Any],
) -> dict[int, dict[str, int]]:
    """Make ``config`` say which layers are dense; what it cannot, is returned."""
    has_moe = [
        None if entry.moe_dropped else checkpoint.layers[old].has_moe
        for old, entry in zip(survivors, remap.layers, strict=True)
    ]
    changed, alone = checkpoint.arch.pattern.renumbered(config, has_moe)
    config.update(changed)
    config.update(checkpoint.arch.pattern.spelled(config, alone, len(has_moe)))
    return alone


def _equal_groups(entry: RemapLayer, count: int) -> bool:
    """Whether stock routers, which cut rows into equal groups, see the right ones."""
    if entry.groups is None:
        return True
    # vLLM's grouped_topk views the scores as [N, groups, rows / groups].
    rows = len(entry.groups)
    in_order = tuple(row * count // rows for row in range(rows))
    return rows % count == 0 and entry.groups == in_order
