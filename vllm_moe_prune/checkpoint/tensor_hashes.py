"""``tensor_hashes.json``: what every tensor of an output was when it was written.

``cut``, ``convert`` and ``recover`` hash each tensor while writing it; ``verify``
reads the tensors again and names those that are not the same any more.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from ..errors import CheckpointError
from ..files.atomic import write_file
from ..files.json_file import parse_json, read_json
from ..files.regular import MIB, Kind
from ..progress import Progress, Report, ignore
from ..recipes.schema import Strict, first_problem
from .index import MAX_HEADER_VALUES, TensorInfo, read_bytes
from .writer import CHUNK_BYTES, ShardPlan, ShardWriter, sha256_of

FILE_NAME = "tensor_hashes.json"
FORMAT_VERSION: Literal[1] = 1
HASHES = Kind(name=FILE_NAME, max_bytes=128 * MIB, error=CheckpointError)
MAX_THREADS = 4
TOLD_BYTES = 64 << 20
NAMED = 3
"""How many tensors an error names."""


class TensorHash(Strict):
    """One tensor as it was written."""

    dtype: str
    """safetensors' spelling: BF16, F16, F32 ..."""
    shape: tuple[Annotated[int, Field(ge=0, strict=True)], ...]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """Of its bytes, row by row, as they lie in the file."""


class TensorHashes(Strict):
    """The whole file."""

    format_version: Literal[1] = FORMAT_VERSION
    tensors: dict[str, TensorHash]
    """By the name that the file has, which of a quantized or compressed matrix is that
    of a part."""


def dump_hashes(shards: Sequence[ShardPlan], hashes: Mapping[str, str]) -> bytes:
    """The bytes of ``tensor_hashes.json``, a line for each tensor, sorted by name.

    Args:
        shards: Of a finished output.
        hashes: SHA-256 of each of their tensors.
    """
    entries = {
        name: entry
        for shard in shards
        # 8 bytes of length come before the JSON, and __metadata__ is no tensor.
        for name, entry in parse_json(shard.header[8:], MAX_HEADER_VALUES).items()
        if name in shard.offsets
    }
    lines = [
        f"  {json.dumps(name)}: "
        + json.dumps(
            {
                "dtype": entries[name]["dtype"],
                "shape": entries[name]["shape"],
                "sha256": hashes[name],
            }
        )
        for name in sorted(entries)
    ]
    # By hand: json.dumps gives each field a line, or puts all on one.
    start = f'{{\n "format_version": {FORMAT_VERSION},\n "tensors": {{\n'
    return (start + ",\n".join(lines) + "\n }\n}\n").encode()


def write_hashes(folder: Path, writer: ShardWriter) -> None:
    """Put the file into an output whose shards are all written."""
    write_file(folder / FILE_NAME, dump_hashes(writer.shards, writer.hashes()))


def load_hashes(folder: Path) -> TensorHashes | None:
    """What the folder says its tensors were; None: it was written before this was kept.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        found = TensorHashes.model_validate(read_json(path, HASHES, MAX_HEADER_VALUES))
    except ValidationError as error:
        raise CheckpointError(f"{path}: {first_problem(error)}") from error
    if "format_version" not in found.model_fields_set:
        raise CheckpointError(f"{path}: format_version is missing.")
    return found


def check_hashes(
    folder: Path, stored: Mapping[str, TensorInfo], report: Report = ignore
) -> int | None:
    """Hash every tensor again; how many, or None where no hashes were kept.

    Args:
        folder: A finished output.
        stored: What its headers list.
        report: Called as tensors are done.

    Raises:
        CheckpointError: Naming tensors that are missing, new, or not what was written.
    """
    written = load_hashes(folder)
    if written is None:
        return None
    expected = written.tensors
    for listed, held, where in (
        (expected, stored, f"in {FILE_NAME}, but not in the weights"),
        (stored, expected, f"in the weights, but not in {FILE_NAME}"),
    ):
        if absent := sorted(listed.keys() - held.keys()):
            raise CheckpointError(
                f"{folder}: {absent[0]!r} is {where} ({len(absent)} such tensors). "
                "Copy the folder again."
            )
    found = _found(stored, report)
    wrong = [(name, one) for name, one in found if one != expected[name]]
    if wrong:
        named = [_difference(name, one, expected) for name, one in wrong[:NAMED]]
        raise CheckpointError(
            f"{folder}: not as it was written: {'; '.join(named)} ({len(wrong)} such "
            "tensors). Copy the folder again, or repeat the command that made it."
        )
    return len(expected)


def _found(
    stored: Mapping[str, TensorInfo], report: Report
) -> Iterator[tuple[str, TensorHash]]:
    """Every tensor as it is now, file by file."""
    # In the order of the files, so that disks read ahead.
    infos = sorted(stored.values(), key=lambda info: (info.file, info.offset))
    total, done = sum(info.nbytes for info in infos), 0
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        # hashlib releases the GIL while it hashes a piece.
        digests = pool.map(lambda info: sha256_of(_pieces(info)), infos)
        for info, sha256 in zip(infos, digests, strict=True):
            done, before = done + info.nbytes, done
            if done == total or done // TOLD_BYTES > before // TOLD_BYTES:
                report(
                    Progress(
                        stage="hash",
                        layer=0,
                        layers=0,
                        bytes_done=done,
                        bytes_total=total,
                    )
                )
            yield (
                info.name,
                TensorHash(dtype=info.dtype, shape=info.shape, sha256=sha256),
            )


def _pieces(info: TensorInfo) -> Iterator[bytearray]:
    for start in range(0, info.nbytes, CHUNK_BYTES):
        yield read_bytes(info, start, min(start + CHUNK_BYTES, info.nbytes))


def _difference(name: str, found: TensorHash, all_of: Mapping[str, TensorHash]) -> str:
    expected = all_of[name]
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return (
            f"{name!r} is {found.dtype} {list(found.shape)}, was {expected.dtype} "
            f"{list(expected.shape)}"
        )
    # Swapped tensors are told from damaged ones.
    if twin := next((other for other, one in all_of.items() if one == found), None):
        return f"{name!r} holds what {twin!r} held"
    return f"{name!r} has other values"
