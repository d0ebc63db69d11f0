"""Values of config.json, checked as they are read: a config is hostile until then."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..archs.pattern import DENSE, SPARSE
from ..archs.spec import Key, MoeArch, RouterRule
from ..errors import CheckpointError

FLOATS = ("BF16", "F16", "F32")
SCORES = ("softmax", "sigmoid")
# transformers' names for what single layers see instead of the global values; layers
# that predict further tokens are counted from 0 again.
OVERRIDES = "per_layer_config"
MTP_OVERRIDES = "mtp_per_layer_config"
MAX_EXPERTS = 1 << 13
"""Of a layer; far above any model's."""


def positive(config: Mapping[str, Any], key: str, where: Path, least: int = 1) -> int:
    """A whole number of at least ``least`` that config.json must have.

    Raises:
        CheckpointError: It is missing or something else.
    """
    if key not in config:
        raise CheckpointError(f"{where}: key {key!r} is missing.")
    if isinstance(config[key], list):
        example = json.dumps({"1": {key: least + 1}})
        raise CheckpointError(
            f"{where}: {key} is a list, as other tools give each layer a number of its "
            "own. Write the largest there and the others into per_layer_config (like "
            f"{example}); then `vllm-moe-prune convert` and all other commands read it."
        )
    return whole(config[key], key, where, least)


def whole(value: object, key: str | None, where: Path, least: int = 1) -> int:
    """``value`` itself, if it is a whole number of at least ``least``."""
    # bool is a subclass of int: true must not count as 1.
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CheckpointError(
            f"{where}: {key} is {value!r}; expected a whole number of at least {least}."
        )
    return value


def check_pattern(arch: MoeArch, view: Mapping[str, Any], where: Path) -> None:
    """Refuse values of the keys that say which layers have experts.

    Raises:
        CheckpointError: Naming the key.
    """
    pattern = arch.pattern
    whole(pattern.first.read(view), pattern.first.name, where, least=0)
    whole(pattern.frequency.read(view), pattern.frequency.name, where)
    listed: object = pattern.listed(view)
    if listed is not None and not (
        isinstance(listed, list) and all(one in (SPARSE, DENSE) for one in listed)
    ):
        raise CheckpointError(
            f"{where}: {pattern.types} is {str(listed)[:100]}; expected a list of "
            f"{SPARSE!r} and {DENSE!r}."
        )


def check_types(
    arch: MoeArch, view: Mapping[str, Any], index: int, where: Path
) -> None:
    """Refuse two keys that say different things of a layer to their readers.

    Raises:
        CheckpointError: Naming the layer.
    """
    pattern = arch.pattern
    listed = pattern.listed(view)
    if listed is None or view.get(pattern.first.name or "") is None:
        return
    if pattern.counted(view, index) != (listed[index] == SPARSE):
        raise CheckpointError(
            f"{where}: {pattern.types} says layer {index} is {listed[index]}, but "
            f"{pattern.first.name} is {pattern.first.read(view)}: transformers reads "
            "the one, vLLM the other."
        )


def check_dense(arch: MoeArch, config: Mapping[str, Any], where: Path) -> None:
    """Refuse values of the keys that say which MLPs stand beside the experts.

    Raises:
        CheckpointError: Naming the key.
    """
    whole(arch.shared_key.read(config), arch.shared_key.name, where, least=0)
    if arch.dense_mlp is not None:
        positive(config, arch.dense_width, where)
    if arch.residual is not None:
        _flag(arch.residual.present, config, where)


def router_rule(arch: MoeArch, config: Mapping[str, Any], where: Path) -> RouterRule:
    """How the routers of a checkpoint decide.

    Raises:
        CheckpointError: Naming the key whose value no router could follow.
    """
    keys = arch.router
    scores = keys.scores.read(config)
    if scores not in SCORES:
        raise CheckpointError(
            f"{where}: {keys.scores.name} is {scores!r}; known are {', '.join(SCORES)}."
        )
    groups = _groups(arch, config, where)
    top_groups = whole(keys.top_groups.read(config), keys.top_groups.name, where)
    # With one group there is nothing to choose from, whatever top_groups says.
    if groups > 1 and top_groups > groups:
        raise CheckpointError(
            f"{where}: {keys.top_groups.name} is {top_groups}, but there are only "
            f"{groups} groups."
        )
    # Arctic does not renormalize top-1: the one weight stays its score.
    single = positive(config, arch.config.top_k, where) == 1
    renormalize = _flag(keys.renormalize, config, where)
    return RouterRule(
        scores=scores,
        renormalize=renormalize and (keys.renormalize_single or not single),
        scale=_factor(keys.scale, config, where),
        groups=groups,
        top_groups=top_groups if groups > 1 else 1,
        group_best=keys.group_best,
        fp32=keys.fp32,
    )


def _groups(arch: MoeArch, config: Mapping[str, Any], where: Path) -> int:
    keys = arch.router
    method = keys.method.read(config)
    if method not in keys.methods:
        raise CheckpointError(
            f"{where}: {keys.method.name} is {method!r}; known are "
            f"{', '.join(keys.methods)}."
        )
    if method in keys.ungrouped:
        return 1
    return whole(keys.groups.read(config), keys.groups.name, where)


def _flag(key: Key, config: Mapping[str, Any], where: Path) -> bool:
    value = key.read(config)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key.name} is {value!r}, not true or false.")
    return value


def _factor(key: Key, config: Mapping[str, Any], where: Path) -> float:
    value = key.read(config)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN fails as well: it compares false with either end.
    if not number or not 0 < value < math.inf:
        raise CheckpointError(f"{where}: {key.name} is {value!r}, not a factor.")
    return float(value)


def check_lists(config: dict[str, Any], arch: MoeArch, count: int, where: Path) -> None:
    """Refuse lists of values per layer that are not as long as the model.

    Raises:
        CheckpointError: Naming the key.
    """
    for key in arch.per_layer_lists:
        values = config.get(key)
        if isinstance(values, list) and len(values) != count:
            raise CheckpointError(
                f"{where}: {key} lists {len(values)} layers, but {arch.config.layers} "
                f"is {count}."
            )


def check_beyond(
    arch: MoeArch, names: Collection[str], layers: int, total: int, folder: Path
) -> None:
    """Refuse tensors of layers behind the last one.

    Args:
        arch: The family.
        names: Of all tensors.
        layers: How many decoder layers config.json counts.
        total: Those, and layers that predict further tokens.
        folder: Named in the error.

    Raises:
        CheckpointError: Naming the first such layer.
    """
    indices = {name: arch.layer_of(name) for name in names}
    beyond = {each for each in indices.values() if each is not None and each >= total}
    if not beyond:
        return
    said = (
        f"{folder}: tensors of layer {min(beyond)} found, but config.json says "
        f"{arch.config.layers} is {layers}."
    )
    # Names that only MTP layers have tell which key counts too few.
    key, inner = arch.config.mtp_layers, tuple(arch.mtp.all)
    if key and any(indices[name] in beyond and name.endswith(inner) for name in names):
        said += (
            f" Layers that predict further tokens (MTP) are counted by {key}: set it "
            f"to {len(beyond) + total - layers}."
        )
    raise CheckpointError(said)
