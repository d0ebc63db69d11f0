"""What each decoder layer of a pruned checkpoint holds, in the terms vLLM needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...archs.spec import Key, MoeArch, RouterRule
from ...checkpoint.remap import ExpertRemap, RemapLayer
from ...errors import RemapError


@dataclass(frozen=True, kw_only=True)
class ServedLayer:
    """One decoder layer: how many experts, and how its router reaches them."""

    index: int
    experts: int
    """Experts with weights; 0 where there is no MoE sublayer."""
    top_k: int
    router_rows: int
    """Rows of the router; more than ``experts`` where routing redirects."""
    width: int = 0
    """Channels of each expert; 0 where there are none."""
    shared_width: int = 0
    """Channels of the experts that every token uses, as one MLP."""
    dense_width: int = 0
    """Channels of the dense MLP, where ``dense``."""
    redirect: tuple[int | None, ...] | None = None
    """Router row -> expert (None: nothing serves it); None where rows are experts."""
    norm_only: bool = False
    """The MoE sublayer is gone, the norm before it stayed: x + Norm(x)."""
    dense: bool = False
    """Whether a dense MLP stands where other layers have their experts."""
    groups: int = 1
    """Groups the original's experts form."""
    row_groups: tuple[int, ...] | None = None
    """Router row -> group; None where all rows are one group."""

    @property
    def has_moe(self) -> bool:
        """Whether the layer has a MoE sublayer and the norm in front of it."""
        return self.experts > 0

    @property
    def rows_are_experts(self) -> bool:
        """Whether vLLM's own routers do: every row an expert, groups equally large.

        They take rows in the order of their groups, and forget about groups of one.
        """
        if self.row_groups is None:
            return self.redirect is None
        size = self.router_rows // self.groups
        # Shorter than row_groups, so unequal, where groups do not divide the rows.
        in_order = tuple(row // size for row in range(size * self.groups))
        return self.redirect is None and size > 1 and self.row_groups == in_order


def served_layers(
    hf_config: Any, remap: ExpertRemap, arch: MoeArch, rule: RouterRule, where: str
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
    return tuple(
        _layer(view, entry, arch, rule, f"{where}: layer {index}")
        for index, (view, entry) in enumerate(zip(views, remap.layers, strict=True))
    )


def _layer(
    view: Any, entry: RemapLayer, arch: MoeArch, rule: RouterRule, at: str
) -> ServedLayer:
    experts = getattr(view, arch.config.experts)
    top_k = getattr(view, arch.config.top_k)
    dense = not entry.moe and not entry.moe_dropped
    # config.json gives dense layers the count of the others.
    if experts != len(entry.kept) and not dense:
        raise RemapError(
            f"{at}: config.json says {arch.config.experts} is {experts}, the remap "
            f"table lists {len(entry.kept)} kept experts."
        )
    width = getattr(view, arch.config.width)
    rows = len(entry.router_rows)
    if entry.moe and not 1 <= top_k <= rows:
        raise RemapError(
            f"{at}: {arch.config.top_k} is {top_k}, but the router has {rows} rows."
        )
    return ServedLayer(
        index=entry.layer,
        experts=len(entry.kept),
        top_k=top_k,
        width=width,
        shared_width=(_read(view, arch.shared_key) or 0)
        * (width if arch.shared_width is None else 1),
        dense_width=getattr(view, arch.dense_width) if dense else 0,
        router_rows=rows,
        redirect=entry.redirect,
        norm_only=entry.norm_kept,
        dense=dense,
        groups=rule.groups,
        row_groups=_row_groups(entry, rule, at) if entry.moe else None,
    )


def _read(view: Any, key: Key) -> Any:
    value = getattr(view, key.name, None) if key.name is not None else None
    return key.default if value is None else value


def _row_groups(entry: RemapLayer, rule: RouterRule, at: str) -> tuple[int, ...] | None:
    if rule.groups == 1:
        return None
    if entry.groups is None:
        raise RemapError(
            f"{at}: config.json has {rule.groups} groups of experts, but the remap "
            "table does not say which group a router row belongs to. Cut again with "
            "this version."
        )
    if max(entry.groups) >= rule.groups:
        raise RemapError(
            f"{at}: the remap table names group {max(entry.groups)}, but config.json "
            f"has {rule.groups} groups."
        )
    return entry.groups
