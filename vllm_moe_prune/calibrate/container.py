"""Writing small safetensors files so that the same content gives the same bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.header import build_header
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
    """Write a file atomically, without a second copy of the data in memory."""
    tensors = (
        (name, part.dtype, part.shape, part.data.nbytes) for name, part in parts.items()
    )
    header = build_header(tensors, metadata)
    write_file(path, (header, *(part.data for part in parts.values())))
