"""What a plan needs to know of the checkpoint, and what a plan makes of it in numbers.

Plain values, filled in from the checkpoint's headers by whoever opened it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ..slim.quota import groups_in, zeros_in_matrix
from .plan import LayerPlan, ModelId

Slim = Literal["wanda", "magnitude", "none"]
Routing = Literal["drop", "redirect"]


@dataclass(frozen=True)
class LayerFacts:
    """One decoder layer; is a ``LayerShape``. All counts are of parameters."""

    num_experts: int
    top_k: int
    has_moe: bool
    parameters: int
    """Everything in the layer: what leaves with the block."""
    moe_parameters: int = 0
    """What leaves with the MoE sublayer: experts, router, shared experts, norm."""
    expert_shapes: tuple[tuple[int, int], ...] = ()
    """[rows, cols] of the matrices of one expert, as they are slimmed."""
    router_parameters_per_expert: int = 0
    """What an expert takes with it besides its matrices: router row, biases."""

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return sum(rows * cols for rows, cols in self.expert_shapes)


@dataclass(frozen=True)
class ModelFacts:
    """One checkpoint."""

    model: ModelId
    layers: tuple[LayerFacts, ...]
    all_parameters: int

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts of all layers (shared experts are not counted)."""
        return sum(
            layer.num_experts * layer.expert_parameters
            for layer in self.layers
            if layer.has_moe
        )


@dataclass(frozen=True)
class SparsityCount:
    """Parameters before, removed and zeroed; experts of dropped layers are removed."""

    expert_parameters: int
    expert_parameters_removed: int
    all_parameters: int
    all_parameters_removed: int
    zeros: int
    """Weights zeroed in surviving experts."""

    @property
    def expert_sparsity(self) -> float:
        """Removed or zeroed expert parameters over expert parameters before."""
        gone = self.expert_parameters_removed + self.zeros
        return gone / self.expert_parameters if self.expert_parameters else 0.0

    @property
    def total_sparsity(self) -> float:
        """Removed or zeroed parameters over all parameters before."""
        return (self.all_parameters_removed + self.zeros) / self.all_parameters


def count_sparsity(
    facts: ModelFacts, layers: Sequence[LayerPlan], slim: Slim, routing: Routing
) -> SparsityCount:
    """What a plan removes and zeroes, to the last parameter."""
    pairs = list(zip(facts.layers, layers, strict=True))
    return SparsityCount(
        expert_parameters=facts.expert_parameters,
        expert_parameters_removed=sum(
            (plan.experts - len(plan.keep)) * layer.expert_parameters
            for layer, plan in pairs
        ),
        all_parameters=facts.all_parameters,
        all_parameters_removed=sum(
            _removed(layer, plan, routing) for layer, plan in pairs
        ),
        zeros=sum(_zeros(layer, plan, slim) for layer, plan in pairs),
    )


def slimmed_groups(
    pairs: Iterable[tuple[LayerFacts, LayerPlan]], method: Literal["wanda", "magnitude"]
) -> Counter[int]:
    """How many comparison groups of each size the surviving experts have."""
    groups: Counter[int] = Counter()
    for layer, plan in pairs:
        for rows, cols in layer.expert_shapes:
            count, size = groups_in(method, rows, cols)
            groups[size] += count * len(plan.keep)
    return +groups


def _removed(layer: LayerFacts, plan: LayerPlan, routing: Routing) -> int:
    if plan.action == "drop-block":
        return layer.parameters
    if plan.action == "drop-moe":
        return layer.moe_parameters
    rows = layer.router_parameters_per_expert if routing == "drop" else 0
    return (plan.experts - len(plan.keep)) * (layer.expert_parameters + rows)


def _zeros(layer: LayerFacts, plan: LayerPlan, slim: Slim) -> int:
    if slim == "none":
        return 0
    return len(plan.keep) * sum(
        zeros_in_matrix(slim, rows, cols, plan.sparsity)
        for rows, cols in layer.expert_shapes
    )
