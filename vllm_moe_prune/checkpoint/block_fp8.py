"""FP8 weights with one scale per block, as DeepSeek-V3 ships them.

A weight ``NAME`` [R, C] in e4m3 has a companion ``NAME_scale_inv`` [R/b, C/b] in fp32:
weight = e4m3 value x the scale of its block. Removing an expert copies both; writing
a zero changes one byte of the weight and no scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .index import TensorInfo

SUFFIX = "_scale_inv"
DTYPE = "F8_E4M3"
FORMATS = (None, "e4m3", "e4m3fn", "float8_e4m3fn")
"""What config.json calls the values; no library reads it, so each tool has its own."""
SCALE_DTYPES = ("F32", "BF16")


@dataclass(frozen=True)
class ScaleBlocks:
    """The size of the blocks that share a scale."""

    rows: int
    cols: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a matrix."""
        # Rounded up: blocks at the right and lower edge may be cut short.
        rows, cols = shape
        return -(-rows // self.rows), -(-cols // self.cols)

    def dequantize(
        self, weight_RC: torch.Tensor, scale_BC: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The matrix in ``dtype``, multiplied in fp32 and rounded once."""
        rows, cols = weight_RC.shape
        # A block may be larger than the matrix, as large as config.json likes.
        scale = scale_BC.float().repeat_interleave(min(self.rows, rows), 0)[:rows]
        scale = scale.repeat_interleave(min(self.cols, cols), 1)[:, :cols]
        return (weight_RC.float() * scale).to(dtype)


def read_blocks(config: Mapping[str, Any], where: Path) -> ScaleBlocks | None:
    """The block size that config.json gives, or None for plain weights.

    Raises:
        CheckpointError: The checkpoint is quantized in some other way.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    # A plain value in place of the object is reported below as the method.
    said = found if isinstance(found, dict) else {"quant_method": found}
    sizes = said.get("weight_block_size")
    block = said.get("quant_method") == "fp8" and said.get("fmt") in FORMATS
    if not block or not (isinstance(sizes, list) and len(sizes) == 2):
        raise CheckpointError(
            f"{where}: the checkpoint is quantized ({said.get('quant_method')}); only "
            "bf16, fp16, fp32 and block-scaled fp8 (e4m3) weights, and those of "
            "compressed-tensors, GPTQ and AWQ, can be pruned. Start from the "
            "unquantized checkpoint."
        )
    # Not isinstance: a bool is an int too, and true is no size.
    if any(type(size) is not int or size < 1 for size in sizes):
        raise CheckpointError(
            f"{where}: weight_block_size is {sizes!r}, not two sizes."
        )
    return ScaleBlocks(*sizes)


def check_scales(tensors: Mapping[str, TensorInfo], blocks: ScaleBlocks) -> None:
    """Refuse a checkpoint with any FP8 tensor that has no scales of its own.

    Raises:
        CheckpointError: Naming the tensor, or its scales.
    """
    for info in tensors.values():
        if info.dtype == DTYPE:
            if len(info.shape) != 2:
                raise CheckpointError(
                    f"{info.file}: {info.name}: fp8 of shape {list(info.shape)}; only "
                    "matrices have blocks that share a scale."
                )
            check_scale(tensors, info, blocks)


def check_scale(
    tensors: Mapping[str, TensorInfo], info: TensorInfo, blocks: ScaleBlocks
) -> None:
    """Refuse an FP8 weight whose scales are missing or of another shape.

    Raises:
        CheckpointError: Naming the scale.
    """
    name = info.name + SUFFIX
    scale = tensors.get(name)
    if scale is None:
        raise CheckpointError(f"{info.file}: {name!r}, the scales of fp8, is missing.")
    expected = blocks.scale_shape(info.shape)
    if scale.shape != expected or scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.file}: {name}: {scale.dtype} of shape {list(scale.shape)}, "
            f"expected {'/'.join(SCALE_DTYPES)} of shape {list(expected)} "
            f"(blocks of {blocks.rows} x {blocks.cols})."
        )
