"""Writing a checkpoint: shards planned to the byte, a journal, resume after a kill.

The safetensors library can only write a shard that is in memory whole; a shard may be
larger than a layer, so the header is written here and the tensors stream in after it.
Each is hashed while written: the journal knows a shard by its tensors' hashes, and
the finished folder carries them (see ``tensor_hashes``).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Protocol

from ..errors import OutputError
from ..files.atomic import write_file, writing
from ..files.json_file import parse_json
from ..files.regular import MIB, Kind, open_regular, read_file
from .header import build_header
from .index import INDEX_NAME, ITEM_BYTES

MAX_SHARD_BYTES = 5_000_000_000
JOURNAL_NAME = "journal.jsonl"
CHUNK_BYTES = 16 << 20
"""What is read and written at a time."""
JOURNAL = Kind(name="journal of a run", max_bytes=256 * MIB, error=OutputError)


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

    # save_pretrained splits by the same factory, so shards are as users know them.
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
    sizes = {tensor.name: tensor_bytes(tensor) for tensor in ordered}
    header = build_header(
        ((one.name, one.dtype, one.shape, sizes[one.name]) for one in ordered),
        {"format": "pt"},
    )
    starts = accumulate(sizes.values(), initial=len(header))
    return ShardPlan(file_name, header, dict(zip(sizes, starts, strict=False)), sizes)


def index_json(shards: Sequence[ShardPlan], parameters: int) -> bytes:
    """The bytes of ``model.safetensors.index.json``."""
    weight_map = {name: shard.file_name for shard in shards for name in shard.offsets}
    total = sum(sum(shard.sizes.values()) for shard in shards)
    data = {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(data, indent=2) + "\n").encode()


@dataclass(kw_only=True)
class OpenShard:
    """A shard being written."""

    plan: ShardPlan
    path: Path
    fd: int
    left: int
    at: dict[str, int] = field(default_factory=dict)
    """Bytes written of each tensor so far."""
    digests: "dict[str, hashlib._Hash]" = field(default_factory=dict)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every tensor; one without elements was never written."""
        empty = hashlib.sha256()
        names = self.plan.offsets
        return {name: self.digests.get(name, empty).hexdigest() for name in names}

    def close(self) -> None:
        """Force the bytes to disk."""
        with writing(self.path):
            try:
                os.fsync(self.fd)
            finally:
                os.close(self.fd)


@dataclass(kw_only=True)
class ShardWriter:
    """Writes planned shards into a folder; a finished shard is journalled and kept.

    ``finished`` are shards an interrupted run completed, with the SHA-256 of each of
    their tensors: writes to them are skipped.
    """

    folder: Path
    shards: Sequence[ShardPlan]
    finished: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    journal: Path | None = None
    """The folder of the journal; None: where the shards are."""
    bytes_written: int = 0
    _open: dict[str, OpenShard] = field(default_factory=dict)
    _done: dict[str, Mapping[str, str]] = field(default_factory=dict)
    _closing: list[Future[None]] = field(default_factory=list)
    _hashing: Future[None] | None = None

    def __post_init__(self) -> None:
        self._where = {name: plan for plan in self.shards for name in plan.offsets}
        # Waiting for the disk, and hashing, overlap with reading what comes next.
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._hasher = ThreadPoolExecutor(max_workers=1)

    def needs(self, name: str) -> bool:
        """Whether a tensor still has to be written."""
        return self._where[name].file_name not in self.finished

    def meet(self) -> None:
        """Tell the other processes what was written; here there are none."""

    def file_of(self, name: str) -> str:
        """The shard a tensor goes into."""
        return self._where[name].file_name

    def journalled(self) -> set[str]:
        """Shards that are complete and recorded, by this run or an earlier one."""
        return self._done.keys() | self.finished.keys()

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every tensor in the shards that are complete."""
        done = {**self.finished, **self._done}
        return {name: each for shard in done.values() for name, each in shard.items()}

    def write(self, name: str, data: memoryview, at: int = 0) -> None:
        """Write ``data`` at byte ``at`` of a tensor; every byte once, and in order.

        The data must not change before the next call: it is hashed meanwhile.
        """
        plan = self._where[name]
        if plan.file_name in self.finished:
            return
        shard = self._open.get(plan.file_name) or self._start(plan)
        offset, view = plan.offsets[name] + at, data.cast("B")
        # One update at a time, in the order of the bytes; then the buffer is free.
        self._hashed()
        self._hash(shard, name, at, view)
        done = 0
        with writing(shard.path):
            while done < len(view):
                # May write less than asked: Linux takes at most 2 GiB at once.
                done += os.pwrite(shard.fd, view[done:], offset + done)
        self.bytes_written += done
        shard.at[name] = shard.at.get(name, 0) + done
        shard.left -= done
        self._wrote(shard)

    def _hash(self, shard: OpenShard, name: str, at: int, view: memoryview) -> None:
        """Begin to hash what is about to be written."""
        assert at == shard.at.get(name, 0), f"{name}: written out of order"
        digest = shard.digests.setdefault(name, hashlib.sha256())
        self._hashing = self._hasher.submit(digest.update, view)

    def _wrote(self, shard: OpenShard) -> None:
        """Close a shard that is complete, meanwhile."""
        if shard.left == 0:
            del self._open[shard.plan.file_name]
            self._hashed()
            self._closing.append(self._pool.submit(self._finish, shard))
        # A shard that could not be closed meanwhile ends the run here.
        self._raise_failures()

    def _hashed(self) -> None:
        """Wait until what was written last is hashed."""
        if self._hashing is not None:
            self._hashing.result()
            self._hashing = None

    def _start(self, plan: ShardPlan) -> OpenShard:
        path = self._unfinished(plan)
        with writing(path):
            if "/" in plan.file_name:
                path.parent.mkdir(parents=True, exist_ok=True)
            # Not truncated: other processes may write into it. What a killed run left
            # of the same shard is written over, every byte.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.ftruncate(fd, plan.file_bytes)
            os.pwrite(fd, plan.header, 0)
        left = plan.file_bytes - len(plan.header)
        shard = OpenShard(plan=plan, path=path, fd=fd, left=left)
        self._open[plan.file_name] = shard
        return shard

    def _finish(self, shard: OpenShard) -> None:
        shard.close()
        self._publish(shard.plan, shard.hashes())

    def _publish(self, plan: ShardPlan, hashes: Mapping[str, str]) -> None:
        # On disk, then named, then journalled: a kill in between costs one shard.
        path = self._unfinished(plan)
        with writing(path):
            path.rename(self.folder / plan.file_name)
        line: dict[str, object] = {"shard": plan.file_name, "sha256": hashes}
        append_journal(self.journal or self.folder, line)
        self._done[plan.file_name] = hashes

    def _unfinished(self, plan: ShardPlan) -> Path:
        return self.folder / (plan.file_name + ".tmp")

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
        self._hasher.shutdown()
        assert not self._open, f"unfinished shards: {sorted(self._open)}"

    def abort(self) -> None:
        """Let go of everything after an error; finished shards stay for a resume."""
        self._pool.shutdown()
        self._hasher.shutdown()
        for shard in self._open.values():
            os.close(shard.fd)


def append_journal(folder: Path, entry: dict[str, object]) -> None:
    """Add one line to the journal and force it to disk."""
    path = folder / JOURNAL_NAME
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rewrite_journal(folder: Path, entries: Sequence[dict[str, object]]) -> None:
    """Replace the journal in one step."""
    path = folder / JOURNAL_NAME
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    with writing(path):
        write_file(path, text.encode())


def read_journal(folder: Path) -> list[dict[str, object]]:
    """The complete lines of a journal, up to one that a kill or a crash spoilt."""
    path = folder / JOURNAL_NAME
    if not path.is_file():
        return []
    entries = []
    # Behind the last newline is nothing, or a line that a kill cut off.
    for line in read_file(path, JOURNAL).split(b"\n")[:-1]:
        try:
            entry = parse_json(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries


def finished_shards(
    folder: Path, shards: Sequence[ShardPlan], journal: Sequence[dict[str, object]]
) -> dict[str, dict[str, str]]:
    """Shards an interrupted run finished, and the SHA-256 of each of their tensors.

    Only those count whose bytes still are what the journal says.
    """
    planned = {shard.file_name: shard for shard in shards}
    finished = {}
    for entry in journal:
        name, recorded = entry.get("shard"), entry.get("sha256")
        if isinstance(name, str) and name in planned:
            found = _read_again(folder / name, planned[name])
            if found is not None and found == recorded:
                finished[name] = found
    return finished


def _read_again(path: Path, plan: ShardPlan) -> dict[str, str] | None:
    """SHA-256 of each tensor of a shard; None: it is gone, or not the planned one."""
    # Cheapest first: the size, the header, then hashing all bytes.
    if not path.is_file() or path.stat().st_size != plan.file_bytes:
        return None
    with open_regular(path) as file:
        if file.read(len(plan.header)) != plan.header:
            return None
        # Offsets are in the order of the data: one pass over the file.
        return {
            name: sha256_of(pieces(file, plan.sizes[name])) for name in plan.offsets
        }


def pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The next ``size`` bytes of a file."""
    while size > 0 and (piece := file.read(min(size, CHUNK_BYTES))):
        size -= len(piece)
        yield piece


def sha256_of(pieces: Iterable[bytes | bytearray]) -> str:
    """SHA-256 of bytes that come in pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def index_needed(shards: Sequence[ShardPlan]) -> str | None:
    """Name of the index file, or None where a single file needs none."""
    return INDEX_NAME if len(shards) > 1 else None
