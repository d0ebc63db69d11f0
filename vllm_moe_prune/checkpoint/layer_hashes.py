"""What every layer and expert of a checkpoint was when its statistics were measured.

A fingerprint samples large tensors. These hashes cover all bytes: measuring takes them
of each layer that it reads, and a cut compares those of what it reads.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

from pydantic import Field

from ..errors import CheckpointError
from .block_fp8 import SUFFIX
from .expert_tensors import EXPERT
from .index import TensorInfo, read_bytes
from .open import Checkpoint
from .quantized_tensors import PartedTensor
from .tensor_hashes import MAX_THREADS
from .writer import CHUNK_BYTES

Part = tuple[TensorInfo, int, int]
"""A tensor and the first and last byte of it."""
EMBEDDING = "embedding"
"""The key of the one tensor outside the layers that measuring reads."""
DIGITS = 16
Hash = Annotated[str, Field(pattern=f"^[0-9a-f]{{{DIGITS}}}$")]
WeightHashes = dict[
    Annotated[str, Field(pattern=f"^({EMBEDDING}|[0-9]{{1,9}})$")], tuple[Hash, ...]
]
"""By layer: what belongs to no expert, then each expert. The first 16 digits of SHA-256
over the SHA-256 of its tensors as they are copied, sorted by name."""


def layer_hashes(
    checkpoint: Checkpoint, index: int | None, experts: Collection[int] | None = None
) -> dict[int | None, str]:
    """Read a layer and hash it.

    Args:
        checkpoint: Its weights in their dense form, or quantized parts.
        index: Which layer; None: the embedding.
        experts: Which of its experts are read; None: all.

    Returns:
        By expert; None: what belongs to no expert.
    """
    parts = _parts(checkpoint, index)
    if experts is not None:
        parts = {one: parts[one] for one in parts if one is None or one in experts}
    jobs = [part for found in parts.values() for part in found]
    # hashlib releases the GIL while it hashes a piece.
    with ThreadPoolExecutor(MAX_THREADS) as pool:
        digests = iter(list(pool.map(_digest, jobs)))
    return {
        one: hashlib.sha256(b"".join(next(digests) for _ in found)).hexdigest()[:DIGITS]
        for one, found in parts.items()
    }


def check_layer(
    checkpoint: Checkpoint,
    measured: Mapping[str, tuple[str, ...]],
    index: int | None,
    experts: Collection[int] = (),
) -> None:
    """Refuse a layer that is not what was measured; one that was not measured passes.

    Args:
        checkpoint: The input.
        measured: As ``WeightHashes``.
        index: Which layer; None: the embedding.
        experts: Those that are read.

    Raises:
        CheckpointError: Naming what differs.
    """
    before = measured.get(EMBEDDING if index is None else str(index))
    if before is None:
        return
    for expert, found in layer_hashes(checkpoint, index, experts).items():
        at = 0 if expert is None else expert + 1
        if at >= len(before) or before[at] != found:
            what = (
                "a weight outside its experts" if expert is None else f"expert {expert}"
            )
            where = EMBEDDING if index is None else f"layer {index}: {what}"
            raise CheckpointError(
                f"{checkpoint.folder}: {where} is not what the plan's "
                "statistics were measured on. Measure and plan again."
            )


def _parts(checkpoint: Checkpoint, index: int | None) -> dict[int | None, list[Part]]:
    """The tensors of each expert of a layer, and those of none."""
    layer = None if index is None else checkpoint.layers[index]
    experts = 0 if layer is None else layer.num_experts
    found: dict[int | None, list[Part]] = {None: []}
    found |= {expert: [] for expert in range(experts)}
    packed = {
        rule.name(layer.index)
        for rule in checkpoint.layout.experts
        if layer is not None and not rule.per_expert
    }
    # A checkpoint may hold more than a model reads, of any size.
    names = (
        [checkpoint.arch.embedding] if index is None else checkpoint.layer_names(index)
    )
    stored = {
        part.name: part
        for name in names
        for part in _as_copied(checkpoint.tensors[name])
    }
    for name, info in sorted(stored.items()):
        own = EXPERT.match(name)
        if name.removesuffix(SUFFIX) in packed:
            for expert in range(experts):
                first = expert * info.row_bytes
                found[expert].append((info, first, first + info.row_bytes))
        elif own and int(own["expert"]) in found:
            found[int(own["expert"])].append((info, 0, info.nbytes))
        else:
            found[None].append((info, 0, info.nbytes))
    return found


def _as_copied(info: TensorInfo) -> Iterable[TensorInfo]:
    return info.parts.values() if isinstance(info, PartedTensor) else (info,)


def _digest(part: Part) -> bytes:
    digest = hashlib.sha256()
    for piece in _pieces(*part):
        digest.update(piece)
    return digest.digest()


def _pieces(info: TensorInfo, first: int, last: int) -> Iterator[bytearray]:
    for start in range(first, last, CHUNK_BYTES):
        yield read_bytes(info, start, min(start + CHUNK_BYTES, last))
