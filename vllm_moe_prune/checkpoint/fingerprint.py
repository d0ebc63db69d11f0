"""Which model a checkpoint is: what is in it, whatever files it is in.

A fingerprint is two hashes with a dot between them:

    identity   config.json; every tensor's name, type and shape; all of the routers
    contents   bytes of every tensor and of every expert: all of them in checkpoints up
               to 64 MiB, of larger ones at least three blocks of 4 KiB, evenly spread

A copy has the same fingerprint, as has the same model in other shards, or stored
without its zeros. Version 0.1 wrote the identity alone: its plans and statistics are
compared by that.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .index import TensorInfo, read_bytes

BLOCK_BYTES = 4096
FEWEST, MOST = 3, 64
"""Blocks read of one tensor or expert."""
BLOCKS = 1 << 15
"""Blocks read of all together, unless there are so many that each has the fewest."""
WHOLE_BYTES = 64 << 20
"""Checkpoints up to this size are read whole."""
READERS = 8


def fingerprint(
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    routers: Iterable[str],
    stored: Sequence[TensorInfo],
) -> str:
    """The fingerprint of a checkpoint.

    Args:
        config: The content of config.json, of the dense form.
        tensors: All tensors in their dense form.
        routers: Names of those that choose experts.
        stored: What is sampled: quantized matrices by their parts.
    """
    return f"{_identity(config, tensors, routers)}.{_contents(stored)}"


def difference(recorded: str, found: str) -> str | None:
    """In what a checkpoint is not the one that was recorded; None: it is the same."""
    if recorded == found:
        return None
    identity, _, contents = recorded.partition(".")
    other_identity, _, other_contents = found.partition(".")
    if identity != other_identity:
        return f"another model ({recorded[:12]}, this one is {found[:12]})"
    # Version 0.1 recorded the identity alone.
    if not contents or not other_contents:
        return None
    return "the same model with other weights: config.json and routers are the same"


def _identity(
    config: dict[str, Any], tensors: dict[str, TensorInfo], routers: Iterable[str]
) -> str:
    digest = hashlib.sha256()
    # Sorted: other tools write keys and tensors in another order.
    digest.update(json.dumps(config, sort_keys=True).encode())
    for info in sorted(tensors.values(), key=lambda item: item.name):
        digest.update(f"\n{info.name} {info.dtype} {info.shape}".encode())
    for name in routers:
        digest.update(read_bytes(tensors[name]))
    return digest.hexdigest()


def _contents(stored: Sequence[TensorInfo]) -> str:
    parts = [part for info in stored for part in _parts(info)]
    # The more parts, the fewer blocks of each, down to FEWEST.
    count = min(max(BLOCKS // max(len(parts), 1), FEWEST), MOST)
    whole = sum(info.nbytes for info in stored) <= WHOLE_BYTES

    def sample(part: tuple[TensorInfo, int, int]) -> bytes:
        info, first, last = part
        digest = hashlib.sha256()
        # With 2^62 blocks allowed, _blocks yields the part whole.
        for start, stop in _blocks(first, last, 1 << 62 if whole else count):
            digest.update(read_bytes(info, start, stop))
        return digest.digest()

    digest = hashlib.sha256()
    # Waiting for many small reads takes the time: several wait side by side.
    with ThreadPoolExecutor(READERS) as pool:
        for (info, *_), found in zip(parts, pool.map(sample, parts), strict=True):
            digest.update(info.name.encode() + b"\n" + found)
    return digest.hexdigest()


def _parts(info: TensorInfo) -> Iterator[tuple[TensorInfo, int, int]]:
    """First and last byte of each expert of a packed tensor, or of a whole one."""
    step = info.row_bytes if len(info.shape) > 2 else 0
    # range takes no step of 0; without bytes there is no part.
    for first in range(0, info.nbytes, step or info.nbytes or 1):
        yield info, first, first + (step or info.nbytes)


def _blocks(first: int, last: int, count: int) -> Iterator[tuple[int, int]]:
    """The blocks that are read of some bytes, the first and the last among them."""
    size = last - first
    if size <= count * BLOCK_BYTES:
        yield first, last
        return
    for number in range(count):
        # Multiplied before dividing: the last block ends exactly where the bytes do.
        start = first + number * (size - BLOCK_BYTES) // (count - 1)
        yield start, start + BLOCK_BYTES
