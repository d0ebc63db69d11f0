"""What a plan needs to know of the checkpoint, and what a plan makes of it in numbers.

Plain values, filled in from the checkpoint's headers by whoever opened it.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..recipes.schema import Part, QuantPart, SlimMethod
from ..slim.quota import groups_in, zeros_in_group
from .cut_plan import CutPlan, LayerPlan, ModelId

Routing = Literal["drop", "redirect"]


@dataclass(frozen=True)
class Matrix:
    """One matrix that can be slimmed, as it is slimmed: [rows, cols]."""

    name: str
    """Below the layer's prefix, as in the checkpoint: ``self_attn.q_proj.weight``."""
    part: QuantPart
    rows: int
    cols: int


@dataclass(frozen=True, kw_only=True)
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
    channel_block: int = 1
    """Neighboring channels that can only leave together: those of an FP8 block."""
    shared_width: int = 0
    """Channels of the shared experts, as one MLP, which those of an expert must divide;
    0: there are none, or a key of their own says how many."""
    router_parameters_per_expert: int = 0
    """What an expert takes with it besides its matrices: router row, biases."""
    moe_norm_parameters: int = 0
    """The part of ``moe_parameters`` that is the norm before the MoE."""
    expert_names: tuple[str, ...] = ()
    """Names of the matrices of one expert below the layer's prefix, ``{expert}`` left
    as it is; for ``slim.exclude``."""
    others: tuple[Matrix, ...] = ()
    """Every matrix of the layer that is neither a routed expert's nor the router."""
    groups: tuple[int, ...] | None = None
    """The routing group of each expert; None where all are one group."""
    group_floor: int = 1
    """Fewest experts that routing needs in each group."""
    mtp: bool = False
    """Behind the last layer of the model, predicting further tokens ahead."""

    @property
    def width(self) -> int | None:
        """Channels of one expert; None where shapes are not known."""
        return self.expert_shapes[0][0] if self.expert_shapes else None

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return sum(rows * cols for rows, cols in self.expert_shapes)

    def with_width(self, width: int | None) -> "LayerFacts":
        """The layer with experts of another width; None: of their own."""
        if width is None or not self.expert_shapes:
            return self
        hidden = self.expert_shapes[0][1]
        rows = (width, hidden)
        return replace(self, expert_shapes=(rows, rows, (hidden, width)))

    @property
    def expert_matrices(self) -> tuple[Matrix, ...]:
        """The matrices of one expert."""
        names = self.expert_names or ("",) * len(self.expert_shapes)
        pairs = zip(names, self.expert_shapes, strict=True)
        return tuple(Matrix(name, "experts", *shape) for name, shape in pairs)


@dataclass(frozen=True)
class ModelFacts:
    """One checkpoint."""

    model: ModelId
    layers: tuple[LayerFacts, ...]
    all_parameters: int
    fixed: Literal["fp8", "quantized"] | None = None
    """How experts are stored whose values must stay as they are."""
    head: Matrix | None = None
    """The output head, where it is a matrix of its own."""

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts of all layers (shared experts are not counted)."""
        return sum(
            layer.num_experts * layer.expert_parameters
            for layer in self.layers
            if layer.has_moe
        )


@dataclass(frozen=True)
class Slimming:
    """Which matrices are slimmed, and in which groups."""

    method: SlimMethod
    group: int | None = None
    """The m of an n:m pattern."""
    parts: tuple[Part, ...] = ("experts",)
    exclude: tuple[str, ...] = ()

    def takes(self, matrix: Matrix) -> bool:
        """Whether a matrix is slimmed."""
        return matrix.part in self.parts and not any(
            text in matrix.name for text in self.exclude
        )

    def groups(
        self, layer: LayerFacts, plan: LayerPlan, *, experts_only: bool = False
    ) -> Counter[int]:
        """How many comparison groups of each size a layer is left with."""
        groups: Counter[int] = Counter()
        for matrix, copies in left_matrices(layer, plan):
            if self.method == "none" or not self.takes(matrix):
                continue
            if experts_only and matrix.part != "experts":
                continue
            found = groups_in(self.method, matrix.rows, matrix.cols, self.group)
            for size, count in found.items():
                groups[size] += count * copies
        # Unary plus leaves out sizes of which no group is left.
        return +groups


@dataclass(frozen=True, kw_only=True)
class SparsityCount:
    """Parameters before, removed and zeroed; experts of dropped layers are removed."""

    expert_parameters: int
    expert_parameters_removed: int
    all_parameters: int
    all_parameters_removed: int
    zeros: int
    """Weights zeroed in what survives."""
    expert_zeros: int
    """Those of them in routed experts."""

    @property
    def expert_sparsity(self) -> float:
        """Removed or zeroed expert parameters over expert parameters before."""
        gone = self.expert_parameters_removed + self.expert_zeros
        return gone / self.expert_parameters if self.expert_parameters else 0.0

    @property
    def total_sparsity(self) -> float:
        """Removed or zeroed parameters over all parameters before."""
        return (self.all_parameters_removed + self.zeros) / self.all_parameters


def count_plan(facts: ModelFacts, plan: CutPlan) -> SparsityCount:
    """What a plan removes and zeroes, to the last parameter."""
    slimming = Slimming(plan.slim, plan.group, plan.slim_parts, plan.slim_exclude)
    return count_layers(facts, plan.layers, slimming, plan.routing)


def count_layers(
    facts: ModelFacts,
    layers: Sequence[LayerPlan],
    slimming: Slimming,
    routing: Routing,
) -> SparsityCount:
    """The same from a plan's parts, before there is a plan."""
    pairs = list(zip(facts.layers, layers, strict=True))
    return SparsityCount(
        expert_parameters=facts.expert_parameters,
        expert_parameters_removed=sum(
            plan.experts * layer.expert_parameters
            - len(plan.keep) * layer.with_width(plan.width).expert_parameters
            for layer, plan in pairs
        ),
        all_parameters=facts.all_parameters,
        all_parameters_removed=sum(
            _removed(layer, plan, routing) for layer, plan in pairs
        ),
        zeros=sum(
            _zeros(slimming.groups(layer, plan), plan.sparsity) for layer, plan in pairs
        ),
        expert_zeros=sum(
            _zeros(slimming.groups(layer, plan, experts_only=True), plan.sparsity)
            for layer, plan in pairs
        ),
    )


def left_matrices(layer: LayerFacts, plan: LayerPlan) -> Iterator[tuple[Matrix, int]]:
    """The matrices that could be slimmed in what a plan leaves, with their number."""
    for matrix in layer.with_width(plan.width).expert_matrices:
        yield matrix, len(plan.keep)
    for matrix in layer.others:
        # Shared experts leave with the MoE sublayer, the rest only with the block.
        gone = plan.action == "drop-block" or (
            plan.action != "keep" and matrix.part == "shared"
        )
        yield matrix, 0 if gone else 1


def _removed(layer: LayerFacts, plan: LayerPlan, routing: Routing) -> int:
    if plan.action == "drop-block":
        return layer.parameters
    if plan.action == "drop-moe":
        return layer.moe_parameters
    if plan.action == "drop-moe-keep-norm":
        return layer.moe_parameters - layer.moe_norm_parameters
    # Under redirect the router keeps its rows and biases.
    rows = layer.router_parameters_per_expert if routing == "drop" else 0
    gone = (plan.experts - len(plan.keep)) * (layer.expert_parameters + rows)
    left = layer.with_width(plan.width).expert_parameters
    return gone + len(plan.keep) * (layer.expert_parameters - left)


def _zeros(groups: Counter[int], sparsity: float) -> int:
    return sum(count * zeros_in_group(size, sparsity) for size, count in groups.items())
