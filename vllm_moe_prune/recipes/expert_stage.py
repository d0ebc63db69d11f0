"""The part of a recipe about whole experts."""

from typing import Literal

from pydantic import Field, model_validator

from .numbers import MOST, Index, Indices, Seed
from .strict import Share, Strict, refuse

Criterion = Literal[
    "routing-score",
    "routing-score-selected",
    "frequency",
    "reap",
    "total-output",
    "man",
    "msan",
    "router-norm",
    "removal-loss",
    "random",
]
"""How much an expert matters; the formulas are in ``decide/scores.py``."""
Chooser = Literal["stun"] | Criterion
Budget = Literal["global", "per-layer", "sensitivity"]


class ExpertStage(Strict):
    """Stage 1: which experts are removed."""

    method: Literal["stun", "score", "none"] = "stun"
    """``stun`` keeps one expert of each cluster, ``score`` drops the lowest scores."""
    criterion: Criterion = "total-output"
    """The score of method ``score``."""
    reverse: bool = False
    """Drop the highest scores instead; a control."""
    search: Literal["greedy", "exhaustive"] = "greedy"
    """``exhaustive`` tries every set of experts (Lu et al.), up to 200,000 sets."""
    drop: Share | None = None
    """Share of the experts to remove, rounded to whole experts."""
    keep: int | None = Field(default=None, ge=1, lt=MOST)
    """Experts kept per MoE layer, on average; replaces ``drop``."""
    budget: Budget = "global"
    """Split over layers: lowest scores of the model, equal, or by measured loss."""
    protected: dict[Index, Indices] = Field(default={})
    """Layer -> experts that are always kept."""
    protect: Literal["none", "super"] = "none"
    """``super`` also keeps super-experts: those that make the massive activations."""
    seed: Seed = 0
    """Seed of criterion ``random``."""
    cluster_by: Literal["behavior", "outputs"] = "behavior"
    """Distance of experts: STUN's Eq. 7, or of their outputs on the same tokens."""
    linkage: Literal["complete", "reference"] = "complete"
    """``reference`` follows STUN's published code, for comparison."""
    representative: Literal["nearest-mean"] | Criterion = "nearest-mean"
    """The expert kept of a cluster: nearest to the mean, or the highest score."""
    merge: Literal["mean", "frequency"] = "mean"
    """Weights of the mean where clusters are averaged: equal, or tokens routed."""
    router_weight: float = Field(default=1.0, ge=0.0, le=1e6)
    """Lambda 1 of STUN's Eq. 7: weight of the distance between router rows."""
    coactivation_weight: float = Field(default=1.0, ge=0.0, le=1e6)
    """Lambda 2 of STUN's Eq. 7: weight of the co-activation counts."""
    divide_by_router_norm: bool = True
    """Divide router distances by the norm of the layer's router."""
    min_experts: int | None = Field(default=None, ge=0, lt=MOST)
    """Minimum of experts per layer; default: the model's top-k. With 0 and method
    ``score`` a layer may lose all experts: its MoE is dropped, its norm kept."""
    groups: Literal["equal", "uneven"] | None = None
    """Expert groups (DeepSeek-V2, V3): ``equal`` removes as many from each, as stock
    routers need; ``uneven`` removes the lowest of the layer and needs the plugin.
    Default: uneven with ``budget: sensitivity``, otherwise equal."""
    max_removed: int | None = Field(default=None, ge=0, lt=MOST)
    """Maximum of experts removed from one layer."""
    reconstruct: Literal["selective", "never", "always"] = "selective"
    """Replace kept experts by the mean of their cluster (STUN, Algorithm 2)."""
    reconstruct_below: int = Field(default=3, ge=1, lt=MOST)
    """Kappa: ``selective`` averages in layers with fewer clusters than this."""
    refit: Literal["ridge", "none"] = "none"
    """``ridge`` refits what is left to the original's hidden states: down projections
    of the experts kept, where any left, and next to dropped layers."""

    @model_validator(mode="after")
    def _consistent(self) -> "ExpertStage":
        weights = self.router_weight or self.coactivation_weight
        exhaustive = self.search == "exhaustive"
        by_loss = self.criterion == "removal-loss" and not self.reverse
        twice = [at for at, ids in self.protected.items() if len(set(ids)) < len(ids)]
        refuse(
            (self.drop is not None and self.keep is not None)
            and "give drop or keep, not both",
            (self.clusters_by_behavior and not weights)
            and "router_weight and coactivation_weight are both zero",
            (self.method != "score" and (self.reverse or exhaustive))
            and "reverse and search: exhaustive need method: score",
            (exhaustive and not by_loss)
            and "search: exhaustive needs criterion: removal-loss, not reversed",
            (exhaustive and self.budget == "global")
            and "search: exhaustive needs budget: per-layer or sensitivity",
            bool(twice) and f"protected: layer {twice[0]} lists an expert twice",
        )
        return self

    @property
    def equal_groups(self) -> bool:
        """Whether every group loses as many experts."""
        # By sensitivity experts leave one at a time; equal groups take one of each.
        if self.groups is None:
            return self.budget != "sensitivity"
        return self.groups == "equal"

    @property
    def clusters_by_behavior(self) -> bool:
        """Whether STUN's Eq. 7 decides."""
        return self.method == "stun" and self.cluster_by == "behavior"
