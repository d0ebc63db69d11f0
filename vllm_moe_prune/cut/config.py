"""config.json of the output: every field kept that the plan does not change."""

import copy
import hashlib
from typing import Any

from ..checkpoint.open import Checkpoint
from ..checkpoint.remap import (
    CONFIG_BLOCK,
    FILE_NAME,
    FORMAT_VERSION,
    ExpertRemap,
    dump_remap,
)
from ..decide.plan import CutPlan


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
    survivors = [layer.layer for layer in plan.layers if layer.action != "drop-block"]
    for key in arch.per_layer_lists:
        if isinstance(config.get(key), list):
            config[key] = [config[key][index] for index in survivors]
    config[keys.layers] = len(survivors)
    config[keys.experts] = max(len(entry.kept) for entry in remap.layers)
    top_k = max(layer.top_k for layer in checkpoint.moe_layers)
    config[keys.top_k] = min(
        top_k, max(len(entry.router_rows) for entry in remap.layers)
    )
    overrides = _overrides(checkpoint, survivors, remap, config)
    config.pop("per_layer_config", None)
    if overrides:
        config["per_layer_config"] = overrides
    stock = not overrides and plan.routing == "drop" and checkpoint.layout.stock_vllm
    config["architectures"] = [
        arch.stock_architecture if stock else arch.pruned_architecture
    ]
    config[CONFIG_BLOCK] = {
        "format_version": FORMAT_VERSION,
        "tool_version": plan.tool_version,
        "remap": FILE_NAME,
        "remap_sha256": hashlib.sha256(dump_remap(remap)).hexdigest(),
    }
    return config


def _overrides(
    checkpoint: Checkpoint,
    survivors: list[int],
    remap: ExpertRemap,
    config: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """``per_layer_config``: what differs from the global values, and nothing else."""
    keys, skip_name = checkpoint.arch.config, checkpoint.arch.skip_name
    earlier = config.get("per_layer_config") or {}
    overrides = {}
    for new, old in enumerate(survivors):
        entry = remap.layers[new]
        told = earlier.get(str(old), {})
        layer = {
            key: value
            for key, value in told.items()
            if key not in {keys.experts, keys.top_k}
        }
        if entry.moe_dropped:
            # A count of 0 makes readers of the global count fail, as they must.
            skipped = [name for name in told.get("skip", ()) if name != skip_name]
            layer |= {keys.experts: 0, "skip": [*skipped, skip_name]}
        elif not entry.moe:
            layer = dict(told)
        else:
            if len(entry.kept) != config[keys.experts]:
                layer[keys.experts] = len(entry.kept)
            top_k = min(checkpoint.layers[old].top_k, len(entry.router_rows))
            if top_k != config[keys.top_k]:
                layer[keys.top_k] = top_k
        if layer:
            overrides[str(new)] = layer
    return overrides
