"""Quantized matrices as compressed-tensors defines them: values, scales, stored parts.

A matrix W [R, C] becomes values q with scales s and zero points z that a group of a
row, a whole row or a block shares: W ~ (q - z) * s. ``int4`` values are packed eight to
an int32; ``int8`` and ``fp8`` ones are stored as they are. Ranges, rounding and packing
are the library's. G groups of a row.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

Bits = Literal["int4", "int8", "fp8"]
GROUP_SIZES = (128, 64, 32)
BLOCK = 128
"""Rows and columns of the blocks of FP8 that share a scale, as DeepSeek-V3 has them."""
FP8 = torch.float8_e4m3fn
PACKED, SCALE, SHAPE, ZERO = (
    f"weight_{part}" for part in ("packed", "scale", "shape", "zero_point")
)
PLAIN = "weight"
"""What a matrix that is not packed goes by, quantized or not."""


@dataclass(frozen=True)
class Form:
    """How the matrices of a checkpoint are quantized."""

    bits: Bits
    group_size: int | None = None
    """Of int4: columns that share a scale; of fp8: the side of a block, which is 128;
    None: a scale for each row, as int8 always has."""
    zero_point: bool = False
    """Of int4: whether the range of a group need not be symmetric."""
    act_order: bool = False
    """Recorded only: GPTQ's order of columns, which changes nothing about the form."""

    @property
    def args(self) -> "QuantizationArgs":
        """The library's words for it."""
        from compressed_tensors.quantization import QuantizationArgs

        words: dict[str, Any] = {"strategy": "channel", "num_bits": 8}
        if self.bits == "fp8":
            words["type"] = "float"
            if self.group_size is not None:
                words |= {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
        if self.bits == "int4":
            words |= {"num_bits": 4, "symmetric": not self.zero_point}
            if self.group_size is not None:
                words |= {"strategy": "group", "group_size": self.group_size}
            if self.act_order:
                # "weight": columns stay where they are, so there is no g_idx to store.
                words["actorder"] = "weight"
        return QuantizationArgs.model_validate(words)

    @property
    def inputs(self) -> dict[str, Any] | None:
        """What vLLM's kernels do to activations, in the library's words; None: nothing.

        vLLM has fused kernels for 8-bit experts only together with inputs quantized on
        the fly; on CPUs the FP8 one leaves them alone.
        """
        if self.bits == "int4":
            return None
        words: dict[str, Any] = {"num_bits": 8, "dynamic": True, "strategy": "token"}
        if self.bits == "fp8":
            words["type"] = "float"
            if self.group_size is not None:
                words |= {"strategy": "group", "group_size": BLOCK}
        return words

    @property
    def is_blocked(self) -> bool:
        """Whether blocks of rows and columns share a scale."""
        return self.bits == "fp8" and self.group_size is not None

    @property
    def words(self) -> str:
        """The form as a person says it."""
        shared = f"{self.group_size} of a row" if self.group_size else "a row"
        if self.is_blocked:
            shared = f"{BLOCK} x {BLOCK}"
        zero = " with zero points" if self.zero_point else ""
        return f"{self.bits}, a scale for {shared}{zero}"

    @property
    def format(self) -> str:
        """The library's name of the stored format."""
        return {
            "int4": "pack-quantized",
            "int8": "int-quantized",
            "fp8": "float-quantized",
        }[self.bits]

    def misfit(self, rows: int, cols: int) -> str | None:
        """Why a matrix cannot have this form, or None."""
        if self.is_blocked and (rows % BLOCK or cols % BLOCK):
            return f"{rows} x {cols} does not divide into blocks of {BLOCK} x {BLOCK}"
        if self.bits == "int4" and cols % (self.group_size or 8):
            return f"{cols} columns do not divide into groups of {self.group_size or 8}"
        # Zero points are packed down the rows, eight to an int32.
        if self.zero_point and rows % 8:
            return f"{rows} rows do not divide into eights, which zero points need"
        return None

    def scale_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """[R, G], or the number of blocks down and across."""
        if self.is_blocked:
            return -(-rows // BLOCK), -(-cols // BLOCK)
        return rows, 1 if self.group_size is None else -(-cols // self.group_size)

    def parts(
        self, rows: int, cols: int, dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name, type and shape of the tensors that store a matrix, the values first.

        Args:
            rows: Of the matrix.
            cols: Of the matrix.
            dtype: Of the scales, as safetensors spells it: the dense matrix's.
        """
        scale = dtype, self.scale_shape(rows, cols)
        if self.bits != "int4":
            kind = "F8_E4M3" if self.bits == "fp8" else "I8"
            return {PLAIN: (kind, (rows, cols)), SCALE: scale}
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            # Rows end in a word that may be padded; the true shape is kept beside it.
            PACKED: ("I32", (rows, math.ceil(cols / 8))),
            SCALE: scale,
            SHAPE: ("I64", (2,)),
        }
        if self.zero_point:
            found[ZERO] = ("I32", (math.ceil(rows / 8), scale[1][1]))
        return found


class Scales(NamedTuple):
    """What turns values into weights, in the dtype in which it is stored."""

    scale_RG: Tensor
    zero_RG: Tensor | None
    """int8; None where ranges are symmetric."""


class Quantized(NamedTuple):
    """One matrix."""

    values_RC: Tensor
    """int8 from -8 to 7, int8, or e4m3."""
    scales: Scales


def scales_of(weight_RC: Tensor, form: Form, dtype: torch.dtype) -> Scales:
    """The library's min-max scales of a matrix, rounded to the dtype they are kept in.

    Args:
        weight_RC: Of any floating dtype.
        form: Says what shares a scale.
        dtype: Of the scales.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    rows, cols = weight_RC.shape
    if form.is_blocked:
        down, across = form.scale_shape(rows, cols)
        pads = (0, across * BLOCK - cols, 0, down * BLOCK - rows)
        # Padding changes no range: the library puts 0 into every one.
        padded = torch.nn.functional.pad(weight_RC, pads)
        tiles = padded.view(down, BLOCK, across, BLOCK).transpose(1, 2).flatten(2)
    else:
        tiles = weight_RC.view(rows, -1, form.group_size or cols)
    # Min and max are exact in any dtype; the division by the range is not.
    low, high = tiles.amin(-1).float(), tiles.amax(-1).float()
    # Of nothing but zeros the library would divide zero by zero.
    empty = (low == 0) & (high == 0)
    high.masked_fill_(empty, torch.finfo(torch.float32).eps)
    scale, zero = calculate_qparams(low, high, form.args)
    # Rounding to fp16 must not make a divisor of zero.
    info = torch.finfo(dtype)
    # tiny * eps is the smallest subnormal of the dtype.
    scale = scale.to(dtype).clamp_(min=info.tiny * info.eps)
    return Scales(scale, zero.to(torch.int8) if form.zero_point else None)


def quantize_by(weight_RC: Tensor, scales: Scales, form: Form) -> Tensor:
    """The values nearest to a matrix, in float32."""
    from compressed_tensors.quantization.lifecycle.forward import quantize

    found: Tensor = quantize(
        weight_RC.float(),
        # The scale as it is stored, already rounded, in float32.
        scales.scale_RG.float(),
        scales.zero_RG,
        form.args,
        dtype=FP8 if form.bits == "fp8" else torch.int8,
    )
    return found


def dequantize(matrix: Quantized, form: Form, dtype: torch.dtype) -> Tensor:
    """The weights as a model computes with them: in float32, rounded once."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    values = matrix.values_RC
    found: Tensor = dequantize(
        values.float() if form.bits == "fp8" else values,
        matrix.scales.scale_RG.float(),
        matrix.scales.zero_RG,
        form.args,
    )
    return found.to(dtype)


def pack(matrix: Quantized, form: Form) -> dict[str, Tensor]:
    """The stored tensors of a matrix, as ``Form.parts`` lists them."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    values, (scale, zero) = matrix
    if form.bits != "int4":
        return {PLAIN: values.contiguous(), SCALE: scale}
    found = {
        PACKED: pack_to_int32(values, 4),
        SCALE: scale,
        SHAPE: torch.tensor(values.shape, device=values.device),
    }
    if zero is not None:
        # packed_dim=0 gives a transposed view; safetensors wants it contiguous.
        found[ZERO] = pack_to_int32(zero, 4, packed_dim=0).contiguous()
    return found


def unpack(parts: dict[str, Tensor], form: Form) -> Quantized:
    """The inverse of ``pack``; shapes must have been checked."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    scales = Scales(parts[SCALE], zeros_of(parts, form))
    if form.bits != "int4":
        return Quantized(parts[PLAIN], scales)
    shape = torch.Size(parts[SHAPE].tolist())
    return Quantized(unpack_from_int32(parts[PACKED], 4, shape), scales)


def zeros_of(parts: dict[str, Tensor], form: Form) -> Tensor | None:
    """The zero points among stored tensors: int8 [R, G], or None."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    if not form.zero_point:
        return None
    found: Tensor = unpack_from_int32(parts[ZERO], 4, parts[SCALE].shape, packed_dim=0)
    return found
