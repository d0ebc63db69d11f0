"""How far apart experts are: in their router rows and in their weights.

Axes: E experts, D hidden, P parameters of one expert, p a chunk of them.
"""

from collections.abc import Iterator

import numpy as np
import torch

from ..archs.spec import TensorRule
from ..checkpoint.index import read_bytes
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import DTYPES, read_expert, read_router
from ..errors import CheckpointError
from ..slim.kurtosis import power_sums
from .stats import Array

# Of one chunk in fp32, all experts together.
CHUNK_BYTES = 16 << 20


def router_distances(checkpoint: Checkpoint, layer: Layer) -> tuple[Array, Array]:
    """Squared L2 distance between router rows, and the whole router's norm."""
    router_ED = read_router(checkpoint, layer).double()
    # By differences: a Gram matrix would cancel between rows that are nearly the same.
    exact = "donot_use_mm_for_euclid_dist"
    sqdist_EE = torch.cdist(router_ED, router_ED, compute_mode=exact).square()
    norm = router_ED.square().sum().sqrt()
    return _symmetric(sqdist_EE.numpy()), np.asarray(norm.numpy())


def router_row_norms(checkpoint: Checkpoint, layer: Layer) -> Array:
    """L2 norm of each router row."""
    router_ED = read_router(checkpoint, layer).double()
    return np.asarray(router_ED.square().sum(1).sqrt().numpy())


@torch.no_grad()
def weight_distances(
    checkpoint: Checkpoint, layer: Layer, device: torch.device | str = "cpu"
) -> tuple[Array, Array]:
    """Squared L2 distance between experts, all their matrices concatenated.

    By way of the Gram matrix of chunks centered by the mean over experts: products in
    fp32, sums over chunks in fp64. No more than one chunk is in memory. The same pass
    gives the sums of powers of each expert's weights (``slim/kurtosis.py``).

    Returns:
        Distances [E, E] and power sums [E, 5].

    Raises:
        CheckpointError: A weight is NaN or infinite.
    """
    experts = layer.num_experts
    gram_EE = torch.zeros(experts, experts, dtype=torch.float64, device=device)
    powers_E5 = torch.zeros(experts, 5, dtype=torch.float64, device=device)
    for rule in checkpoint.layout.experts:
        for chunk_Ep in _chunks(checkpoint, layer, rule, device):
            # Before centering: kurtosis is of the weights as they are.
            powers_E5 += power_sums(chunk_Ep)
            # Distances do not depend on it, and less cancels in |a|^2 + |b|^2 - 2ab.
            chunk_Ep -= chunk_Ep.mean(dim=0)
            part_EE = (chunk_Ep @ chunk_Ep.T).double()
            # One bad weight shows in the product; whose it is is looked for only then.
            if not bool(torch.isfinite(part_EE).all()):
                raise CheckpointError(
                    f"{checkpoint.folder}: layer {layer.index}: NaN or infinity in "
                    f"the weights of experts {_not_finite(checkpoint, layer)}. The "
                    "checkpoint is damaged; download it again."
                )
            gram_EE += part_EE
    squares_E = gram_EE.diagonal()
    sqdist_EE = squares_E[:, None] + squares_E[None, :] - gram_EE - gram_EE.T
    return _symmetric(sqdist_EE.cpu().numpy()), powers_E5.cpu().numpy()


def _chunks(
    checkpoint: Checkpoint,
    layer: Layer,
    rule: TensorRule,
    device: torch.device | str,
) -> Iterator[torch.Tensor]:
    """The same stretch of every expert's flattened matrix, in fp32."""
    tensors, experts = checkpoint.tensors, range(layer.num_experts)
    infos = [tensors[rule.name(layer.index, expert)] for expert in experts]
    dtype = DTYPES[infos[0].dtype]
    packed = not rule.per_expert
    # Packed: one tensor [E, ...] holds the matrix of every expert.
    size = infos[0].row_bytes if packed else infos[0].nbytes
    # Whole groups of 4096 weights, so that results do not depend on the stored dtype.
    step = max(1, CHUNK_BYTES // (4 * 4096 * len(infos))) * 4096 * dtype.itemsize
    for start in range(0, size, step):
        stop = min(start + step, size)
        # For other devices as it is stored: half the bytes to copy, and all at once.
        held = torch.float32 if torch.device(device).type == "cpu" else dtype
        chunk_Ep = torch.empty(len(infos), (stop - start) // dtype.itemsize, dtype=held)
        for expert, info in enumerate(infos):
            if DTYPES[info.dtype] != dtype:
                raise CheckpointError(
                    f"{info.file}: {info.name} is {info.dtype}, the same matrix of "
                    f"expert 0 is {infos[0].dtype}."
                )
            base = expert * size if packed else 0
            data = read_bytes(info, base + start, base + stop)
            chunk_Ep[expert] = torch.frombuffer(data, dtype=dtype)
        yield chunk_Ep.to(device, torch.float32)


def _not_finite(checkpoint: Checkpoint, layer: Layer) -> list[int]:
    return [
        number
        for number in range(layer.num_experts)
        for expert in [read_expert(checkpoint, layer, number)]
        if not all(bool(torch.isfinite(matrix).all()) for matrix in expert)
    ]


def _symmetric(sqdist_EE: Array) -> Array:
    """One triangle mirrored, a zero diagonal, rounding below zero removed."""
    upper_EE: Array = np.triu(np.maximum(sqdist_EE, 0.0), 1)
    return upper_EE + upper_EE.T
