"""One layer of the input and what a plan makes of it: built once, passed on whole."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..checkpoint.open import Checkpoint, Layer
from ..decide.cut_plan import CutPlan, LayerPlan

Members = tuple[tuple[int, float | None], ...]
"""Input experts and their weights in a mean; None in a plain mean."""


@dataclass(frozen=True, kw_only=True)
class LayerCut:
    """What happens to one layer, and everything that follows from it."""

    checkpoint: Checkpoint
    plan: CutPlan
    layer: Layer
    layer_plan: LayerPlan
    new_index: int
    """Its index in the output; of a dropped block, that of the next one."""
    refitted: Mapping[int, torch.Tensor] = field(default_factory=dict, compare=False)
    """Down projections [D, F] that survivors have instead, by new number."""

    @property
    def index(self) -> int:
        """Of the input layer."""
        return self.layer.index

    @property
    def drops_block(self) -> bool:
        """Whether nothing of the layer is left."""
        return self.layer_plan.action == "drop-block"

    @property
    def keep(self) -> tuple[int, ...]:
        """Input experts that survive, in the order of the output."""
        return self.layer_plan.keep

    @property
    def writes_zeros(self) -> bool:
        """Whether its matrices are slimmed."""
        return self.layer_plan.sparsity > 0 and self.plan.slim != "none"

    @property
    def changes_experts(self) -> bool:
        """Whether its experts are written otherwise than copied or averaged."""
        return self.writes_zeros or self.layer_plan.narrows

    @property
    def changes(self) -> bool:
        """Whether the layer will compute anything else, refits left aside."""
        one = self.layer_plan
        same = one.action == "keep" and one.keep == tuple(range(one.experts))
        quantizes = self.plan.is_quantized and bool(one.keep)
        return not same or one.reconstruct or self.changes_experts or quantizes

    @property
    def old_prefix(self) -> str:
        """What the names of its tensors begin with in the input."""
        return self.checkpoint.arch.layer_prefix.format(layer=self.index)

    @property
    def new_prefix(self) -> str:
        """The same in the output."""
        return self.checkpoint.arch.layer_prefix.format(layer=self.new_index)

    @property
    def keeps_router(self) -> bool:
        """Whether the router stays whole, its rows redirected to the survivors.

        A layer that loses no expert has nothing to redirect: its rows go with the
        experts into their new order, so that stacks without redirects read it rightly.
        """
        fewer = len(self.layer_plan.keep) < self.layer_plan.experts
        return self.plan.routing == "redirect" and fewer

    def members(self, new: int) -> Members:
        """The experts a survivor is built from: itself, or its whole cluster."""
        one = self.layer_plan
        if not one.reconstruct or one.clusters is None:
            return ((one.keep[new], None),)
        if one.merge_weights is None:
            # Not 1/n each: a plain mean is a sum in fp32, divided once.
            return tuple((expert, None) for expert in one.clusters[new])
        return tuple(zip(one.clusters[new], one.merge_weights[new], strict=True))

    @cached_property
    def survivors(self) -> tuple[Members, ...]:
        """The members of every survivor."""
        return tuple(self.members(new) for new in range(len(self.keep)))

    @cached_property
    def redirect(self) -> tuple[int | None, ...]:
        """For each router row the new expert that serves it; None: nothing does."""
        serves: dict[int, int] = {}
        for new, kept in enumerate(self.keep):
            clusters = self.layer_plan.clusters
            # Without clusters a survivor serves its own row alone.
            cluster = clusters[new] if clusters else (kept,)
            serves |= dict.fromkeys(cluster, new)
        return tuple(serves.get(row) for row in range(self.layer_plan.experts))

    @property
    def row_groups(self) -> tuple[int, ...] | None:
        """The routing group of each router row that the plan leaves."""
        groups = self.layer.groups
        # Groups belong to router rows, all of which a kept router still has.
        if groups is None or self.keeps_router:
            return groups
        return tuple(groups[expert] for expert in self.keep)

    @cached_property
    def trimmed(self) -> Layer:
        """The layer after trimming, as the forward pass needs it."""
        if self.layer_plan.drops_moe:
            return dataclasses.replace(
                self.layer,
                num_experts=0,
                has_moe=False,
                dropped=True,
                norm_only=self.layer_plan.action == "drop-moe-keep-norm",
            )
        if not self.layer.has_moe:
            return self.layer
        # top-k is over rows, of which there are more than experts where they redirect.
        rows = self.layer_plan.experts if self.keeps_router else len(self.keep)
        return dataclasses.replace(
            self.layer,
            num_experts=len(self.keep),
            width=self.layer_plan.width or self.layer.width,
            top_k=min(self.layer.top_k, rows),
            redirect=self.redirect if self.keeps_router else None,
            groups=self.row_groups,
        )


def layer_cuts(checkpoint: Checkpoint, plan: CutPlan) -> tuple[LayerCut, ...]:
    """Every layer of the input under a plan that was checked against it."""
    cuts: list[LayerCut] = []
    new_index = 0
    for layer, layer_plan in zip(checkpoint.layers, plan.layers, strict=True):
        cuts.append(
            LayerCut(
                checkpoint=checkpoint,
                plan=plan,
                layer=layer,
                layer_plan=layer_plan,
                new_index=new_index,
            )
        )
        new_index += not cuts[-1].drops_block
    return tuple(cuts)
