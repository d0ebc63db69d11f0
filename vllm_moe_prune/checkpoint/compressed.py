"""Checkpoints whose expert weights are stored compressed, read as if they were dense.

``NAME.weight`` [R, C] is stored as ``NAME.mask`` [R, C / 8] U8, ``NAME.values`` and
``NAME.offsets`` [R + 1] I64 (see ``kernels.bitmask``), a packed ``NAME`` [E, R, C] in
the same way with E x R rows, and config.json says so in ``quantization_config``.
Opening such a checkpoint folds the parts back into one tensor each, and takes that
block off the config, so that every reader sees the dense form.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, JsonValue, ValidationError

from ..archs.spec import MoeArch
from ..errors import CheckpointError
from ..kernels.bitmask import DTYPES as DTYPES
from ..kernels.bitmask import Bitmask, check, check_shapes, unpack
from ..recipes.schema import Strict, first_problem
from .index import ITEM_BYTES, TensorInfo, read_bytes
from .module_names import CONFIG_KEY

METHOD: Literal["moe_prune"] = "moe_prune"
FORMAT_VERSION: Literal[1] = 1
PARTS = ("mask", "values", "offsets")
DENSE = ".weight"
NO_FILE = "expert-weights-are-compressed-serve-with-vllm-moe-prune.safetensors"
"""What config.json names as transformers' weights: it does not know the format, and
would otherwise load random experts with no more than a warning."""


class Restored(Strict):
    """Keys of config.json as the dense checkpoint has them; None: it lacks the key."""

    architectures: tuple[str, ...] | None = None
    transformers_weights: str | None = None
    quantization_config: dict[str, JsonValue] | None = None
    """Of FP8 weights; their scales are stored as they are."""


class Storage(Strict):
    """The ``quantization_config`` block of a compressed checkpoint."""

    quant_method: Literal["moe_prune"] = METHOD
    format: Literal["bitmask"] = "bitmask"
    format_version: Literal[1] = FORMAT_VERSION
    tool_version: str
    dense_layers: tuple[Annotated[int, Field(ge=0, strict=True)], ...] = ()
    """Layers whose experts are stored dense, since compressing would not save bytes."""
    dense_config: Restored


def dense_names(name: str) -> tuple[str, ...]:
    """What a stored tensor may count as: masks stand for their matrix, parts do not.

    A matrix of one expert ends in ``.weight``, those of all experts in nothing.
    """
    base, _, part = name.rpartition(".")
    if part == "mask":
        return base + DENSE, base
    return () if part in PARTS else (name,)


def is_compressed(config: dict[str, Any]) -> bool:
    """Whether config.json names our storage."""
    block = config.get(CONFIG_KEY)
    return isinstance(block, dict) and block.get("quant_method") == METHOD


def parse_storage(block: Any, where: str) -> Storage:
    """The checked block.

    Raises:
        CheckpointError: Naming the key that is wrong.
    """
    found = block.get("format_version") if isinstance(block, dict) else None
    if found != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: {CONFIG_KEY}: format_version is {found!r}; this version of "
            f"vllm-moe-prune reads {FORMAT_VERSION}."
        )
    try:
        return Storage.model_validate(block)
    except ValidationError as error:
        raise CheckpointError(
            f"{where}: {CONFIG_KEY}: {first_problem(error)}"
        ) from error


def compressed_config(
    config: dict[str, Any], architecture: str | None, **block: Any
) -> dict[str, Any]:
    """config.json of the compressed form of a dense checkpoint.

    Args:
        config: The dense checkpoint's.
        architecture: The class to name instead; None leaves what is there.
        block: Fields of ``Storage``.
    """
    restored = Restored(
        architectures=config.get("architectures"),
        transformers_weights=config.get("transformers_weights"),
        quantization_config=config.get(CONFIG_KEY),
    )
    storage = Storage(dense_config=restored, **block)
    changed = copy.deepcopy(config)
    if architecture is not None:
        changed["architectures"] = [architecture]
    changed["transformers_weights"] = NO_FILE
    changed[CONFIG_KEY] = storage.model_dump(mode="json")
    return changed


def dense_config(config: dict[str, Any], storage: Storage) -> dict[str, Any]:
    """config.json of the dense form of a compressed checkpoint."""
    changed = copy.deepcopy(config)
    for key, value in storage.dense_config.model_dump(mode="json").items():
        if value is None:
            changed.pop(key, None)
        else:
            changed[key] = value
    return changed


@dataclass(frozen=True, kw_only=True)
class CompressedTensor(TensorInfo):
    """A tensor stored in parts; name, shape, dtype and bytes are the dense one's."""

    mask: TensorInfo
    """Of two axes, whatever the file says: all rows of all experts."""
    values: TensorInfo
    offsets: TensorInfo | None

    @property
    def stored_bytes(self) -> int:
        """Bytes the parts take in their files."""
        return sum(part.nbytes for part in self.parts)

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The stored tensors, in the order they are written."""
        found = (self.values, self.offsets, self.mask)
        return tuple(part for part in found if part is not None)

    def read(self, start: int, stop: int) -> bytearray:
        """Dense bytes ``start`` to ``stop``: the rows they are in are unpacked.

        Raises:
            CheckpointError: The parts contradict each other in these rows.
        """
        row_bytes = self.shape[-1] * ITEM_BYTES[self.dtype]
        # Also keeps row_bytes 0, of rows without elements, from dividing below.
        if start >= stop:
            return bytearray()
        # Whole rows, as offsets count rows; rounded up to the row that stop is in.
        first, last = start // row_bytes, -(-stop // row_bytes)
        dense = unpack(self.read_rows(first, last)).view(torch.uint8).reshape(-1)
        base = first * row_bytes
        return bytearray(dense[start - base : stop - base].numpy().data)

    def check(self) -> None:
        """Read all of it, one expert at a time.

        Raises:
            CheckpointError: See ``bitmask.check``.
        """
        # One expert in memory at a time, whether packed with others or alone.
        rows, step = self.mask.shape[0], self.shape[-2]
        for first in range(0, rows, max(step, 1)):
            self.read_rows(first, first + step)

    def read_rows(self, first: int, last: int) -> Bitmask:
        """Some rows as they are stored, checked; those of packed experts go on.

        Raises:
            CheckpointError: See ``bitmask.check``.
        """
        mask = _part(self.mask, first, last)
        if self.offsets is None:
            packed = Bitmask(mask, _part(self.values, first, last), None)
        else:
            # One more than rows: a row ends where the next one begins.
            offsets = _part(self.offsets, first, last + 1)
            begin, end = int(offsets[0]), int(offsets[-1])
            total = self.values.shape[0]
            # The first row begins, and the last ends, where the values do.
            ends = (first == 0 and begin != 0) or (
                last == self.mask.shape[0] and end != total
            )
            # Before reading: a wrong offset could ask for any amount of memory.
            if not 0 <= begin <= end <= total or ends:
                raise CheckpointError(
                    f"{self.file}: {self.name}: offsets of rows {first} to {last} are "
                    f"{begin} to {end}, but there are {total} values."
                )
            # Stored offsets count from the first value, these from the first one read.
            packed = Bitmask(mask, _part(self.values, begin, end), offsets - begin)
        check(packed, (last - first, self.shape[-1]), f"{self.file}: {self.name}")
        return packed


def _part(info: TensorInfo, first: int, last: int) -> torch.Tensor:
    """Rows of a stored tensor."""
    data = read_bytes(info, first * info.row_bytes, last * info.row_bytes)
    dtype = {"U8": torch.uint8, "I64": torch.int64, **DTYPES}[info.dtype]
    shape = (last - first, *info.shape[1:])
    # torch.frombuffer refuses an empty buffer.
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def dense_view(
    config: dict[str, Any], tensors: dict[str, TensorInfo], arch: MoeArch, where: str
) -> tuple[dict[str, Any], dict[str, TensorInfo], Storage | None]:
    """Config and tensors as the dense form has them, and how they are stored.

    Args:
        config: The content of config.json.
        tensors: What the headers list.
        arch: The family, which says what can be stored compressed.
        where: Named in errors about the config.

    Raises:
        CheckpointError: The block or the parts of a tensor are not as they must be.
    """
    if not is_compressed(config):
        return config, tensors, None
    storage = parse_storage(config[CONFIG_KEY], where)
    patterns = [rule.pattern for layout in arch.layouts for rule in layout.experts]

    def is_expert(name: str) -> bool:
        return any(pattern.match(name) for pattern in patterns)

    folded = fold(tensors, is_expert)
    for name, info in folded.items():
        layer = arch.layer_of(name)
        if isinstance(info, CompressedTensor) and layer in storage.dense_layers:
            raise CheckpointError(
                f"{info.file}: {name!r} is compressed, but {where} has layer {layer} "
                "among its dense_layers."
            )
    return dense_config(config, storage), folded, storage


def fold(
    tensors: dict[str, TensorInfo], may_be: Callable[[str], bool]
) -> dict[str, TensorInfo]:
    """Every tensor under its dense name; the shapes of all parts are checked.

    Args:
        tensors: What the headers list.
        may_be: Whether a dense name is one that can be stored compressed.

    Raises:
        CheckpointError: A part is missing, misshapen, or belongs to nothing.
    """
    folded = {}
    for name, info in tensors.items():
        base, _, part = name.rpartition(".")
        # Only experts are folded: other tensors may be called mask or offsets as well.
        dense = next((each for each in (base + DENSE, base) if may_be(each)), None)
        if part not in PARTS or dense is None:
            folded[name] = info
        elif part == "mask":
            if dense in tensors:
                raise CheckpointError(
                    f"{info.file}: {dense!r} is there dense and compressed."
                )
            folded[dense] = _fold(dense, base, info, tensors)
        elif f"{base}.mask" not in tensors:
            raise CheckpointError(f"{info.file}: {name!r} has no {base + '.mask'!r}.")
    return folded


def _fold(
    dense: str, base: str, mask: TensorInfo, tensors: dict[str, TensorInfo]
) -> CompressedTensor:
    values, offsets = tensors.get(f"{base}.values"), tensors.get(f"{base}.offsets")
    where = f"{mask.file}: {base}"
    if values is None:
        raise CheckpointError(f"{where}: has a mask, but no values.")
    if values.dtype not in DTYPES:
        raise CheckpointError(
            f"{where}: values are {values.dtype}; expected one of {', '.join(DTYPES)}."
        )
    if mask.dtype != "U8" or (offsets is not None and offsets.dtype != "I64"):
        raise CheckpointError(f"{where}: the mask must be U8, the offsets I64.")
    # ".weight" was added for the matrix of one expert; packed ones have an axis more.
    axes = 2 if dense != base else 3
    if len(mask.shape) != axes:
        raise CheckpointError(
            f"{where}: the mask has shape {list(mask.shape)}, expected {axes} axes."
        )
    *rows, row_bytes = mask.shape
    mask = replace(mask, shape=(math.prod(rows), row_bytes))
    check_shapes(
        (mask.shape[0], row_bytes * 8),
        mask.shape,
        values.shape,
        None if offsets is None else offsets.shape,
        where,
    )
    shape = (*rows, row_bytes * 8)
    return CompressedTensor(
        name=dense,
        dtype=values.dtype,
        shape=shape,
        file=mask.file,
        # In no one place of the file: read() unpacks the parts.
        offset=-1,
        nbytes=math.prod(shape) * ITEM_BYTES[values.dtype],
        mask=mask,
        values=values,
        offsets=offsets,
    )
