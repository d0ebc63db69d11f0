"""The recovered checkpoint: its input, file by file, with other values in some tensors.

Training changes values and no name, shape or dtype. So headers, offsets and sizes of
the files stay those of the input, and what was not trained is copied byte for byte.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..calibrate.boundary import NAMES
from ..calibrate.container import TensorBytes, write_safetensors
from ..checkpoint.index import (
    INDEX_NAME,
    TensorInfo,
    read_bytes,
    read_head,
    read_header,
    read_index,
)
from ..checkpoint.open import Checkpoint
from ..checkpoint.reader import read_tensor
from ..checkpoint.writer import CHUNK_BYTES, ShardPlan, ShardWriter
from ..cut.card import source_card
from ..cut.card_places import without_scores
from ..cut.copy import tensor_view
from ..cut.finish import PROVENANCE
from ..cut.output import RECOVERED, copy_companions, copy_records
from ..errors import CheckpointError, OutputError
from ..files.atomic import copy_file, write_file, writing
from ..files.json_file import read_json

NOTE_START = "\n## Recovered\n"


def same_shards(
    checkpoint: Checkpoint,
) -> tuple[list[ShardPlan], dict[str, TensorInfo]]:
    """The files of a checkpoint as they are, and every tensor stored in them."""
    stored = read_index(checkpoint.folder, allow_links=checkpoint.allow_links)
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in stored.values():
        by_file.setdefault(info.file, []).append(info)
    shards = []
    for path, infos in by_file.items():
        head = read_head(path)
        # safetensors: the length of the JSON as a little-endian uint64, then the JSON.
        header = struct.pack("<Q", len(head)) + head
        # The order of the file, in which write_weights goes through it.
        infos.sort(key=lambda info: info.offset)
        shards.append(
            ShardPlan(
                path.relative_to(checkpoint.folder).as_posix(),
                header,
                {info.name: info.offset for info in infos},
                {info.name: info.nbytes for info in infos},
            )
        )
    return shards, stored


def write_weights(
    writer: ShardWriter,
    stored: Mapping[str, TensorInfo],
    changed: Mapping[str, torch.Tensor],
) -> None:
    """Fill the planned files, in their order."""
    for shard in writer.shards:
        for name in shard.offsets:
            # Whole shards are finished or not: the others of this one are too.
            if not writer.needs(name):
                break
            info = stored[name]
            if name in changed:
                view = tensor_view(changed[name])
                # The header is copied, so every size in it has to stay true.
                assert len(view) == info.nbytes, f"{name}: {len(view)} bytes"
                writer.write(name, view)
                continue
            for start in range(0, info.nbytes, CHUNK_BYTES):
                stop = min(start + CHUNK_BYTES, info.nbytes)
                writer.write(name, memoryview(read_bytes(info, start, stop)), start)


def write_rest(checkpoint: Checkpoint, folder: Path) -> None:
    """What stands beside the weights, all but the record of what was done."""
    copy_companions(checkpoint, folder)
    copy_records(checkpoint, folder)
    # Names, shapes and files are the input's, so these are too.
    for name in (INDEX_NAME, "config.json"):
        path = checkpoint.folder / name
        if path.is_file():
            copy_file(path, folder / name)


def read_history(checkpoint: Checkpoint) -> dict[str, Any]:
    """The provenance of the input; empty for one that was never cut."""
    path = checkpoint.folder / "provenance.json"
    return read_json(path, PROVENANCE) if path.is_file() else {}


def write_record(
    checkpoint: Checkpoint,
    folder: Path,
    history: dict[str, Any],
    record: dict[str, Any],
) -> None:
    """Add to the provenance, and to the model card if there is one."""
    earlier = history.get(RECOVERED)
    # A list, since an output may be recovered again.
    history[RECOVERED] = [*(earlier if isinstance(earlier, list) else []), record]
    text = json.dumps(history, indent=2) + "\n"
    write_file(folder / "provenance.json", text.encode())
    card = source_card(checkpoint)
    if card is not None:
        # What was measured before the training is not true of this output.
        text = without_scores(card) + _note(record)
        write_file(folder / "README.md", text.encode())


def _note(record: dict[str, Any]) -> str:
    before, after = record["loss"]["before"], record["loss"]["after"]
    return (
        f"{NOTE_START}\nTrained after the cut (`vllm-moe-prune recover`, method "
        f"`{record['method']}`, {record['steps']} steps) on text of "
        f"`{record['calibration']['source']}`: the loss on held-out windows went "
        f"from {before:.4f} to {after:.4f} nats per token. Weights that were zero "
        "still are.\n"
    )


def save_trained(path: Path, changed: dict[str, torch.Tensor]) -> None:
    """Keep what was trained, so that a killed run need not train it again."""
    parts = {
        name: TensorBytes(NAMES[tensor.dtype], tuple(tensor.shape), tensor_view(tensor))
        for name, tensor in changed.items()
    }
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, parts, {})


def load_trained(path: Path, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What an interrupted run trained.

    Raises:
        OutputError: It is damaged, or not of this checkpoint.
    """
    try:
        found = read_header(path).tensors
    except CheckpointError as error:
        raise OutputError(str(error)) from error
    for name, info in found.items():
        ours = checkpoint.tensors.get(name)
        if ours is None or (ours.shape, ours.dtype) != (info.shape, info.dtype):
            raise OutputError(
                f"{path}: {name} is no tensor of {checkpoint.folder}. Pass --overwrite "
                "to start again."
            )
    return {name: read_tensor(info) for name, info in found.items()}
