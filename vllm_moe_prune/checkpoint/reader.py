"""Lazy reads: one tensor, one router, one expert at a time, in memory of their own."""

from typing import NamedTuple

import torch

from ..archs.spec import TensorRule
from ..errors import CheckpointError
from .block_fp8 import SUFFIX
from .index import TensorInfo, read_bytes
from .open import Checkpoint, Layer

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Expert(NamedTuple):
    """The three matrices of one expert."""

    gate_FD: torch.Tensor
    up_FD: torch.Tensor
    down_DF: torch.Tensor


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """A whole tensor on the CPU, in its stored dtype."""
    return _as_tensor(read_bytes(info), info.dtype, info.shape)


def read_weight(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor as the model computes with it: FP8 blocks times their scales."""
    info = checkpoint.tensors[name]
    weight = read_tensor(info)
    if checkpoint.blocks is None or not checkpoint.is_scale(name + SUFFIX):
        return weight
    scale = read_tensor(checkpoint.tensors[name + SUFFIX])
    # FP8 does not tell what dtype the model computes in; embeddings do.
    embedding = checkpoint.tensors.get(checkpoint.arch.embedding)
    dtype = torch.bfloat16 if embedding is None else DTYPES[embedding.dtype]
    return checkpoint.blocks.dequantize(weight, scale, dtype)


def read_row(info: TensorInfo, row: int) -> torch.Tensor:
    """One slice along axis 0, e.g. one expert of a packed tensor."""
    size = info.row_bytes
    data = read_bytes(info, row * size, (row + 1) * size)
    return _as_tensor(data, info.dtype, info.shape[1:])


def _as_tensor(data: bytearray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    # torch.frombuffer refuses an empty buffer.
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape)


def read_router(checkpoint: Checkpoint, layer: Layer) -> torch.Tensor:
    """The router rows [E, D] in their stored dtype.

    Raises:
        CheckpointError: A value is NaN or infinite.
    """
    return read_router_part(checkpoint, layer, checkpoint.layout.router)


def read_router_part(
    checkpoint: Checkpoint, layer: Layer, rule: TensorRule
) -> torch.Tensor:
    """The router [E, D] or its bias [E], as ``rule`` says, in the stored dtype.

    Raises:
        CheckpointError: A value is NaN or infinite.
    """
    info = checkpoint.tensors[rule.name(layer.index)]
    rows = read_tensor(info)
    # Row by row, to name the experts; a bias has one value in each.
    finite = torch.isfinite(rows).reshape(len(rows), -1).all(dim=1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        raise CheckpointError(
            f"{info.file}: {info.name}: NaN or infinity in the router row of "
            f"experts {bad}. The checkpoint is damaged; download it again."
        )
    return rows


def check_routers(checkpoint: Checkpoint) -> None:
    """Read every router once, before any work that a NaN would spoil.

    Raises:
        CheckpointError: Naming the router and its rows.
    """
    for layer in checkpoint.moe_layers:
        for rule in checkpoint.layout.router_parts:
            read_router_part(checkpoint, layer, rule)


def read_expert(checkpoint: Checkpoint, layer: Layer, expert: int) -> Expert:
    """One expert's matrices, whatever way the checkpoint lays them out."""
    layout, tensors = checkpoint.layout, checkpoint.tensors
    pieces = {}
    for rule in layout.experts:
        name = rule.name(layer.index, expert)
        pieces[rule.role] = (
            read_weight(checkpoint, name)
            if rule.per_expert
            else read_row(tensors[name], expert)
        )
    if "gate_up" in pieces:
        # "2F" of the tables: gate rows, then up rows.
        gate_FD, up_FD = pieces["gate_up"].chunk(2, dim=0)
        return Expert(gate_FD, up_FD, pieces["down"])
    return Expert(pieces["gate"], pieces["up"], pieces["down"])
