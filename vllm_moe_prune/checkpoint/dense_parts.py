"""The MLPs of a layer that are no routed experts, as the family's table names them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..archs.spec import MOE_NORM, GatedMlp

if TYPE_CHECKING:
    from .open import Checkpoint, Layer


@dataclass(frozen=True)
class DensePart:
    """One MLP that every token goes through."""

    mlp: GatedMlp
    width: int
    norm: str | None
    """Its norm below the layer's prefix; None: it reads what the experts read, and
    leaves with them."""


def dense_parts(checkpoint: "Checkpoint", layer: "Layer") -> list[DensePart]:
    """The MLPs of a layer beside its experts, in the order they are added."""
    arch, config = checkpoint.arch, checkpoint.config
    parts = []
    dense = not layer.has_moe and not layer.dropped
    if dense and arch.dense_mlp is not None:
        parts.append(DensePart(arch.dense_mlp, layer.dense_width, MOE_NORM))
    residual = arch.residual
    # It reads what attention gives, so it stays where the MoE sublayer was dropped.
    if not dense and residual is not None and residual.present.read(config):
        # As wide as the hidden size by definition; no key of Arctic's config says so.
        width = config[arch.config.hidden]
        parts.append(DensePart(residual.mlp, width, residual.norm))
    if layer.has_moe and arch.shared is not None and layer.shared_width:
        parts.append(DensePart(arch.shared, layer.shared_width, None))
    return parts
