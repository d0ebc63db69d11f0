"""Which tensor is where: the checked index of a safetensors checkpoint.

Everything here is learned from headers and config.json; no weight is read except the
routers, for the fingerprint. A checkpoint is hostile until it has passed these checks.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# The limit of the safetensors library itself; a larger header is refused unread.
MAX_HEADER_BYTES = 100_000_000
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where one tensor's bytes are."""

    name: str
    dtype: str
    """safetensors' spelling: BF16, F16, F32 ..."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """First byte in the file, header included."""
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one slice along axis 0."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.nbytes // ITEM_BYTES[self.dtype]

    @property
    def stored_bytes(self) -> int:
        """Bytes it takes in its file."""
        return self.nbytes

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes ``start`` to ``stop``; see ``read_bytes``."""
        buffer = bytearray(stop - start)
        with self.file.open("rb", buffering=0) as file:
            _read_into(
                file.fileno(), memoryview(buffer), self.offset + start, self.file
            )
        return buffer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint, or a one-line error."""
    try:
        data = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path}: missing. A checkpoint folder needs it."
        ) from error
    # Also what is no text, and a whole number of more digits than Python reads.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON: {error}. Download it again."
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found a {type(data).__name__}."
        )
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different; of two, each reader would pick one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it holds a name twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder, checked against the shard headers.

    Raises:
        CheckpointError: A shard is missing, truncated, lies about sizes or is outside
            the folder; a tensor is named by the index but absent, or present twice.
    """
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        weight_map = _weight_map(index_path)
        tensors: dict[str, TensorInfo] = {}
        for file_name in sorted(set(weight_map.values())):
            found = read_header(_inside(folder, file_name, index_path))
            listed = {name for name, at in weight_map.items() if at == file_name}
            if absent := sorted(listed - found.keys()):
                raise CheckpointError(
                    f"{index_path}: says {absent[0]!r} is in {file_name}, but that "
                    f"file does not hold it ({len(absent)} such tensors). "
                    "Download the checkpoint again."
                )
            if unlisted := sorted(found.keys() - listed):
                raise CheckpointError(
                    f"{folder / file_name}: holds {unlisted[0]!r}, which the index "
                    f"does not list there ({len(unlisted)} such tensors). "
                    "Download the checkpoint again."
                )
            tensors |= found
        return tensors
    if (folder / SINGLE_NAME).is_file():
        return read_header(_inside(folder, SINGLE_NAME, folder))
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    hint = f"; {len(shards)} shards are there without it" if shards else ""
    raise CheckpointError(
        f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} found{hint}. "
        "Only safetensors checkpoints are read."
    )


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path}: has no weight_map. Download the checkpoint again."
        )
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str):
            raise CheckpointError(
                f"{path}: weight_map[{name!r}] is {file_name!r}, not a file name."
            )
    return weight_map


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a file, symlinks followed, belongs to a checkpoint folder.

    Files of a Hub snapshot are symlinks into the ``blobs`` folder of their repository.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # links that lead in a circle
        return False


def _inside(folder: Path, file_name: str, named_by: Path) -> Path:
    path = folder / file_name
    plain = Path(file_name).name == file_name and file_name not in {"", ".", ".."}
    if not plain or not file_name.isprintable() or not is_inside(folder, path):
        raise CheckpointError(
            f"{named_by}: names {file_name!r}, which is not inside the folder. "
            "Copy the file there."
        )
    if not path.is_file():
        raise CheckpointError(
            f"{path}: shard is missing, but {INDEX_NAME} needs it. "
            "Download the checkpoint again."
        )
    return path


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, after the library has checked its header."""
    try:
        # The library refuses oversized headers, overlaps, holes and truncation.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, path.stat().st_size):
                raise CheckpointError(f"{path}: header claims {length} bytes.")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        said = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{path}: damaged or truncated safetensors file ({_sizes(path)}): {said}. "
            "Download it again."
        ) from error
    start = 8 + length
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        if entry["dtype"] not in ITEM_BYTES:
            raise CheckpointError(
                f"{path}: {name}: data type {entry['dtype']} is not supported. "
                f"Supported: {', '.join(ITEM_BYTES)}."
            )
        tensors[name] = TensorInfo(
            name=name,
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            file=path,
            offset=start + first,
            nbytes=last - first,
        )
    return tensors


def _sizes(path: Path) -> str:
    """How long a damaged file is, and how long its header says it is."""
    found = f"{path.stat().st_size} bytes"
    guesses = (ValueError, TypeError, LookupError, AttributeError, RecursionError)
    with suppress(*guesses, OSError, struct.error):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, MAX_HEADER_BYTES)))
        header.pop("__metadata__", None)
        last = max(entry["data_offsets"][1] for entry in header.values())
        return f"{found}, by its header {8 + length + last}"
    return found


def fingerprint(
    config: dict[str, Any], tensors: dict[str, TensorInfo], routers: Iterable[str]
) -> str:
    """SHA-256 over config, every tensor's name, type and shape, and the router bytes.

    Routers identify a model: fine-tunes of one base differ there, and they are small.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(config, sort_keys=True).encode())
    for info in sorted(tensors.values(), key=lambda item: item.name):
        digest.update(f"\n{info.name} {info.dtype} {info.shape}".encode())
    for name in routers:
        digest.update(read_bytes(tensors[name]))
    return digest.hexdigest()


def read_bytes(info: TensorInfo, start: int = 0, stop: int | None = None) -> bytearray:
    """Bytes ``start`` to ``stop`` of a tensor, in memory of their own (no mmap)."""
    return info.read(start, info.nbytes if stop is None else stop)


def _read_into(fd: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{path}: ended at byte {offset + done} while being read."
            )
        done += count
