"""Writing a checkpoint: shards planned to the byte, a journal, resume after a kill.

The safetensors library can only write a shard that is in memory whole; a shard may be
larger than a layer, so the header is written here and the tensors stream in after it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..errors import OutputError
from .index import INDEX_NAME, ITEM_BYTES

MAX_SHARD_BYTES = 5_000_000_000
JOURNAL_NAME = "journal.jsonl"


class TensorSpec(Protocol):
    """What the shard plan needs to know of an output tensor."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def tensor_bytes(tensor: TensorSpec) -> int:
    """Size of a tensor on disk."""
    count = 1
    for size in tensor.shape:
        count *= size
    return count * ITEM_BYTES[tensor.dtype]


@dataclass(frozen=True)
class ShardPlan:
    """One output file: its header and where each tensor starts."""

    file_name: str
    header: bytes
    offsets: dict[str, int]
    sizes: dict[str, int]

    @property
    def file_bytes(self) -> int:
        """Size of the finished file."""
        return len(self.header) + sum(self.sizes.values())


def plan_shards(
    tensors: Sequence[TensorSpec], max_bytes: int = MAX_SHARD_BYTES
) -> list[ShardPlan]:
    """Distribute tensors over shards, in order, before the first byte is written."""
    from huggingface_hub import split_state_dict_into_shards_factory

    by_name = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=tensor_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    return [
        _plan_shard(file_name, [by_name[name] for name in names])
        for file_name, names in split.filename_to_tensors.items()
    ]


def _plan_shard(file_name: str, tensors: list[TensorSpec]) -> ShardPlan:
    # Wider types first keeps every tensor aligned, as the library does it.
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start, offsets, sizes = 0, {}, {}
    for tensor in ordered:
        size = tensor_bytes(tensor)
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, start + size],
        }
        offsets[tensor.name], sizes[tensor.name] = start, size
        start += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + at for name, at in offsets.items()}
    return ShardPlan(file_name, header, offsets, sizes)


def index_json(shards: Sequence[ShardPlan], parameters: int) -> bytes:
    """The bytes of ``model.safetensors.index.json``."""
    weight_map = {name: shard.file_name for shard in shards for name in shard.offsets}
    total = sum(sum(shard.sizes.values()) for shard in shards)
    data = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(data, indent=2) + "\n").encode()


@dataclass
class _OpenShard:
    plan: ShardPlan
    path: Path
    fd: int
    left: int


@dataclass(kw_only=True)
class ShardWriter:
    """Writes planned shards into a folder; a finished shard is journalled and kept.

    ``finished`` are shards an interrupted run completed: writes to them are skipped.
    """

    folder: Path
    shards: Sequence[ShardPlan]
    finished: frozenset[str] = frozenset()
    bytes_written: int = 0
    _open: dict[str, _OpenShard] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)
    _closing: list[Future[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._where = {name: plan for plan in self.shards for name in plan.offsets}
        # Hashing a finished shard overlaps with filling the next one.
        self._pool = ThreadPoolExecutor(max_workers=1)

    def needs(self, name: str) -> bool:
        """Whether a tensor still has to be written."""
        return self._where[name].file_name not in self.finished

    def file_of(self, name: str) -> str:
        """The shard a tensor goes into."""
        return self._where[name].file_name

    def journalled(self) -> set[str]:
        """Shards that are complete and recorded, by this run or an earlier one."""
        return self._done | self.finished

    def write(self, name: str, data: memoryview, at: int = 0) -> None:
        """Write ``data`` at byte ``at`` of a tensor; every byte exactly once."""
        plan = self._where[name]
        if plan.file_name in self.finished:
            return
        shard = self._open.get(plan.file_name) or self._start(plan)
        offset, view = plan.offsets[name] + at, data.cast("B")
        done = 0
        with writing(shard.path):
            while done < len(view):
                done += os.pwrite(shard.fd, view[done:], offset + done)
        self.bytes_written += done
        shard.left -= done
        if shard.left == 0:
            del self._open[plan.file_name]
            self._closing.append(self._pool.submit(self._finish, shard))
        self._raise_failures()

    def _start(self, plan: ShardPlan) -> _OpenShard:
        path = self.folder / (plan.file_name + ".tmp")
        with writing(path):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            os.pwrite(fd, plan.header, 0)
        left = plan.file_bytes - len(plan.header)
        shard = _OpenShard(plan, path, fd, left)
        self._open[plan.file_name] = shard
        return shard

    def _finish(self, shard: _OpenShard) -> None:
        with writing(shard.path):
            os.fsync(shard.fd)
            os.close(shard.fd)
            digest = file_sha256(shard.path)
            shard.path.rename(self.folder / shard.plan.file_name)
        append_journal(
            self.folder,
            {
                "shard": shard.plan.file_name,
                "bytes": shard.plan.file_bytes,
                "sha256": digest,
            },
        )
        self._done.add(shard.plan.file_name)

    def _raise_failures(self) -> None:
        for future in [item for item in self._closing if item.done()]:
            self._closing.remove(future)
            future.result()

    def close(self) -> None:
        """Wait for the last shards; a tensor nobody wrote is a bug of ours."""
        for plan in self.shards:
            # Tensors without elements have nothing to be written.
            if not any(plan.sizes.values()) and plan.file_name not in self.finished:
                self._start(plan)
                self._finish(self._open.pop(plan.file_name))
        for future in self._closing:
            future.result()
        self._pool.shutdown()
        assert not self._open, f"unfinished shards: {sorted(self._open)}"

    def abort(self) -> None:
        """Let go of everything after an error; finished shards stay for a resume."""
        self._pool.shutdown()
        for shard in self._open.values():
            os.close(shard.fd)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses into an error that says how to go on.

    Raises:
        OutputError: Instead of any OSError; names ``path``.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}. "
            "Free space or mend the disk, then run the same command with --resume."
        ) from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_journal(folder: Path, entry: dict[str, object]) -> None:
    """Add one line to the journal and force it to disk."""
    path = folder / JOURNAL_NAME
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rewrite_journal(folder: Path, entries: Sequence[dict[str, object]]) -> None:
    """Replace the journal in one step."""
    path, temporary = folder / JOURNAL_NAME, folder / (JOURNAL_NAME + ".tmp")
    with writing(path):
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        temporary.replace(path)


def read_journal(folder: Path) -> list[dict[str, object]]:
    """The complete lines of a journal, up to one that a kill or a crash spoilt."""
    path = folder / JOURNAL_NAME
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text("utf-8", errors="replace").split("\n")[:-1]:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


def finished_shards(
    folder: Path, shards: Sequence[ShardPlan], journal: Sequence[dict[str, object]]
) -> frozenset[str]:
    """Shards an interrupted run finished and that still have their recorded hash."""
    planned = {shard.file_name: shard.file_bytes for shard in shards}
    finished = set()
    for entry in journal:
        name = entry.get("shard")
        if not isinstance(name, str) or name not in planned:
            continue
        path = folder / name
        if (
            path.is_file()
            and path.stat().st_size == planned[name]
            and file_sha256(path) == entry.get("sha256")
        ):
            finished.add(name)
    return frozenset(finished)


def index_needed(shards: Sequence[ShardPlan]) -> str | None:
    """Name of the index file, or None where a single file needs none."""
    return INDEX_NAME if len(shards) > 1 else None
