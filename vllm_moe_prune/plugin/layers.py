"""What each decoder layer of a pruned checkpoint holds, in the terms vLLM needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..archs.spec import MoeArch
from ..checkpoint.remap import ExpertRemap
from ..errors import RemapError


@dataclass(frozen=True)
class ServedLayer:
    """One decoder layer: how many experts, and how its router reaches them."""

    index: int
    experts: int
    """Experts with weights; 0 where there is no MoE sublayer."""
    top_k: int
    router_rows: int
    """Rows of the router; more than ``experts`` where routing redirects."""
    redirect: tuple[int | None, ...] | None = None
    """Router row -> expert (None: nothing serves it); None where rows are experts."""
    norm_only: bool = False
    """The MoE sublayer is gone, the norm before it stayed: x + Norm(x)."""

    @property
    def has_moe(self) -> bool:
        """Whether the layer has a MoE sublayer and the norm in front of it."""
        return self.experts > 0


def served_layers(
    hf_config: Any, remap: ExpertRemap, arch: MoeArch, where: str
) -> tuple[ServedLayer, ...]:
    """Combine the config vLLM runs with and the remap table; they must agree.

    Raises:
        RemapError: Naming the first layer on which the two disagree.
    """
    if remap.model_type != arch.model_type:
        raise RemapError(
            f"{where}: the remap table is for model_type {remap.model_type!r}, the "
            f"checkpoint is {arch.model_type!r}."
        )
    views: Sequence[Any] = hf_config.per_layer_config
    if len(views) != len(remap.layers):
        raise RemapError(
            f"{where}: the remap table has {len(remap.layers)} layers, config.json "
            f"{len(views)}."
        )
    layers = []
    for index, (view, entry) in enumerate(zip(views, remap.layers, strict=True)):
        experts = getattr(view, arch.config.experts)
        top_k = getattr(view, arch.config.top_k)
        if experts != len(entry.kept):
            raise RemapError(
                f"{where}: layer {index}: config.json says {arch.config.experts} is "
                f"{experts}, the remap table lists {len(entry.kept)} kept experts."
            )
        rows = len(entry.router_rows)
        if entry.moe and not 1 <= top_k <= rows:
            raise RemapError(
                f"{where}: layer {index}: {arch.config.top_k} is {top_k}, but the "
                f"router has {rows} rows."
            )
        redirect, norm_only = entry.redirect, entry.norm_kept
        layers.append(ServedLayer(index, experts, top_k, rows, redirect, norm_only))
    return tuple(layers)
