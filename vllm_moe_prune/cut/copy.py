"""Writing output tensors that need no activations: copies and means."""

import torch

from ..checkpoint.block_fp8 import DTYPE as FP8
from ..checkpoint.index import TensorInfo, read_bytes
from ..checkpoint.open import Checkpoint
from ..checkpoint.reader import read_row, read_tensor
from ..checkpoint.writer import CHUNK_BYTES, ShardWriter
from .slice import Group, OutputTensor, Piece
from .trimmed import mean_of


def write_tensor(
    checkpoint: Checkpoint, tensor: OutputTensor, writer: ShardWriter
) -> None:
    """Stream one output tensor: bytes for copies, fp32 means for clusters."""
    if not writer.needs(tensor.name):
        return
    at = 0
    for group in tensor.groups:
        if len(group) == 1:
            at = _copy_piece(checkpoint, tensor.name, group[0], writer, at)
        else:
            data = tensor_view(group_mean(checkpoint, group))
            writer.write(tensor.name, data, at)
            at += len(data)


def build_tensor(checkpoint: Checkpoint, tensor: OutputTensor) -> torch.Tensor:
    """One output tensor in memory (for load-time pruning); slimming not applied."""
    parts = [group_mean(checkpoint, group) for group in tensor.groups]
    if len(parts) == 1 and parts[0].shape == tensor.shape:
        return parts[0]
    if parts[0].dim() == len(tensor.shape):
        return torch.cat(parts)
    return torch.stack(parts)


def group_mean(checkpoint: Checkpoint, group: Group) -> torch.Tensor:
    """The mean of a group's pieces; a single piece unchanged."""
    tensors = [_read_piece(checkpoint, piece) for piece in group]
    return mean_of(tensors, [piece.weight for piece in group])


def stored_view(
    info: TensorInfo,
    slimmed: torch.Tensor,
    kept_K: torch.Tensor | None = None,
    axis: int = 0,
) -> memoryview:
    """The bytes of a slimmed tensor as the checkpoint stores it.

    FP8 values are the stored ones, zero where the slimmed ones are; their scales stay.

    Args:
        info: The tensor as it is stored.
        slimmed: What became of it.
        kept_K: Which of its channels are left in ``slimmed``; None: all.
        axis: The axis of channels.
    """
    slimmed = slimmed.cpu()
    if info.dtype != FP8:
        return tensor_view(slimmed)
    stored = read_tensor(info).view(torch.uint8)
    if kept_K is not None:
        stored = stored.index_select(axis, kept_K.cpu())
    # By bytes: 0x00 is +0.0 in e4m3, under any scale.
    stored.masked_fill_(slimmed == 0, 0)
    return tensor_view(stored)


def tensor_view(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes without copying them."""
    # As uint8, since numpy has neither bf16 nor fp8.
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _read_piece(checkpoint: Checkpoint, piece: Piece) -> torch.Tensor:
    info = checkpoint.stored(piece.source)
    return read_tensor(info) if piece.row is None else read_row(info, piece.row)


def _extent(info: TensorInfo, piece: Piece) -> tuple[int, int]:
    if piece.row is None:
        return 0, info.nbytes
    return piece.row * info.row_bytes, (piece.row + 1) * info.row_bytes


def _copy_piece(
    checkpoint: Checkpoint, name: str, piece: Piece, writer: ShardWriter, at: int
) -> int:
    info = checkpoint.stored(piece.source)
    start, stop = _extent(info, piece)
    # A packed expert tensor may be larger than memory.
    while start < stop:
        end = min(start + CHUNK_BYTES, stop)
        writer.write(name, memoryview(read_bytes(info, start, end)), at)
        at += end - start
        start = end
    return at
