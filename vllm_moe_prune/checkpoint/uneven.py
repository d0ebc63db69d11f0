"""Layers with different numbers of experts as other tools spell them.

Read as if ``per_layer_config`` said it; ``convert`` writes it so. The spellings, and
where they were found, are listed in docs/reference/format.md.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..archs.spec import MoeArch
from ..errors import CheckpointError
from .config_values import (
    MAX_EXPERTS,
    MTP_OVERRIDES,
    OVERRIDES,
    check_pattern,
    positive,
    whole,
)
from .remap import ExpertRemap, RemapLayer, RemapSource
from .substitution import Substitution

BESIDE = (
    "per_layer_num_experts",
    "num_experts_per_layer",
    "n_routed_experts_per_layer",
)
"""Keys beside the family's own: a list with an entry per layer, or layer -> number."""
PUZZLE = "block_configs"
REAP = "reap_pruning"
SPARSITY = "moe_sparsity_config"
FORMAT = "docs/reference/format.md"
Counts = dict[int, int]
"""Layer -> experts that it has; 0: its MoE sublayer is gone."""


@dataclass(frozen=True)
class Uneven:
    """What a spelling says beside the numbers."""

    key: str
    kept: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Layer -> ids in the original, where they are told."""
    before: dict[int, int] = field(default_factory=dict)
    """Layer -> experts of the original, likewise."""


def uneven_view(
    config: dict[str, Any], arch: MoeArch, where: Path
) -> tuple[dict[str, Any], Uneven | None]:
    """config.json with ``per_layer_config`` in place of another tool's spelling.

    Args:
        config: The content of config.json.
        arch: The family.
        where: config.json, for errors.

    Raises:
        CheckpointError: Two spellings contradict each other, or one is not as it must
            be.
    """
    count = positive(config, arch.config.layers, where)
    found = list(_spellings(config, arch, count, where))
    if not found:
        return config, None
    key, counts, uneven, more = found[0]
    for other, numbers, _, _ in found[1:]:
        if numbers != counts:
            raise CheckpointError(
                f"{where}: {key} and {other} give layers other numbers of experts. "
                "Delete the one that is wrong."
            )
    if config.get(OVERRIDES):
        raise CheckpointError(
            f"{where}: has both {OVERRIDES} and {key}. Delete the one that is wrong."
        )
    return _compact(config, arch, counts, more, count, where), uneven


Spelling = tuple[str, Counts, Uneven, dict[int, dict[str, int]]]


def _spellings(
    config: dict[str, Any], arch: MoeArch, layers: int, where: Path
) -> Iterator[Spelling]:
    """Each spelling that config.json has: its key, the numbers, what else it says."""
    for key in dict.fromkeys((arch.config.experts, *BESIDE)):
        if isinstance(config.get(key), list | dict):
            yield key, _counts(config[key], key, layers, where), Uneven(key), {}
    holders = (
        config,
        config.get("quantization_config"),
        config.get("compression_config"),
    )
    for holder in holders:
        block = holder.get(SPARSITY) if isinstance(holder, dict) else None
        if block is not None:
            if not isinstance(block, dict) or block.get("method") != "prune":
                raise CheckpointError(
                    f"{where}: {SPARSITY}: only method 'prune' is read; see {FORMAT}."
                )
            numbers = _counts(block.get("num_experts"), SPARSITY, layers, where)
            yield SPARSITY, numbers, Uneven(SPARSITY), {}
    if isinstance(config.get(REAP), dict) and config[REAP].get("ragged"):
        yield _reap(config[REAP], layers, where)
    if config.get(PUZZLE) is not None:
        yield _puzzle(config[PUZZLE], arch, layers, where)


def _counts(found: Any, key: str, layers: int, where: Path) -> Counts:
    """Numbers of a list, or of an object by layer."""
    if isinstance(found, list) and len(found) == layers:
        pairs = list(enumerate(found))
    elif isinstance(found, dict) and found:
        pairs = [(_layer(text, key, where), number) for text, number in found.items()]
        if len(dict(pairs)) < len(pairs):
            raise CheckpointError(f"{where}: {key} names a layer more than once.")
    else:
        raise CheckpointError(
            f"{where}: {key} must be a list with an entry for each of the {layers} "
            "layers, or an object from layers to numbers."
        )
    counts = {}
    for layer, number in pairs:
        # None and -1 stand for no experts: dense, or dropped.
        number = 0 if number is None or number == -1 else number
        counts[layer] = _bounded(number, f"{key} of layer {layer}", where)
    return counts


def _bounded(number: object, what: str, where: Path) -> int:
    found = whole(number, what, where, least=0)
    if found > MAX_EXPERTS:
        raise CheckpointError(f"{where}: {what} is {found}, more than {MAX_EXPERTS}.")
    return found


def _layer(text: object, key: str, where: Path) -> int:
    plain = isinstance(text, str) and text.isdecimal() and len(text) < 10
    if not isinstance(text, str) or not plain or text != str(int(text)):
        raise CheckpointError(f"{where}: {key}: {str(text)[:40]!r} is no layer.")
    return int(text)


def _reap(block: dict[str, Any], layers: int, where: Path) -> Spelling:
    """A record of which experts each layer kept."""
    counts: Counts = {}
    uneven = Uneven(REAP)
    entries = block.get("layers")
    for one in entries if isinstance(entries, list) else ():
        if not isinstance(one, dict) or not isinstance(one.get("kept"), list):
            raise CheckpointError(f"{where}: {REAP}: a layer lists no kept experts.")
        index = whole(one.get("index"), f"{REAP}: index", where, least=0)
        at = f"{REAP} of layer {index}"
        before = _bounded(one.get("experts_before"), f"{at}: experts_before", where)
        kept = tuple(_bounded(expert, f"{at}: kept", where) for expert in one["kept"])
        if (
            len({*kept}) < len(kept)
            or index in counts
            or max(kept, default=0) >= before
        ):
            raise CheckpointError(
                f"{where}: {at}: kept must name experts below {before}, each once."
            )
        counts[index] = len(kept)
        uneven.kept[index], uneven.before[index] = kept, before
    if not counts or max(counts) >= layers:
        raise CheckpointError(f"{where}: {REAP} lists none of the {layers} layers.")
    return REAP, counts, uneven, {}


def _puzzle(found: Any, arch: MoeArch, layers: int, where: Path) -> Spelling:
    """Puzzletron's blocks; those whose attention changed are another model."""
    if not isinstance(found, list) or len(found) != layers:
        raise CheckpointError(
            f"{where}: {PUZZLE} must have an entry for each of the {layers} layers."
        )
    counts: Counts = {}
    more: dict[int, dict[str, int]] = {}
    for index, block in enumerate(found):
        at = f"{PUZZLE} of layer {index}"
        attention, ffn = _part(block, "attention"), _part(block, "ffn")
        changed = attention.get("no_op") or attention.get("replace_with_linear")
        if changed or _of(block, "parallel_blocks") or ffn.get("replace_with_linear"):
            raise CheckpointError(
                f"{where}: {at} changes more than experts, which is not read."
            )
        if ffn.get("no_op"):
            counts[index] = 0
        if not (moe := _part(ffn, "moe")):
            continue
        counts[index] = _bounded(moe.get("num_local_experts"), at, where)
        for key, name in (
            (arch.config.top_k, "num_experts_per_tok"),
            (arch.config.width, "expert_intermediate_dim"),
        ):
            if moe.get(name) is not None:
                number = whole(moe[name], f"{at}: {name}", where)
                more.setdefault(index, {})[key] = number
    return PUZZLE, counts, Uneven(PUZZLE), more


def _of(block: Any, key: str) -> Any:
    return block.get(key) if isinstance(block, dict) else None


def _part(block: Any, key: str) -> dict[str, Any]:
    found = _of(block, key)
    return found if isinstance(found, dict) else {}


def _compact(
    config: dict[str, Any],
    arch: MoeArch,
    counts: Counts,
    more: Mapping[int, Mapping[str, int]],
    layers: int,
    where: Path,
) -> dict[str, Any]:
    """config.json as this tool would have written it."""
    keys, changed = arch.config, copy.deepcopy(config)
    for key in (*BESIDE, PUZZLE, REAP, SPARSITY):
        changed.pop(key, None)
    for holder in ("quantization_config", "compression_config"):
        block = changed.get(holder)
        told = isinstance(block, dict) and block.pop(SPARSITY, None) is not None
        # Written for the numbers alone: nothing is quantized.
        if told and not changed[holder].get("config_groups"):
            del changed[holder]
    check_pattern(arch, changed, where)
    numbers = {
        index: number
        for index, number in counts.items()
        # What a list says of a dense layer means nothing.
        if index >= layers or arch.pattern.has_moe(changed, index)
    }
    if not any(numbers.values()):
        raise CheckpointError(f"{where}: gives no layer any experts.")
    scalar = config.get(keys.experts)
    most = max(numbers.values()) if isinstance(scalar, list | dict) else scalar
    missing = [
        index
        for index in range(layers)
        if index not in numbers and arch.pattern.has_moe(changed, index)
    ]
    if missing and isinstance(scalar, list | dict):
        raise CheckpointError(f"{where}: says nothing of layer {missing[0]}.")
    changed[keys.experts] = most
    top_k = positive(changed, keys.top_k, where)
    overrides: dict[str, dict[str, dict[str, Any]]] = {OVERRIDES: {}, MTP_OVERRIDES: {}}
    for index, number in sorted(numbers.items()):
        one: dict[str, Any] = {
            key: value
            for key, value in more.get(index, {}).items()
            if value != changed.get(key)
        }
        if number == 0:
            one = {keys.experts: 0, "skip": [arch.skip_name]}
        elif number != most:
            one[keys.experts] = number
        if 0 < number < one.get(keys.top_k, top_k):
            one[keys.top_k] = number
        if one:
            further = index >= layers
            at = str(index - layers if further else index)
            overrides[MTP_OVERRIDES if further else OVERRIDES][at] = one
    for key, values in overrides.items():
        if values:
            changed[key] = values
            changed["architectures"] = [arch.pruned_architecture]
    return changed


def made_table(
    arch: MoeArch,
    has_moe: Sequence[bool],
    experts: Sequence[int],
    layers: int,
    *,
    name: str,
    groups: int,
    substitution: Substitution | None,
    uneven: Uneven | None,
) -> ExpertRemap:
    """The remap table of a checkpoint that another tool cut, as far as it is known.

    Args:
        arch: The family.
        has_moe: For each layer whether it should have experts, MTP layers last.
        experts: How many it has.
        layers: How many of them are decoder layers.
        name: What the checkpoint is called.
        groups: That the family's routers know.
        substitution: Where its router rows stayed.
        uneven: Where they left with their experts.
    """
    entries = [
        _entry(index, moe, number, groups, substitution, uneven)
        for index, (moe, number) in enumerate(zip(has_moe, experts, strict=True))
    ]
    return ExpertRemap(
        tool_version=__version__,
        model_type=arch.model_type,
        # Which model it was is not told; no fingerprint equals this one.
        source=RemapSource(name=name, fingerprint="unknown"),
        routing="redirect" if substitution is not None else "drop",
        original_layers=layers,
        layers=tuple(entries[:layers]),
        original_mtp_layers=len(entries) - layers,
        mtp_layers=tuple(entries[layers:]),
    )


def _entry(
    index: int,
    moe: bool,
    experts: int,
    groups: int,
    substitution: Substitution | None,
    uneven: Uneven | None,
) -> RemapLayer:
    has_experts = moe and experts > 0
    kept = tuple(range(experts)) if has_experts else ()
    before, rows = experts, kept
    redirect: tuple[int | None, ...] | None = None
    found: tuple[int, ...] | None = None
    if substitution is not None and has_experts:
        redirect = kept
        if one := substitution.layers.get(index):
            kept, before = one.kept, one.experts
            rows = tuple(range(before))
            new = {old: at for at, old in enumerate(kept)}
            redirect = tuple(new.get(row) for row in rows)
    elif uneven is not None and index in uneven.kept and has_experts:
        kept, before = uneven.kept[index], uneven.before[index]
        rows = kept
        if groups > 1 and before % groups == 0:
            found = tuple(expert * groups // before for expert in kept)
    return RemapLayer(
        layer=index,
        original_layer=index,
        moe=has_experts,
        moe_dropped=moe and not has_experts,
        experts_before=before,
        kept=kept,
        router_rows=rows,
        redirect=redirect,
        groups=found,
    )
