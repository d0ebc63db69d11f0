"""Writing the shards of one checkpoint from several ranks, into one shared folder.

Every rank writes the bytes it has at their place. When all bytes of a shard are written
and each rank has forced its own to disk, rank 0 gives the shard its name and journals
it, so that a killed run goes on with any number of ranks.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..files.atomic import writing
from ..files.regular import open_regular
from ..ranks.group import Ranks
from .writer import OpenShard, ShardPlan, ShardWriter, pieces, sha256_of

Hashes = dict[str, str]


@dataclass(kw_only=True)
class SharedWriter(ShardWriter):
    """A ``ShardWriter`` on each rank; they meet from time to time, all of them."""

    ranks: Ranks
    _left: dict[str, int] = field(default_factory=dict)
    """Bytes that no rank has written, by shard."""
    _told: dict[str, int] = field(default_factory=dict)
    """Bytes of this rank that the others know of, by shard that is not complete."""
    _own: dict[str, Future[Hashes]] = field(default_factory=dict)
    """Of complete shards: hashes of what this rank wrote, once that is on the disk."""

    _closed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for plan in self.shards:
            if plan.file_name not in self.finished:
                self._left[plan.file_name] = sum(plan.sizes.values())

    def meet(self) -> None:
        """Tell the others what was written; finish shards that are complete by that."""
        self._hashed()
        for name, left in self._left.items():
            # Of a shard without any bytes there is but the header.
            if left == 0 and self.ranks.rank == 0:
                self._start(self._plan(name))
        closed = {name: future.result() for name, future in self._own.items()}
        self._own.clear()
        wrote = {
            name: sum(shard.at.values()) - self._told.get(name, 0)
            for name, shard in self._open.items()
        }
        for name, size in wrote.items():
            self._told[name] = self._told.get(name, 0) + size
        told = self.ranks.everyones([wrote, closed])
        for rank, (sizes, _) in enumerate(told):
            for name, size in sizes.items():
                self._left[name] -= size
                self.bytes_written += size if rank != self.ranks.rank else 0
        if self.ranks.rank == 0:
            for name in closed:
                found = {
                    tensor: sha256
                    for _, of_rank in told
                    for tensor, sha256 in of_rank.get(name, {}).items()
                }
                done = self._pool.submit(self._complete, self._plan(name), found)
                self._closing.append(done)
        for name in [name for name, left in self._left.items() if left == 0]:
            del self._left[name]
            self._told.pop(name, None)
            shard = self._open.pop(name, None)
            self._own[name] = self._pool.submit(_own_hashes, shard)
        self._raise_failures()

    def close(self) -> None:
        """Wait until the last shards of all ranks are complete; once is enough."""
        if self._closed:
            return
        # In the first the last bytes are told, in the second that they are on the disk.
        self.meet()
        self.meet()
        assert not self._left, f"unfinished shards: {sorted(self._left)}"
        for future in self._closing:
            future.result()
        self._closing.clear()
        self._pool.shutdown()
        self._hasher.shutdown()
        # Until here rank 0 was giving names.
        self.ranks.wait()
        self._closed = True

    def _plan(self, name: str) -> ShardPlan:
        return next(plan for plan in self.shards if plan.file_name == name)

    def _hash(self, shard: OpenShard, name: str, at: int, view: memoryview) -> None:
        # A tensor of several experts is hashed in the end, if others write of it too.
        if at == 0 or (name in shard.digests and at == shard.at[name]):
            digest = shard.digests.setdefault(name, hashlib.sha256())
            self._hashing = self._hasher.submit(digest.update, view)
        else:
            shard.digests.pop(name, None)

    def _wrote(self, shard: OpenShard) -> None:
        self._raise_failures()

    def _complete(self, plan: ShardPlan, found: Hashes) -> None:
        """Give a shard its name, once no rank has anything of it left to write."""
        empty = hashlib.sha256().hexdigest()
        missing = [name for name in plan.offsets if name not in found]
        found |= {name: empty for name in missing if not plan.sizes[name]}
        found |= self._read(plan, [name for name in missing if plan.sizes[name]])
        self._publish(plan, {name: found[name] for name in plan.offsets})

    def _read(self, plan: ShardPlan, names: Iterable[str]) -> Hashes:
        """SHA-256 of tensors that several ranks have written."""
        path = self._unfinished(plan)
        with writing(path), open_regular(path) as file:
            found = {}
            for name in names:
                file.seek(plan.offsets[name])
                found[name] = sha256_of(pieces(file, plan.sizes[name]))
            return found


def _own_hashes(shard: OpenShard | None) -> Hashes:
    """Of tensors that this rank has written whole, once they are on the disk."""
    if shard is None:
        return {}
    shard.close()
    whole = {
        name for name, size in shard.plan.sizes.items() if shard.at.get(name) == size
    }
    return {
        name: digest.hexdigest()
        for name, digest in shard.digests.items()
        if name in whole
    }
