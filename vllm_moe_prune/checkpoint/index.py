"""Which tensor is where: the checked index of a safetensors checkpoint.

Everything here is learned from headers and config.json; no weight is read. A checkpoint
is hostile until it has passed these checks.
"""

import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files.json_file import parse_json, read_json
from ..files.regular import MIB, Kind, open_regular

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CONFIG = Kind(
    name="config.json of a checkpoint",
    max_bytes=16 * MIB,
    error=CheckpointError,
    absent="missing. A checkpoint folder needs it.",
    remedy="Download it again.",
)
INDEX = Kind(
    name="safetensors index",
    max_bytes=128 * MIB,
    error=CheckpointError,
    remedy="Download the checkpoint again.",
)
# The limit of the safetensors library itself; a larger header is refused unread.
MAX_HEADER_BYTES = 100_000_000
# Of one checkpoint; models of a trillion parameters have 210,000. In a header each has
# up to ten values: its type, its shape, where it begins and ends.
MAX_TENSORS = 400_000
MAX_HEADER_VALUES = 10 * MAX_TENSORS
# A header is small beside its tensors, and may be this much larger than they are.
HEADER_SLACK = MIB
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1},
    **{"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
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
        with open_regular(self.file) as file:
            _read_into(
                file.fileno(), memoryview(buffer), self.offset + start, self.file
            )
        return buffer


def read_index(folder: Path, *, allow_links: bool = False) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder, checked against the shard headers.

    Args:
        folder: The checkpoint folder.
        allow_links: Follow links that lead out of it.

    Raises:
        CheckpointError: A shard is missing, truncated, lies about sizes or is outside
            the folder; a tensor is named by the index but absent, or present twice.
    """
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        weight_map = _weight_map(index_path)
        tensors: dict[str, TensorInfo] = {}
        for file_name in sorted(set(weight_map.values())):
            path = _shard_path(folder, file_name, index_path, allow_links)
            found = read_header(path).tensors
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
        check_link(folder, folder / SINGLE_NAME, allow_links=allow_links)
        return read_header(folder / SINGLE_NAME).tensors
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    hint = f"; {len(shards)} shards are there without it" if shards else ""
    raise CheckpointError(
        f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} found{hint}. "
        "Only safetensors checkpoints are read."
    )


def _weight_map(path: Path) -> dict[str, str]:
    found = read_json(path, INDEX, max_values=2 * MAX_TENSORS)
    weight_map = found.get("weight_map")
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


def check_link(folder: Path, path: Path, *, allow_links: bool) -> None:
    """Refuse a file that a link takes out of a checkpoint folder.

    Args:
        folder: The checkpoint folder.
        path: A file below it.
        allow_links: Refuse nothing.

    Raises:
        CheckpointError: Naming the file and where it really is.
    """
    if allow_links or is_inside(folder, path):
        return
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: is a link that leads nowhere. Copy the file there."
        ) from error
    raise CheckpointError(
        f"{path}: is a link to {target}, which is not inside the folder. If you trust "
        "whoever made it, pass --allow-links; otherwise copy the file there."
    )


def is_inside(folder: Path, path: Path) -> bool:
    """Whether a file, symlinks followed, belongs to a checkpoint folder.

    Files of a Hub snapshot are symlinks into the ``blobs`` folder of their repository.
    """
    root = folder.resolve()
    # models--OWNER--NAME/snapshots/COMMIT: blobs lie beside snapshots.
    if root.parent.name == "snapshots":
        root = root.parent.parent
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # links that lead in a circle
        return False


def _shard_path(
    folder: Path, file_name: str, named_by: Path, allow_links: bool
) -> Path:
    """A shard that an index names, in the folder or in one below it."""
    parts = file_name.split("/")
    # The name alone; check_link then follows symbolic links.
    if not file_name.isprintable() or not {"", ".", ".."}.isdisjoint(parts):
        raise CheckpointError(
            f"{named_by}: names {file_name!r}, which is not inside the folder. "
            "Copy the file there, and name it as it is there."
        )
    path = folder / file_name
    check_link(folder, path, allow_links=allow_links)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: shard is missing, but {INDEX_NAME} needs it. "
            "Download the checkpoint again."
        )
    return path


@dataclass(frozen=True)
class Header:
    """What one safetensors file says it holds."""

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """The header of one safetensors file, after the library has checked it.

    Raises:
        CheckpointError: It is no such file, damaged, truncated, or larger than what it
            is about would need.
    """
    try:
        head = read_head(path)
        # The library refuses overlaps, holes and truncation.
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        header = parse_json(head, MAX_HEADER_VALUES)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        said = str(getattr(error, "strerror", None) or error)
        said = said.removeprefix("Error while deserializing header: ")
        raise CheckpointError(
            f"{path}: damaged or truncated safetensors file ({_sizes(path)}): {said}. "
            "Download it again."
        ) from error
    # data_offsets count from the end of the header.
    start = 8 + len(head)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise CheckpointError(f"{path}: {name}: its entry is no object.")
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
    return Header(metadata, tensors)


def read_head(path: Path) -> bytes:
    """The JSON text of a header.

    Raises:
        OSError: There is no such file, or it cannot be read.
        ValueError: It is no safetensors file, or one that is mostly header.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it ends before its header begins")
        (length,) = struct.unpack("<Q", start)
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"its header claims {length} bytes")
        if length > HEADER_SLACK + (size - 8 - length):
            raise ValueError(
                f"its header takes {length} bytes, its tensors {size - 8 - length}"
            )
        head = file.read(length)
        if len(head) < length:
            raise ValueError("it ended while its header was being read")
        return head


def _sizes(path: Path) -> str:
    """How long a damaged file is, and how long its header says it is."""
    found = f"{path.stat().st_size} bytes"
    with suppress(ValueError, TypeError, LookupError, AttributeError, OSError):
        head = read_head(path)
        header = parse_json(head)
        header.pop("__metadata__", None)
        last = max(entry["data_offsets"][1] for entry in header.values())
        return f"{found}, by its header {8 + len(head) + last}"
    return found


def read_bytes(info: TensorInfo, start: int = 0, stop: int | None = None) -> bytearray:
    """Bytes ``start`` to ``stop`` of a tensor, in memory of their own (no mmap)."""
    return info.read(start, info.nbytes if stop is None else stop)


def _read_into(fd: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        # May read less than asked: Linux gives at most 2 GiB at once.
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(
                f"{path}: ended at byte {offset + done} while being read."
            )
        done += count
