"""Checkpoints that compressed-tensors quantized, read as if they were dense.

A matrix ``NAME.weight`` is stored as ``NAME.weight_packed`` or as an 8-bit
``NAME.weight``, with ``NAME.weight_scale`` and what else its form has. Opening folds
the parts into one tensor in the model's own dtype, so that every reader sees dense
weights; a cut copies the parts themselves.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CheckpointError
from ..kernels.quantized import (
    BLOCK,
    PACKED,
    PLAIN,
    SCALE,
    SHAPE,
    ZERO,
    Bits,
    Form,
    Quantized,
    dequantize,
    unpack,
)
from .index import ITEM_BYTES, TensorInfo, read_bytes
from .module_names import CONFIG_KEY

METHOD = "compressed-tensors"
SUPPORTED = (
    "int4 in groups or rows (pack-quantized), int8 in rows (int-quantized), and fp8 in "
    "rows or blocks of 128 x 128 (float-quantized)"
)
VALUES = {"I8": "int8", "F8_E4M3": "fp8"}
PARTS = (PACKED, SCALE, SHAPE, ZERO)
INDEX = "weight_g_idx"
"""Names the group of each column; forms that need it are not supported."""
TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}
FLOATS = ("BF16", "F16", "F32")


def values_name(
    name: str, first: str = PACKED, parts: Collection[str] = PARTS
) -> str | None:
    """What a stored tensor counts as: values stand for their matrix, scales not."""
    base, _, part = name.rpartition(".")
    if part == first:
        return f"{base}.{PLAIN}"
    return None if part in parts else name


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether config.json names compressed-tensors."""
    block = config.get(CONFIG_KEY)
    return isinstance(block, dict) and block.get("quant_method") == METHOD


def read_form(config: Mapping[str, Any], where: str) -> Form | None:
    """How config.json says that weights are quantized; None: they are not, or others'.

    Raises:
        CheckpointError: They are in a form that is not supported.
    """
    if not is_quantized(config):
        return None
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    block = config[CONFIG_KEY]
    try:
        found = QuantizationConfig.model_validate(block)
        groups = list(found.config_groups.values())
    # The library raises these for presets and values that it does not know.
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = str(error).splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{where}: {CONFIG_KEY} is not one of compressed-tensors: {said[0]}."
        ) from error
    form = None
    # One form for all: a checkpoint of several schemes has none.
    if len(groups) == 1 and not isinstance(groups[0], list):
        form = _form_of(groups[0], groups[0].format or found.format)
    if form is None:
        raise CheckpointError(
            f"{where}: {CONFIG_KEY}: weights quantized in this way cannot be read. "
            f"Supported: {SUPPORTED}, the same everywhere."
        )
    return form


def _form_of(scheme: Any, stored: Any) -> Form | None:
    """The form of a scheme of the library's, or None."""
    weights, inputs = scheme.weights, scheme.input_activations
    # Static scales of inputs are further tensors, which no part here stands for.
    if (
        weights is None
        or weights.dynamic
        or (inputs is not None and not inputs.dynamic)
    ):
        return None
    # "group" and its alias "dynamic" need g_idx; the others change nothing stored.
    if (
        weights.actorder not in (None, "weight", "static")
        or scheme.output_activations is not None
    ):
        return None
    known_bits: dict[tuple[int, str], Bits] = {
        (4, "int"): "int4",
        (8, "int"): "int8",
        (8, "float"): "fp8",
    }
    bits = known_bits.get((weights.num_bits, weights.type))
    if bits is None:
        return None
    # 0: a strategy that no form has; None: one scale for a row.
    size = {"channel": None, "group": weights.group_size, "block": BLOCK}.get(
        weights.strategy, 0
    )
    ordered = weights.actorder is not None
    form = Form(bits, size, not weights.symmetric, ordered)
    blocks = weights.block_structure in (None, [BLOCK, BLOCK])
    # What the library makes of the form again must be what it was, other spellings of
    # the order aside.
    aside = {"observer", "observer_kwargs", "zp_dtype", "actorder"}
    same = form.args.model_dump(exclude=aside) == weights.model_dump(exclude=aside)
    # The older name of either 8-bit format stores the same.
    names = (form.format,) if bits == "int4" else (form.format, "naive-quantized")
    return form if size != 0 and blocks and same and stored in names else None


@dataclass(frozen=True, kw_only=True)
class PartedTensor(TensorInfo, ABC):
    """A matrix stored in parts; name, shape, dtype and bytes are the dense one's."""

    parts: Mapping[str, TensorInfo]
    """By the last part of their names."""

    @property
    def stored_bytes(self) -> int:
        """Bytes the parts take in their files."""
        return sum(part.nbytes for part in self.parts.values())

    def read(self, start: int, stop: int) -> bytearray:
        """Dense bytes ``start`` to ``stop``; all of the matrix is read for them.

        Raises:
            CheckpointError: The parts contradict each other.
        """
        view = self.dense().contiguous().view(torch.uint8).reshape(-1)
        return bytearray(view[start:stop].numpy().data)

    @abstractmethod
    def dense(self) -> torch.Tensor:
        """The matrix as a model computes with it.

        Raises:
            CheckpointError: The parts contradict each other.
        """

    def load_parts(self, scale: str) -> dict[str, torch.Tensor]:
        """All parts, of which one holds scales.

        Raises:
            CheckpointError: A scale is not finite.
        """
        parts = {name: load_part(info) for name, info in self.parts.items()}
        if not bool(torch.isfinite(parts[scale]).all()):
            raise CheckpointError(
                f"{self.file}: {self.name}: a scale is NaN or infinite. Download the "
                "checkpoint again."
            )
        return parts


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor(PartedTensor):
    """A matrix in a form of compressed-tensors."""

    form: Form

    def dense(self) -> torch.Tensor:
        """The matrix as a model computes with it.

        Raises:
            CheckpointError: See ``load``.
        """
        return dequantize(self.load(), self.form, TYPES[self.dtype])

    def load(self) -> Quantized:
        """The matrix as it is stored.

        Raises:
            CheckpointError: Its shape is given wrongly, or a scale is not finite.
        """
        parts = self.load_parts(SCALE)
        shape = parts.get(SHAPE)
        if shape is not None and tuple(shape.tolist()) != self.shape:
            raise CheckpointError(
                f"{self.file}: {self.name}: stored with shape {shape.tolist()}, "
                f"expected {list(self.shape)}."
            )
        return unpack(parts, self.form)


def load_part(info: TensorInfo) -> torch.Tensor:
    data = read_bytes(info)
    # torch.frombuffer refuses an empty buffer.
    if not data:
        return torch.empty(info.shape, dtype=TYPES[info.dtype])
    return torch.frombuffer(data, dtype=TYPES[info.dtype]).reshape(info.shape)


def fold_quantized(
    tensors: dict[str, TensorInfo], form: Form, dtype: str
) -> dict[str, TensorInfo]:
    """Every tensor under its dense name; types and shapes of all parts are checked.

    Args:
        tensors: What the headers list.
        form: Of what is quantized.
        dtype: The model's, as safetensors spells it.

    Raises:
        CheckpointError: A part is missing, misshapen, or belongs to nothing.
    """
    for name, info in tensors.items():
        if name.rpartition(".")[2] == INDEX:
            raise CheckpointError(
                f"{info.file}: {name!r}: reordered groups are not supported; neither "
                "are they by vLLM. Quantize again with static activation ordering."
            )
    # Columns in one stored element: int4 lie eight to an int32.
    each = 8 if form.bits == "int4" else 1

    def fold(base: str, first: TensorInfo) -> TensorInfo:
        if each == 1 and VALUES.get(first.dtype) != form.bits:
            return first  # a weight that is not quantized
        rows, cols = two_axes(first)
        return _fold(base, tensors, form, (rows, cols * each), dtype)

    return fold_parts(tensors, PACKED if each == 8 else PLAIN, PARTS, fold)


def fold_parts(
    tensors: dict[str, TensorInfo],
    first: str,
    parts: Collection[str],
    fold: Callable[[str, TensorInfo], TensorInfo],
) -> dict[str, TensorInfo]:
    """Tensors with matrices in the place of their parts.

    Args:
        tensors: What the headers list.
        first: The part that holds the values.
        parts: What parts are called.
        fold: From a name without its last part, and the values, to the matrix.

    Raises:
        CheckpointError: A part belongs to nothing.
    """
    matrices = {
        name: fold(name.rpartition(".")[0], info)
        for name, info in tensors.items()
        if name.rpartition(".")[2] == first
    }
    taken = {
        stored.name
        for info in matrices.values()
        if isinstance(info, PartedTensor)
        for stored in info.parts.values()
    }
    folded: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        base, _, part = name.rpartition(".")
        # A matrix takes the place of its values, so the order of tensors is kept.
        if name in matrices:
            folded[f"{base}.{PLAIN}"] = matrices[name]
        elif part in parts and f"{base}.{first}" not in tensors:
            raise CheckpointError(f"{info.file}: {name!r} belongs to no weight.")
        elif name not in taken:
            folded[name] = info
    return folded


def two_axes(info: TensorInfo) -> tuple[int, int]:
    """The shape of a matrix.

    Raises:
        CheckpointError: It is none.
    """
    if len(info.shape) != 2:
        raise CheckpointError(
            f"{info.file}: {info.name}: shape {list(info.shape)}, expected two axes."
        )
    return info.shape[0], info.shape[1]


def check_part(
    info: TensorInfo, kinds: Collection[str], shape: tuple[int, ...], of: str = ""
) -> None:
    """Refuse a part of another type or shape than its matrix needs.

    Raises:
        CheckpointError: With both.
    """
    if info.dtype not in kinds or info.shape != shape:
        raise CheckpointError(
            f"{info.file}: {info.name}: {info.dtype} of shape {list(info.shape)}, "
            f"expected {'/'.join(kinds)} of shape {list(shape)}{of}."
        )


def _fold(
    base: str,
    tensors: Mapping[str, TensorInfo],
    form: Form,
    shape: tuple[int, int],
    dtype: str,
) -> QuantizedTensor:
    wanted = form.parts(*shape, dtype)
    found = {}
    for part, (kind, size) in wanted.items():
        info = tensors.get(f"{base}.{part}")
        if info is None:
            raise CheckpointError(
                f"{base}.{part}: is missing, but {CONFIG_KEY} of config.json needs it."
            )
        of = f" ({form.bits} of {shape[0]} x {shape[1]})"
        check_part(info, FLOATS if part == SCALE else (kind,), size, of)
        found[part] = info
    if form.bits == "int4" and shape[1] % (form.group_size or 1):
        raise CheckpointError(
            f"{base}: {shape[1]} columns do not divide into groups of "
            f"{form.group_size}, as {CONFIG_KEY} of config.json says."
        )
    extra = [
        part for part in PARTS if part not in wanted and f"{base}.{part}" in tensors
    ]
    if extra:
        raise CheckpointError(
            f"{base}.{extra[0]}: is there, but {CONFIG_KEY} of config.json says "
            "nothing of it."
        )
    # Form.parts lists the values first.
    first = found[next(iter(wanted))]
    return QuantizedTensor(
        name=f"{base}.{PLAIN}",
        dtype=dtype,
        shape=shape,
        file=first.file,
        # In no one place of the file: read() dequantizes the parts.
        offset=-1,
        nbytes=math.prod(shape) * ITEM_BYTES[dtype],
        form=form,
        parts=found,
    )
