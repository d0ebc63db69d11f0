"""Expert substitution: how vLLM from 0.33 on spells layers that lost experts.

Experts that are left keep their ids in tensor names, the router keeps a row for every
expert, and each removed one has a vector ``...experts.<id>.approx_value`` [D] that
stands for its output (vllm#50415). Opening such a checkpoint gives the form in which
this tool writes layers that differ: experts renumbered, overrides per layer.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue, ValidationError

from ..archs.spec import MoeArch
from ..errors import CheckpointError
from ..recipes.schema import Strict, first_problem
from .config_values import FLOATS, MAX_EXPERTS, OVERRIDES, positive
from .expert_tensors import EXPERT
from .index import TensorInfo
from .remap import CONFIG_BLOCK

KEY = "approximate_experts"
DECLARED = ("compression_config", "transform_config", "expert_substitution")
"""The other spelling that vLLM reads: keys within keys of config.json."""
SUFFIX = ".approx_value"
BLOCK = "substitution"
"""In our block of config.json: what else the compact form has."""
NEVER = -1e4
"""Added to the scores of a row, it keeps the row from being chosen."""
SEMANTICS = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}


class Spelled(Strict):
    """What our block says of a checkpoint that this tool spelled so."""

    version: Literal[1] = 1
    router: Literal["kept", "masked"]
    """Rows of removed experts: as they were, or added for vLLM and never chosen."""
    constants: Literal["zeros", "means"]
    restored: dict[str, JsonValue]
    """Keys of config.json as the compact form has them; null: it lacks the key."""


@dataclass(frozen=True)
class Substituted:
    """One layer: how many experts its router knows, and which have no weights."""

    experts: int
    removed: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The experts with weights, ascending."""
        gone = set(self.removed)
        return tuple(one for one in range(self.experts) if one not in gone)


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """What opening learned, and what the compact form has no place for."""

    layers: dict[int, Substituted]
    spelled: Spelled | None
    """None: another tool wrote it."""
    constants: dict[int, dict[int, TensorInfo]] = field(default_factory=dict)
    """By layer and expert, what stands for its output [D]."""


@dataclass(frozen=True, kw_only=True)
class RowsTensor(TensorInfo):
    """Some rows of a stored tensor."""

    stored: TensorInfo
    rows: tuple[int, ...]

    @property
    def stored_bytes(self) -> int:
        """Of the whole tensor, which the file holds."""
        return self.stored.nbytes

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes ``start`` to ``stop`` of the rows, one behind the other."""
        size, found = self.stored.row_bytes, bytearray()
        for number, row in enumerate(self.rows):
            first, last = max(start - number * size, 0), min(stop - number * size, size)
            if first < last:
                found += self.stored.read(row * size + first, row * size + last)
        return found


def compact_view(
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    arch: MoeArch,
    where: Path,
) -> tuple[dict[str, Any], dict[str, TensorInfo], Substitution | None]:
    """Config and tensors as this tool has layers that lost experts.

    Args:
        config: The content of config.json.
        tensors: What the headers list.
        arch: The family.
        where: config.json, for errors.

    Raises:
        CheckpointError: Ids, vectors or names are not as they must be.
    """
    said, names = _declared(config, where)
    if said is None:
        return config, tensors, None
    spelled = _spelled(config, where)
    count = positive(config, arch.config.layers, where)
    experts = positive(config, arch.config.experts, where)
    if experts > MAX_EXPERTS:
        raise CheckpointError(
            f"{where}: {experts} experts are more than {MAX_EXPERTS}."
        )
    layers = {}
    for index, removed in said.items():
        if index >= count:
            raise CheckpointError(
                f"{where}: {KEY} names layer {index} of {count}; layers that predict "
                "further tokens cannot be substituted."
            )
        if removed and (removed[-1] >= experts or len(removed) >= experts):
            raise CheckpointError(
                f"{where}: {KEY} of layer {index} must name some of its {experts} "
                f"experts, not all, and no other; it names {list(removed)[:8]}."
            )
        if removed:
            layers[index] = Substituted(experts, removed)
    renamed, constants = _renamed(tensors, layers, names, arch, where)
    _check_constants(config, layers, constants, arch, where)
    if spelled is not None:
        changed = _restored(config, spelled)
        if spelled.router == "masked":
            _take_rows(renamed, layers, arch)
    else:
        changed = _compact(config, layers, arch)
    return (
        changed,
        renamed,
        Substitution(layers=layers, spelled=spelled, constants=constants),
    )


def _spelled(config: dict[str, Any], where: Path) -> Spelled | None:
    block = config.get(CONFIG_BLOCK)
    if not isinstance(block, dict):
        return None
    try:
        return Spelled.model_validate(block.get(BLOCK))
    except ValidationError as error:
        raise CheckpointError(
            f"{where}: {CONFIG_BLOCK}.{BLOCK}: {first_problem(error)}"
        ) from error


Names = dict[tuple[int, int], str]


def _declared(
    config: dict[str, Any], where: Path
) -> tuple[dict[int, tuple[int, ...]] | None, Names]:
    """Removed experts by layer, and names of vectors that have names of their own."""
    plain, declared = config.get(KEY), config
    for key in DECLARED:
        declared = declared.get(key) if isinstance(declared, dict) else None  # type: ignore[assignment]
    if plain is not None and declared is not None:
        raise CheckpointError(f"{where}: has both {KEY} and {'.'.join(DECLARED)}.")
    if plain is not None:
        if not isinstance(plain, dict):
            raise CheckpointError(f"{where}: {KEY} is no object.")
        found = {}
        for layer, ids in plain.items():
            found[_number(layer, where)] = _ids(ids, layer, where)
        return found, {}
    if declared is None:
        return None, {}
    return _of_targets(declared, where)


def _of_targets(declared: Any, where: Path) -> tuple[dict[int, tuple[int, ...]], Names]:
    """The spelling that names every vector (``constant-v1``)."""
    at = f"{where}: {DECLARED[-1]}"
    if not isinstance(declared, dict) or declared.get("version") != 1:
        raise CheckpointError(f"{at}: only version 1 is read.")
    if declared.get("router_semantics") != SEMANTICS:
        raise CheckpointError(f"{at}: router_semantics must leave routing as it is.")
    targets = declared.get("targets")
    found: dict[int, tuple[int, ...]] = {}
    names: Names = {}
    for path, target in targets.items() if isinstance(targets, dict) else ():
        numbers = [part for part in path.split(".") if part.isdecimal()]
        if len(numbers) != 1 or not isinstance(target, dict):
            raise CheckpointError(f"{at}: target {path[:100]!r} names no single layer.")
        layer = _number(numbers[0], where)
        replaced = target.get("replacements")
        if (
            target.get("weight_layout") != "compact_retained_experts"
            or not isinstance(replaced, dict)
            or layer in found
        ):
            raise CheckpointError(f"{at}: target {path[:100]!r} has another layout.")
        for expert, one in replaced.items():
            tensors = one.get("tensors") if isinstance(one, dict) else None
            value = tensors.get("value") if isinstance(tensors, dict) else None
            if not isinstance(value, str) or one.get("format") != "constant-v1":
                raise CheckpointError(f"{at}: {path[:100]!r} replaces by no constant.")
            names[layer, _number(expert, where)] = value
        found[layer] = _ids([_number(one, where) for one in replaced], layer, where)
    return found, names


def _number(text: object, where: Path) -> int:
    # Length first: int() raises above 4,300 digits.
    if isinstance(text, str) and text.isdecimal() and len(text) < 10:
        return int(text)
    raise CheckpointError(f"{where}: {KEY}: {str(text)[:40]!r} is no number.")


def _ids(found: object, layer: object, where: Path) -> tuple[int, ...]:
    """Ids, ascending."""
    if found is None:
        return ()
    plain = isinstance(found, list) and all(
        type(one) is int and one >= 0 for one in found
    )
    if not isinstance(found, list) or not plain or len(set(found)) < len(found):
        raise CheckpointError(
            f"{where}: {KEY} of layer {str(layer)[:20]} must list ids of experts, each "
            "once."
        )
    return tuple(sorted(found))


def _renamed(
    tensors: Mapping[str, TensorInfo],
    layers: Mapping[int, Substituted],
    names: Names,
    arch: MoeArch,
    where: Path,
) -> tuple[dict[str, TensorInfo], dict[int, dict[int, TensorInfo]]]:
    """Experts renumbered from 0, and the vectors apart."""
    new = {index: _new_ids(one) for index, one in layers.items()}
    named = {value: at for at, value in names.items()}
    found: dict[str, TensorInfo] = {}
    constants: dict[int, dict[int, TensorInfo]] = {index: {} for index in layers}
    for name, info in tensors.items():
        layer = arch.layer_of(name)
        match = EXPERT.match(name)
        expert = int(match["expert"]) if match and len(match["expert"]) < 10 else None
        at = named.get(name)
        if at is None and match and match["after"] == SUFFIX and expert is not None:
            at = None if layer is None else (layer, expert)
        if at is not None:
            if at[0] not in layers or at[1] not in layers[at[0]].removed:
                raise CheckpointError(
                    f"{info.file}: {name!r} is of an expert that {KEY} does not name."
                )
            constants[at[0]][at[1]] = info
        elif match is None or expert is None or layer not in new:
            found[name] = info
        elif expert in new[layer]:
            other = f"{match['before']}{new[layer][expert]}{match['after']}"
            found[other] = replace(info, name=other)
        else:
            raise CheckpointError(
                f"{info.file}: {name!r} is of an expert that {KEY} of layer {layer} "
                "says is removed, or that the layer has not."
            )
    return found, constants


def _check_constants(
    config: dict[str, Any],
    layers: Mapping[int, Substituted],
    constants: Mapping[int, Mapping[int, TensorInfo]],
    arch: MoeArch,
    where: Path,
) -> None:
    hidden = positive(config, arch.config.hidden, where)
    for index, one in layers.items():
        for expert in one.removed:
            info = constants[index].get(expert)
            if info is None:
                raise CheckpointError(
                    f"{where}: layer {index}: expert {expert} is in {KEY}, but has no "
                    f"{SUFFIX[1:]}."
                )
            if info.dtype not in FLOATS or info.shape != (hidden,):
                raise CheckpointError(
                    f"{info.file}: {info.name!r}: {info.dtype} of shape "
                    f"{list(info.shape)}, expected floats of shape [{hidden}]."
                )


def _new_ids(one: Substituted) -> dict[int, int]:
    return {old: new for new, old in enumerate(one.kept)}


def router_names(arch: MoeArch, layer: int) -> Iterator[str]:
    """What routers of a layer may be called, in any layout."""
    for layout in arch.layouts:
        for rule in layout.router_parts:
            yield rule.name(layer)


def _take_rows(
    tensors: dict[str, TensorInfo],
    layers: Mapping[int, Substituted],
    arch: MoeArch,
) -> None:
    """Routers without the rows that were added for vLLM, in place."""
    for index, one in layers.items():
        for name in {*router_names(arch, index)} & tensors.keys():
            info = tensors[name]
            if not info.shape or info.shape[0] != one.experts:
                raise CheckpointError(
                    f"{info.file}: {name!r} has shape {list(info.shape)}, but the "
                    f"layer has {one.experts} experts."
                )
            tensors[name] = RowsTensor(
                name=name,
                dtype=info.dtype,
                shape=(len(one.kept), *info.shape[1:]),
                file=info.file,
                # In no one place of the file: read() puts the rows together.
                offset=-1,
                nbytes=len(one.kept) * info.row_bytes,
                stored=info,
                rows=one.kept,
            )


def _restored(config: dict[str, Any], spelled: Spelled) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    changed.pop(KEY, None)
    del changed[CONFIG_BLOCK][BLOCK]
    for key, value in spelled.restored.items():
        if value is None:
            changed.pop(key, None)
        else:
            changed[key] = value
    return changed


def _compact(
    config: dict[str, Any],
    layers: Mapping[int, Substituted],
    arch: MoeArch,
) -> dict[str, Any]:
    """What config.json would say if this tool had written the model."""
    changed = copy.deepcopy(config)
    changed.pop(KEY, None)
    first, second, last = DECLARED
    if isinstance(changed.get(first), dict) and isinstance(
        changed[first].get(second), dict
    ):
        changed[first][second].pop(last, None)
    kept = {index: len(one.kept) for index, one in layers.items()}
    changed[OVERRIDES] = {
        str(index): {arch.config.experts: number} for index, number in kept.items()
    }
    if layers:
        changed["architectures"] = [arch.pruned_architecture]
    return changed
