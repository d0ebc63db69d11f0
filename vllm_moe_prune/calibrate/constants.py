"""What removed experts give where a vector stands for each of them.

Axes: N tokens, K top-k, D hidden, G removed experts.
"""

import torch

from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import read_tensor
from .expert_forward import Routing


@torch.no_grad()
def add_constants(
    checkpoint: Checkpoint, layer: Layer, routing: Routing, out_ND: torch.Tensor
) -> None:
    """Add router weight times vector for every slot of a removed expert, in place.

    Sums of weights and the product are in fp32, as vLLM has them.
    """
    substitution = checkpoint.substitution
    constants = substitution.constants.get(layer.index) if substitution else None
    if not constants:
        return
    device = out_ND.device
    ids = sorted(constants)
    values_GD = torch.stack([read_tensor(constants[one]).float() for one in ids])
    weights_NG = torch.stack(
        [
            (routing.weights_NK.float() * (routing.ids_NK == one)).sum(dim=1)
            for one in ids
        ],
        dim=1,
    )
    out_ND += (weights_NG.to(device) @ values_GD.to(device)).to(out_ND.dtype)
