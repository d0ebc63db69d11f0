"""Memory that native libraries keep when nobody uses it any more.

Without this a process grows with every layer, by 40 MiB for layers of 100 MiB.
"""

import ctypes
import os
from collections.abc import Iterator

# oneDNN compiles a matrix product for each number of rows, here of tokens that an
# expert gets, and keeps 1024 of them: 400 MiB. PyTorch keeps others of its own.
CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
KEPT = 16
TEMPORARY_BYTES = 256 << 20
"""Of what one step of a forward holds at once."""


def keep_few_kernels() -> None:
    """Bound what oneDNN keeps, if it has not begun; the user's own setting stands."""
    for name in CAPACITIES:
        os.environ.setdefault(name, str(KEPT))


def release_freed() -> None:
    """Give freed weights back to the system, once per layer.

    glibc keeps blocks of up to 32 MiB to use them again, and what does not fit into
    the holes grows the heap.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
    if trim is not None:
        trim(0)


def batches(count: int, item_bytes: int, limit: int | None = None) -> Iterator[slice]:
    """Slices over ``count`` items so that each slice's temporaries fit the limit."""
    step = max(1, (limit or TEMPORARY_BYTES) // item_bytes)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
