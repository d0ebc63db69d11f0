"""Changing how expert weights are stored: dense or compressed, both ways, bit for bit.

A first pass counts non-zeros, so that every shard is planned to the byte before it is
written; the second one writes. Memory holds one expert matrix, also where all experts
of a layer are packed into one tensor.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import __version__
from ..checkpoint.compressed import compressed_config
from ..checkpoint.index import ITEM_BYTES, TensorInfo, read_bytes
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import read_row, read_tensor
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
from ..recipes.schema import parse_pattern
from .card import source_card
from .card_places import BYTES, fill
from .copy import tensor_view
from .output import companions_sha256, copy_companions, copy_records
from .predict import StoredPart, bitmask_parts
from .slice import names_in_order
from .transaction import is_complete, output_transaction

StorageName = Literal["dense", "bitmask"]
STORAGES: tuple[StorageName, ...] = ("dense", "bitmask")
NOTE = """
## Stored compressed

This copy stores its expert weights without their zeros. vLLM needs the plugin
(`pip install vllm-moe-prune`) to read it, whatever is said above about the plain
weights, which `vllm-moe-prune convert <this folder> OUT --storage dense` gives back.
"""


def parse_storage_name(name: str) -> StorageName:
    """The storage a user named.

    Raises:
        RecipeError: There is no such storage.
    """
    for storage in STORAGES:
        if name == storage:
            return storage
    raise RecipeError(f"storage {name!r} is not one of: {', '.join(STORAGES)}.")


@dataclass(frozen=True)
class Stored:
    """How one tensor of the dense form is written."""

    info: TensorInfo
    layer: int | None
    parts: tuple[StoredPart, ...]
    group: tuple[int, int] | None = None
    """(n, m) where it is compressed at a fixed rate."""

    @property
    def compressed(self) -> bool:
        """Whether it is written in parts."""
        return len(self.parts) > 1


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
    *,
    resume: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: Report = ignore,
) -> Converted:
    """Write ``checkpoint`` to ``out`` in another storage; everything else stays.

    Args:
        checkpoint: The input, in either storage.
        out: The output folder, which appears when everything is in it.
        storage: How expert weights are stored there.
        resume: Continue an interrupted conversion.
        overwrite: Replace an existing output once the new one is complete.
        max_shard_bytes: Size limit of one output file.
        report: Called once per layer.

    Raises:
        CheckpointError: Experts are quantized, or damaged.
        OutputError: See ``output_transaction``.
    """
    if checkpoint.form is not None:
        raise CheckpointError(
            f"{checkpoint.folder}: its weights are quantized; only those that are not "
            "can be stored without their zeros."
        )
    plan, dense_layers = _plan(checkpoint, storage, report)
    shards = plan_shards(
        [part for item in plan for part in item.parts], max_shard_bytes
    )
    stored = sum(sum(shard.sizes.values()) for shard in shards)
    config = _config(checkpoint, storage, dense_layers)
    # All that determines the output's bytes; a resumed run must have the same key.
    said = (__version__, checkpoint.fingerprint, companions_sha256(checkpoint), storage)
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
                _write_card(checkpoint, folder, storage, stored)
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
        plain = StoredPart(name, info.dtype, info.shape)
        layer_index = checkpoint.arch.layer_of(name)
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
    if not item.compressed:
        # Whole rows, since a compressed input unpacks whole rows.
        step = max(
            info.row_bytes, CHUNK_BYTES // max(info.row_bytes, 1) * info.row_bytes
        )
        for start in range(0, info.nbytes, max(step, ITEM_BYTES[info.dtype])):
            stop = min(start + step, info.nbytes) if step else info.nbytes
            writer.write(info.name, memoryview(read_bytes(info, start, stop)), start)
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
    if storage == "dense":
        return checkpoint.config
    # A pruned checkpoint gets the class that verifies it before it loads a weight.
    arch = checkpoint.arch.pruned_architecture if checkpoint.remap else None
    return compressed_config(
        checkpoint.config, arch, tool_version=__version__, dense_layers=dense_layers
    )


def _write_card(
    checkpoint: Checkpoint, folder: Path, storage: StorageName, stored_bytes: int
) -> None:
    text = source_card(checkpoint)
    if text is None:
        return
    # The input may carry the note already; a dense output must not.
    note = NOTE if storage == "bitmask" else ""
    text = fill(text.removesuffix(NOTE) + note, BYTES, gib(stored_bytes))
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
