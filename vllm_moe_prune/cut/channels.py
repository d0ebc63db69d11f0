"""Which channels the experts of a narrowed layer kept: written by a cut, for verify.

``moe_prune/channels.safetensors`` has a tensor ``layers.N`` of bytes [E, ceil(F / 8)]
per narrowed layer N of the input: a row per survivor, in the output's order, channel c
of the input being bit c % 8 of byte c // 8.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..calibrate.container import TensorBytes, write_safetensors
from ..checkpoint.index import read_header
from ..checkpoint.reader import read_tensor
from ..errors import CheckpointError
from .layer_record import LayerRecord
from .output import CHANNELS_FILE
from .slice import OutputTensor


def write_channels(folder: Path, records: Sequence[LayerRecord]) -> None:
    """Write the file, if any layer was narrowed."""
    parts = {}
    for record in records:
        if record.channels:
            rows = [bytes.fromhex(row) for row in record.channels]
            shape, data = (len(rows), len(rows[0])), memoryview(b"".join(rows))
            parts[_name(record.layer)] = TensorBytes("U8", shape, data)
    if parts:
        (folder / CHANNELS_FILE).parent.mkdir(exist_ok=True)
        write_safetensors(folder / CHANNELS_FILE, parts, {})


def read_channels(
    folder: Path, layer: int, experts: int, before: int, after: int
) -> list[torch.Tensor]:
    """The channels [after] that each survivor of a layer kept, ascending.

    Args:
        folder: The output.
        layer: Of the input.
        experts: That are left.
        before: Channels of each in the input.
        after: Channels of each in the output.

    Raises:
        CheckpointError: The file is missing, damaged, or says something else.
    """
    path = folder / CHANNELS_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing, but its experts were narrowed. Copy the folder again."
        )
    info = read_header(path).tensors.get(_name(layer))
    shape = (experts, -(-before // 8))
    if info is None or info.dtype != "U8" or info.shape != shape:
        raise CheckpointError(
            f"{path}: has no bytes {list(shape)} for layer {layer}, whose experts were "
            "narrowed. Copy the folder again."
        )
    packed = read_tensor(info).numpy()
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    kept = [torch.from_numpy(row.nonzero()[0]) for row in bits]
    for expert, channels in enumerate(kept):
        if len(channels) != after or int(channels[-1]) >= before:
            raise CheckpointError(
                f"{path}: layer {layer}, expert {expert}: names {len(channels)} "
                f"channels up to {int(channels[-1]) if len(channels) else 0}; it has "
                f"{after} of {before}. Copy the folder again."
            )
    return kept


def take_channels(
    matrix: torch.Tensor, tensor: OutputTensor, kept_K: torch.Tensor, block: int = 1
) -> torch.Tensor:
    """What is left of one matrix of one expert, or of its FP8 scales.

    Args:
        matrix: As the input has it.
        tensor: What becomes of it; its ``channels`` is not None.
        kept_K: The channels that are left.
        block: Channels that share a scale; 1 for a matrix.
    """
    kept_B = torch.unique_consecutive(kept_K // block)
    if tensor.role == "gate_up":
        kept_B = torch.cat([kept_B, kept_B + len(matrix) // 2])
    assert tensor.channels is not None
    # Few operations know FP8; bytes are taken as well.
    one_byte = matrix.element_size() == 1
    found = matrix.view(torch.uint8) if one_byte else matrix
    return found.index_select(tensor.channels, kept_B).view(matrix.dtype)


def _name(layer: int) -> str:
    return f"layers.{layer}"
