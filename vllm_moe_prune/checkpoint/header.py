"""The header of a safetensors file: built here, for every file that is written."""

import json
from collections.abc import Iterable, Mapping


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    metadata: Mapping[str, str],
) -> bytes:
    """The bytes before the data: length, names and places, filled up to 8 bytes.

    The safetensors library writes metadata in random order; here the same content
    gives the same bytes.

    Args:
        tensors: Name, dtype as safetensors spells it, shape, and bytes of each, in the
            order in which their data follows.
        metadata: What ``__metadata__`` says.
    """
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        start, end = end, end + nbytes
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    # Spaces at the end are JSON; data then begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
