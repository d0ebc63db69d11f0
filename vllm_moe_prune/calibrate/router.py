"""A layer's router as the forward uses it, read from the checkpoint or from a plan.

Axes: N tokens, D hidden, R router rows.
"""

from collections.abc import Callable

import torch

from ..archs.spec import TensorRule
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import read_router_part
from .expert_forward import Router


def router_of(
    checkpoint: Checkpoint,
    layer: Layer,
    like: torch.Tensor,
    read: Callable[[TensorRule], torch.Tensor] | None = None,
) -> Router:
    """The router of a layer, as it is or as a plan leaves it.

    Args:
        checkpoint: Whose it is.
        layer: Which.
        like: A tensor of the device and dtype that it is to compute with.
        read: Gives the router and its bias; without it they are the checkpoint's.
    """
    parts = {
        rule.role: (
            read(rule) if read else read_router_part(checkpoint, layer, rule)
        ).to(like.device)
        for rule in checkpoint.layout.router_parts
    }
    bias_R, groups = parts.get("router_bias"), layer.groups
    # The bias in fp32, as the scores that it is added to.
    return Router(
        parts["router"].to(like.dtype),
        layer.top_k,
        checkpoint.rule,
        None if bias_R is None else bias_R.float(),
        None if groups is None else torch.tensor(groups, device=like.device),
    )
