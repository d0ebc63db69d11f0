"""Writing small safetensors files so that the same content gives the same bytes."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..files.atomic import write_file


class TensorBytes(NamedTuple):
    """One tensor of the file."""

    dtype: str
    """safetensors' spelling: F64, BF16 ..."""
    shape: tuple[int, ...]
    data: memoryview


def write_safetensors(
    path: Path, parts: Mapping[str, TensorBytes], metadata: Mapping[str, str]
) -> None:
    """Write a file atomically, without a second copy of the data in memory.

    The safetensors library writes metadata in random order, and copies every tensor.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, part in parts.items():
        start, end = end, end + part.data.nbytes
        header[name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    write_file(path, (head, *(part.data for part in parts.values())))
