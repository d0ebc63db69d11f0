"""From config, headers and remap table to a ``Checkpoint``, everything compared.

Works on original checkpoints and on those this tool has already cut: the layer views
come from config.json's ``per_layer_config`` and the remap table.
"""

from pathlib import Path
from typing import Any

from ..archs import find_arch
from ..archs.spec import MoeArch
from ..errors import CheckpointError, RemapError
from ..kernels.quantized import Form
from .block_fp8 import check_scales, read_blocks
from .claims import check_claims
from .compressed import dense_view
from .config_values import (
    MTP_OVERRIDES,
    OVERRIDES,
    check_beyond,
    check_dense,
    check_lists,
    check_pattern,
    check_types,
    positive,
    router_rule,
    whole,
)
from .expert_tensors import expert_tensors, find_layout
from .file_state import file_states
from .gptq_awq import AutoForm, fold_auto, read_auto_form
from .index import TensorInfo
from .layer import LayerReader
from .open import Checkpoint, Origin, names_scale
from .quantized_tensors import FLOATS, PartedTensor, fold_quantized, read_form
from .remap import ExpertRemap, load_remap
from .substitution import Substitution, compact_view
from .uneven import made_table, uneven_view

# Sizes that every family calls the same; where they are given, they must be sizes.
SIZES = (
    "max_position_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def build_checkpoint(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    origin: Origin,
) -> Checkpoint:
    """Check config and tensor names against the family's table.

    Raises:
        CheckpointError: Naming the config key, tensor or expert that is wrong.
    """
    where = folder / "config.json"
    named = config.get("architectures", [])
    if not isinstance(named, list):
        raise CheckpointError(f"{where}: architectures is not a list.")
    arch = find_arch(config.get("model_type"), str(where), named)
    config = _real_keys(config, arch, where)
    # Before any weight is read: check_states compares with these afterwards.
    files = file_states(folder, {where, *(info.file for info in tensors.values())})
    # First, as it puts back the quantization_config that FP8 weights had.
    config, tensors, storage = dense_view(config, tensors, arch, str(where))
    config, tensors, substitution = compact_view(config, tensors, arch, where)
    config, uneven = uneven_view(config, arch, where)
    form = read_form(config, str(where)) or read_auto_form(config, str(where))
    parts: dict[str, TensorInfo] = {}
    if form is not None:
        tensors, parts = _without_parts(arch, tensors, form)
    blocks = read_blocks(config, where) if form is None else None
    for key in ("layers", "hidden", "top_k", "experts", "width"):
        positive(config, getattr(arch.config, key), where)
    check_dense(arch, config, where)
    for key in SIZES:
        if config.get(key) is not None:
            positive(config, key, where)
    remap = load_remap(folder, config)
    if remap is not None and remap.model_type != arch.model_type:
        raise RemapError(
            f"{folder}: the remap table is for model_type {remap.model_type!r}, "
            f"config.json says {arch.model_type!r}."
        )
    count = config[arch.config.layers]
    # No real layer is without tensors, and lists of this length are made below.
    if count > len(tensors):
        raise CheckpointError(
            f"{where}: {arch.config.layers} is {count}, but the checkpoint has only "
            f"{len(tensors)} tensors."
        )
    # Before layers are told apart by number: 01 is 1 to some readers only.
    _check_numbers(arch, tensors)
    check_lists(config, arch, count, where)
    further = _mtp_layers(arch, config, tensors, count, where)
    total = count + further
    views = _layer_views(config, OVERRIDES, count, where)
    views += _layer_views(config, MTP_OVERRIDES, further, where)
    if blocks is not None:
        check_scales(tensors, blocks)
    layout = find_layout(arch, tensors, total, folder)
    rule = router_rule(arch, config, where)
    # A layer that predicts further tokens always has experts.
    dense = [
        index < count and not _has_moe(arch, view, index, where)
        for index, view in enumerate(views)
    ]
    foreign = remap is None and (substitution is not None or uneven is not None)
    if foreign:
        remap = made_table(
            arch,
            [not one for one in dense],
            [positive(one, arch.config.experts, where, least=0) for one in views],
            count,
            name=origin.name,
            groups=rule.groups,
            substitution=substitution,
            uneven=uneven,
        )
    elif substitution is not None and remap is not None:
        _check_substitution(substitution, remap, folder)
    scales = frozenset(
        name for name in tensors if names_scale(name, tensors, blocks is not None)
    )
    experts = expert_tensors(arch, layout, tensors, scales)
    reader = LayerReader(
        folder=folder,
        arch=arch,
        layout=layout,
        tensors=tensors,
        experts=experts,
        remap=remap,
        rule=rule,
        blocks=blocks,
    )
    layers = tuple(
        reader.build(
            index,
            view,
            dense=dense[index],
            mtp=index >= count,
        )
        for index, view in enumerate(views)
    )
    if not any(layer.has_moe for layer in layers):
        raise CheckpointError(f"{folder}: no layer has experts; nothing to prune.")
    if remap is not None and len(remap.layers) != count:
        raise CheckpointError(
            f"{folder}: the remap table has {len(remap.layers)} layers, "
            f"config.json {count}."
        )
    check_beyond(arch, tensors, count, total, folder)
    found = Checkpoint(
        folder=folder,
        config=config,
        tensors=tensors,
        origin=origin,
        arch=arch,
        layout=layout,
        layers=layers,
        remap=remap,
        rule=rule,
        blocks=blocks,
        storage=storage,
        form=form,
        parts=parts,
        experts=experts,
        files=files,
        substitution=substitution,
        foreign=foreign,
    )
    check_claims(found)
    return found


def _check_substitution(
    substitution: Substitution, remap: ExpertRemap, folder: Path
) -> None:
    """The ids in tensor names must be those that the remap table lists."""
    for index, one in substitution.layers.items():
        listed = remap.layers[index].kept if index < len(remap.layers) else ()
        if listed != one.kept:
            raise RemapError(
                f"{folder}: layer {index}: config.json keeps experts "
                f"{list(one.kept)[:8]}, the remap table {list(listed)[:8]}."
            )


def _without_parts(
    arch: MoeArch, tensors: dict[str, TensorInfo], form: Form | AutoForm
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Quantized matrices as the dense tensors they stand for, and their parts."""
    # Parts do not tell what dtype the model computes in; embeddings are stored in it.
    embedding = tensors.get(arch.embedding)
    known = embedding is not None and embedding.dtype in FLOATS
    dtype = embedding.dtype if embedding is not None and known else "BF16"
    if isinstance(form, AutoForm):
        folded = fold_auto(tensors, form, dtype)
    else:
        folded = fold_quantized(tensors, form, dtype)
    parts = {
        part.name: part
        for info in folded.values()
        if isinstance(info, PartedTensor)
        for part in info.parts.values()
    }
    return folded, parts


def _has_moe(arch: MoeArch, view: dict[str, Any], index: int, where: Path) -> bool:
    check_pattern(arch, view, where)
    check_types(arch, view, index, where)
    return arch.pattern.has_moe(view, index)


def _mtp_layers(
    arch: MoeArch,
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    count: int,
    where: Path,
) -> int:
    """How many layers behind the last one the checkpoint really holds.

    Some are published without them although config.json names them.
    """
    key = arch.config.mtp_layers
    if key is None or config.get(key) is None:
        return 0
    named = positive(config, key, where, least=0)
    indices = {arch.layer_of(name) for name in tensors}
    held = len({index for index in indices if index is not None and index >= count})
    return min(named, held)


def _check_numbers(arch: MoeArch, tensors: dict[str, TensorInfo]) -> None:
    """Refuse names whose numbers only some readers would take for a layer or expert."""
    start, _, _ = arch.layer_prefix.partition("{layer}")
    for name, info in tensors.items():
        if name.startswith(start):
            for part in name.split("."):
                if part.isdecimal() and not _is_plain(part):
                    raise CheckpointError(
                        f"{info.file}: {name[:100]!r}: {part[:20]!r} is not a number "
                        "of a layer or expert."
                    )


def _is_plain(number: str) -> bool:
    """Whether a number is spelt as we would, and short enough to be converted."""
    # Length first: int() raises above 4,300 digits. isdecimal takes any script's.
    return len(number) < 10 and number == str(int(number))


def _real_keys(config: dict[str, Any], arch: MoeArch, where: Path) -> dict[str, Any]:
    """The config with the class's attribute in place of an alias of it.

    Raises:
        CheckpointError: Both are there, or the alias where transformers ignores it.
    """
    for key in arch.empty_lists:
        if config.get(key):
            raise CheckpointError(
                f"{where}: {key} is {config[key]!r}; only without it is the family "
                "supported."
            )
    alias, key = arch.config.experts_in_files, arch.config.experts
    if alias is None:
        return config
    overrides = config.get(OVERRIDES)
    for layer, values in overrides.items() if isinstance(overrides, dict) else ():
        if isinstance(values, dict) and alias in values:
            raise CheckpointError(
                f"{where}: {OVERRIDES}[{layer!r}] says {alias}, which transformers and "
                f"vLLM ignore there. Call it {key}."
            )
    if alias not in config:
        return config
    # By the name that the file has; lists are another tool's, and told as such.
    if not isinstance(config[alias], list):
        whole(config[alias], alias, where)
    if config.get(key, config[alias]) != config[alias]:
        raise CheckpointError(
            f"{where}: {alias} is {config[alias]!r}, but {key}, the same to "
            f"transformers, is {config[key]!r}."
        )
    renamed = {key if name == alias else name: config[name] for name in config}
    return renamed


def _layer_views(
    config: dict[str, Any], name: str, count: int, where: Path
) -> list[dict[str, Any]]:
    overrides = config.get(name)
    if overrides is None:
        overrides = {}
    if not isinstance(overrides, dict):
        raise CheckpointError(f"{where}: {name} is not an object.")
    # One dict for all layers without overrides; views are only read.
    views = [config] * count
    for key, values in overrides.items():
        if (
            not key.isdecimal()
            or not _is_plain(key)
            or int(key) >= count
            or not isinstance(values, dict)
        ):
            raise CheckpointError(
                f"{where}: {name}[{key!r}] does not describe one of the "
                f"layers 0 to {count - 1}."
            )
        views[int(key)] = config | values
    return views
