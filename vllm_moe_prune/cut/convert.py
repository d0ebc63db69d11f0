"""Changing how a checkpoint is stored or spelled; weights stay bit for bit.

A first pass counts non-zeros, so that every shard is planned to the byte before it is
written; the second one writes. Memory holds one expert matrix, also where all experts
of a layer are packed into one tensor.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from .. import __version__
from ..checkpoint.compressed import compressed_config
from ..checkpoint.index import ITEM_BYTES, TensorInfo, read_bytes
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.quantized_tensors import PartedTensor
from ..checkpoint.reader import read_row, read_tensor
from ..checkpoint.remap import FILE_NAME, dump_remap
from ..checkpoint.tensor_hashes import write_hashes
from ..checkpoint.writer import (
    CHUNK_BYTES,
    MAX_SHARD_BYTES,
    ShardWriter,
    index_json,
    index_needed,
    plan_shards,
    tensor_bytes,
)
from ..decide.cut_plan import load_plan
from ..errors import CheckpointError, RecipeError
from ..files.atomic import write_file, writing
from ..kernels.bitmask import INTEGERS, fits, pack
from ..progress import Progress, Report, gib, ignore
from ..recipes.schema import Spelling as SpellingName
from ..recipes.schema import parse_pattern
from .card import source_card
from .card_places import BYTES, fill
from .copy import tensor_view
from .output import companions_sha256, copy_companions, copy_records
from .predict import bitmask_parts
from .slice import StoredPart, names_in_order
from .spell import Means, spelled_config, spelling_of
from .spelled import Stored, hash_of, in_spelling, with_block
from .transaction import is_complete, output_transaction

StorageName = Literal["dense", "bitmask"]
Name = TypeVar("Name", bound=str)
STORAGES: tuple[StorageName, ...] = ("dense", "bitmask")
SPELLINGS: tuple[SpellingName, ...] = ("moe-prune", "stock-vllm")
NOTE = """
## Stored compressed

This copy stores its expert weights without their zeros. vLLM needs the plugin
(`pip install vllm-moe-prune`) to read it, whatever is said above about the plain
weights, which `vllm-moe-prune convert <this folder> OUT --storage dense` gives back.
"""


SPELLED_NOTE = """
## Spelled for stock vLLM

In this copy removed experts have vectors in their place (`approximate_experts`), which
vLLM from 0.33 on serves without the plugin, whatever is said above. It refuses expert
and data parallelism, LoRA on experts and quantization of experts for it.
"""
NOTES = (NOTE, SPELLED_NOTE)


def parse_spelling_name(name: str) -> SpellingName:
    """The spelling a user named.

    Raises:
        RecipeError: There is no such spelling.
    """
    return _named("spelling", name, SPELLINGS)


def parse_storage_name(name: str) -> StorageName:
    """The storage a user named.

    Raises:
        RecipeError: There is no such storage.
    """
    return _named("storage", name, STORAGES)


def _named(what: str, name: str, known: tuple[Name, ...]) -> Name:
    for one in known:
        if name == one:
            return one
    raise RecipeError(f"{what} {name!r} is not one of: {', '.join(known)}.")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion wrote."""

    out: Path
    storage: StorageName
    dense_bytes: int
    """Of all tensors in their dense form."""
    stored_bytes: int
    file_bytes: int
    dense_layers: tuple[int, ...]
    """MoE layers that stayed dense, since compressing them would save nothing."""


def convert(
    checkpoint: Checkpoint,
    out: Path,
    storage: StorageName,
    spelling: SpellingName = "moe-prune",
    *,
    means: Means | None = None,
    resume: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: Report = ignore,
) -> Converted:
    """Write ``checkpoint`` to ``out`` in another storage or spelling.

    Args:
        checkpoint: The input, in either storage.
        out: The output folder, which appears when everything is in it.
        storage: How expert weights are stored there.
        spelling: For whom layers that differ are written there.
        means: What stands for removed experts in stock vLLM; None: zeros.
        resume: Continue an interrupted conversion.
        overwrite: Replace an existing output once the new one is complete.
        max_shard_bytes: Size limit of one output file.
        report: Called once per layer.

    Raises:
        CheckpointError: Experts are quantized, or damaged.
        OutputError: See ``output_transaction``.
    """
    _check(checkpoint, storage, spelling)
    spelled = spelling_of(checkpoint) if spelling == "stock-vllm" else None
    # First: it refuses, and planning may take long.
    config = None
    if spelled is not None:
        config = spelled_config(checkpoint, spelled, means=means is not None)
    plan, dense_layers = _plan(checkpoint, storage, report)
    if spelled is not None:
        plan = in_spelling(checkpoint, spelled, plan, means)
    shards = plan_shards(
        [part for item in plan for part in item.parts], max_shard_bytes
    )
    stored = sum(sum(shard.sizes.values()) for shard in shards)
    if config is None:
        config = _config(checkpoint, storage, dense_layers)
    # All that determines the output's bytes; a resumed run must have the same key.
    form = storage if spelled is None else f"{spelling} {hash_of(means)}"
    said = (__version__, checkpoint.fingerprint, companions_sha256(checkpoint), form)
    digest = hashlib.sha256(repr(said).encode())
    for shard in shards:
        digest.update(shard.header)
    key = digest.hexdigest()
    if not is_complete(out, key, resume=resume, overwrite=overwrite):
        with output_transaction(
            out, key, [checkpoint], resume=resume, overwrite=overwrite
        ) as space:
            writer = space.write_shards(shards)
            for done, item in enumerate(plan, 1):
                _write(item, writer)
                # Once per layer: the next tensor is of another one.
                if done == len(plan) or plan[done].layer != item.layer:
                    last = len(checkpoint.layers)
                    at = last if item.layer is None else item.layer + 1
                    _tell(report, "convert", checkpoint, at)
            writer.close()
            folder = space.result
            with writing(folder):
                if name := index_needed(shards):
                    write_file(folder / name, index_json(shards, checkpoint.parameters))
                write_hashes(folder, writer)
                copy_companions(checkpoint, folder)
                copy_records(checkpoint, folder)
                if checkpoint.foreign and checkpoint.remap is not None:
                    write_file(folder / FILE_NAME, dump_remap(checkpoint.remap))
                note = NOTE if storage == "bitmask" else ""
                if spelled is not None and spelled.layers:
                    note = SPELLED_NOTE
                _write_card(checkpoint, folder, note, stored)
                text = json.dumps(config, indent=2) + "\n"
                write_file(folder / "config.json", text.encode())
    return Converted(
        out=out,
        storage=storage,
        dense_bytes=checkpoint.tensor_bytes,
        stored_bytes=stored,
        file_bytes=sum(shard.file_bytes for shard in shards),
        dense_layers=dense_layers,
    )


def _check(checkpoint: Checkpoint, storage: str, spelling: str) -> None:
    where = checkpoint.folder
    if checkpoint.form is not None and (storage != "dense" or not checkpoint.foreign):
        raise CheckpointError(
            f"{where}: its weights are quantized; only those that are not "
            "can be stored without their zeros."
        )
    if storage != "dense" and spelling != "moe-prune":
        raise CheckpointError(
            f"{where}: stock vLLM reads experts that are stored dense. Leave out "
            "--storage, or --spelling."
        )
    if checkpoint.substitution is None:
        return
    if spelling != "moe-prune":
        raise CheckpointError(f"{where}: is spelled for stock vLLM already.")
    for layer in checkpoint.substitution.constants.values():
        for info in layer.values():
            if bool(read_tensor(info).any()):
                raise CheckpointError(
                    f"{where}: {info.name!r} is not zero, and the plugin has no "
                    "constants. vLLM from 0.33 on serves this checkpoint as it is."
                )


def _plan(
    checkpoint: Checkpoint, storage: StorageName, report: Report
) -> tuple[list[Stored], tuple[int, ...]]:
    """Every tensor to be written, and the MoE layers that stay dense."""
    compressed: dict[str, Stored] = {}
    dense_layers = []
    if storage == "bitmask":
        group = _pattern(checkpoint)
        for layer in checkpoint.moe_layers:
            found = list(_compress(checkpoint, layer, group))
            stored = sum(tensor_bytes(part) for item in found for part in item.parts)
            # A layer is compressed whole, and only where that saves bytes.
            if not found or stored >= sum(item.info.nbytes for item in found):
                dense_layers.append(layer.index)
            else:
                compressed |= {item.info.name: item for item in found}
            _tell(report, "count", checkpoint, layer.index + 1)
    plan = []
    for name in names_in_order(checkpoint):
        info = checkpoint.tensors[name]
        layer_index = checkpoint.arch.layer_of(name)
        if isinstance(info, PartedTensor):
            base = name.rpartition(".")[0]
            for suffix, one in info.parts.items():
                stored_as = StoredPart(f"{base}.{suffix}", one.dtype, one.shape)
                plan.append(Stored(one, layer_index, (stored_as,)))
            continue
        plain = StoredPart(name, info.dtype, info.shape)
        plan.append(compressed.get(name) or Stored(info, layer_index, (plain,)))
    return plan, tuple(dense_layers)


def _pattern(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """The n:m pattern a checkpoint was cut by, if it was."""
    path = checkpoint.folder / "plan.json"
    if checkpoint.remap is None or not path.is_file():
        return None
    return parse_pattern(load_plan(path).pattern)


def _compress(
    checkpoint: Checkpoint, layer: Layer, group: tuple[int, int] | None
) -> Iterator[Stored]:
    """The expert matrices of one layer in parts; nothing if they have to stay dense."""
    infos = [checkpoint.tensors[name] for name in checkpoint.expert_names(layer)]
    # Before any weights are counted, which takes long.
    if not all(bitmask_parts(info, 0, None) for info in infos):
        return
    for info in infos:
        kept, fixed = 0, group
        for matrix_RC in _matrices(info):
            # By bits, as pack does: -0.0 and denormals are stored.
            kept += int(torch.count_nonzero(_integers(matrix_RC)))
            if fixed is not None and not fits(matrix_RC, *fixed):
                # One fuller group, and the tensor needs row offsets.
                fixed = None
        parts = bitmask_parts(info, kept, fixed)
        yield Stored(info, layer.index, tuple(parts), fixed)


def _matrices(info: TensorInfo) -> Iterator[torch.Tensor]:
    """The matrix of one expert, or of each."""
    if len(info.shape) == 2:
        yield read_tensor(info)
    else:
        yield from (read_row(info, expert) for expert in range(info.shape[0]))


def _integers(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.view(INTEGERS[matrix.element_size()])


def _write(item: Stored, writer: ShardWriter) -> None:
    if not any(writer.needs(part.name) for part in item.parts):
        return
    info = item.info
    if item.make is not None:
        writer.write(item.parts[0].name, tensor_view(item.make()))
        return
    if not item.compressed:
        # Whole rows, since a compressed input unpacks whole rows.
        step = max(
            info.row_bytes, CHUNK_BYTES // max(info.row_bytes, 1) * info.row_bytes
        )
        for start in range(0, info.nbytes, max(step, ITEM_BYTES[info.dtype])):
            stop = min(start + step, info.nbytes) if step else info.nbytes
            name = item.parts[0].name
            writer.write(name, memoryview(read_bytes(info, start, stop)), start)
        return
    at = [0] * len(item.parts)
    before = 0
    for number, matrix_RC in enumerate(_matrices(info)):
        packed = pack(matrix_RC, item.group)
        offsets = packed.offsets_R1
        if offsets is not None and number:
            # The first offset of a matrix is the last one of the matrix before it.
            offsets = offsets[1:] + before
        parts = (packed.values, offsets, packed.mask_RB)
        tensors = [part for part in parts if part is not None]
        for index, (part, tensor) in enumerate(zip(item.parts, tensors, strict=True)):
            if tensor.numel():  # an expert may be nothing but zeros
                writer.write(part.name, tensor_view(tensor), at[index])
            at[index] += tensor.nbytes
        before += packed.values.numel()


def _config(
    checkpoint: Checkpoint, storage: StorageName, dense_layers: tuple[int, ...]
) -> dict[str, Any]:
    if checkpoint.foreign and checkpoint.remap is not None:
        return with_block(checkpoint, checkpoint.remap)
    if storage == "dense":
        return checkpoint.config
    # A pruned checkpoint gets the class that verifies it before it loads a weight.
    arch = checkpoint.arch.pruned_architecture if checkpoint.remap else None
    return compressed_config(
        checkpoint.config, arch, tool_version=__version__, dense_layers=dense_layers
    )


def _write_card(
    checkpoint: Checkpoint, folder: Path, note: str, stored_bytes: int
) -> None:
    text = source_card(checkpoint)
    if text is None:
        return
    # The input may carry a note already, which would say wrong things of the output.
    for other in NOTES:
        text = text.removesuffix(other)
    text = fill(text + note, BYTES, gib(stored_bytes))
    write_file(folder / "README.md", text.encode())


def _tell(report: Report, stage: str, checkpoint: Checkpoint, layers_done: int) -> None:
    total, count = checkpoint.tensor_bytes, len(checkpoint.layers)
    report(
        Progress(
            stage=stage,
            layer=layers_done,
            layers=count,
            bytes_done=total * layers_done // count,
            bytes_total=total,
        )
    )
