"""One buffer of each device, in which all layers expand their experts in turn.

CUDA graphs keep its address: it grows while weights load, and never afterwards.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_HELD: dict[torch.device, Tensor] = {}


def reserve(nbytes: int, device: torch.device) -> None:
    """Hold at least so many bytes; called for each layer before anything runs."""
    # With the index that tensors have: "cuda" is the current one.
    device = torch.empty(0, device=device).device
    if device not in _HELD or _HELD[device].nbytes < nbytes:
        _HELD.pop(device, None)  # before the larger one is made
        _HELD[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)


def tensors(
    device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]
) -> list[Tensor]:
    """Places in the buffer, one behind the other; whatever was there last.

    Raises:
        RuntimeError: They do not fit: growing would pull memory from under graphs.
    """
    sizes = [prod(shape) * dtype.itemsize for shape in shapes]
    held = _HELD.get(device)
    if held is None or held.nbytes < sum(sizes):
        there = 0 if held is None else held.nbytes
        raise RuntimeError(
            f"the workspace on {device} has {there} bytes, {sum(sizes)} are needed; "
            "reserve() was not called for this layer."
        )
    pieces = held[: sum(sizes)].split(sizes)
    pairs = zip(pieces, shapes, strict=True)
    return [piece.view(dtype).view(shape) for piece, shape in pairs]
