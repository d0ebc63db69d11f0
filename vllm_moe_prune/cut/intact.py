"""The intact model's calibration stream, and zeros that many plans take from it.

Axes: S sequences, T tokens of a sequence, D hidden, N = S*T tokens.
"""

from collections.abc import Iterable, Sequence

import torch

from ..calibrate.expert_forward import Routing, add_expert, expert_tokens, place
from ..calibrate.forward import StreamingModel
from ..checkpoint.open import Layer
from ..checkpoint.reader import Expert
from ..decide.cut_plan import CutPlan
from ..slim.wanda import ranked
from .layer_cut import LayerCut, Members
from .matrices import channel_block, taken
from .narrow_expert import narrow_expert
from .slim_expert import (
    ALL,
    Known,
    Slimming,
    Taken,
    input_sums,
    kind_of,
    known_of,
    slim_by_data,
    slim_by_known,
    slim_by_magnitude,
)


def alone(expert: int) -> Members:
    """The members of a survivor that is no mean."""
    return ((expert, None),)


class IntactStream:
    """The calibration's hidden states in the original model, layer by layer."""

    def __init__(
        self, model: StreamingModel, calibration_ST: torch.Tensor, last: int
    ) -> None:
        """Embed the tokens; they go no further than layer ``last``."""
        self._model, self._last = model, last
        self._state_STD = model.embed(calibration_ST)
        self._layer: Layer | None = None
        self._x_ND = self._out_ND = torch.empty(0)
        self._routing: Routing | None = None

    def enter(self, layer: Layer) -> bool:
        """Run a layer up to its experts; whether there are any to ask about."""
        self._layer = None
        if layer.index > self._last:
            return False
        self._state_STD, x_ND = self._model.enter(layer.index, self._state_STD)
        if x_ND is None:
            return False
        self._layer, self._x_ND = layer, x_ND
        self._routing = self._model.route(layer, x_ND)
        self._out_ND = torch.zeros_like(x_ND)
        return True

    def zeros(
        self, expert: Expert, members: Members, plans: Iterable[CutPlan]
    ) -> "SharedZeros":
        """Zeros of one expert of the layer, by the tokens that choose its members."""
        rows = {old for old, _ in members}
        token_n, weight_n = self._served(rows)
        placed = Expert(*(matrix.to(self._x_ND.device) for matrix in expert))
        known: dict[Slimming, Known] = {}
        for plan in plans:
            if (kind := kind_of(plan)) not in known:
                sums = input_sums(
                    placed, plan, self._x_ND, token_n, weight_n, self._model.act
                )
                known[kind] = _known(placed, plan, sums)
        return SharedZeros(placed, known)

    def narrowed(self, cut: LayerCut, expert: Expert, members: Members) -> Expert:
        """One expert narrowed as a plan says, and slimmed if it says that too."""
        plan, one = cut.plan, cut.layer_plan
        served = self._served({old for old, _ in members})
        placed = Expert(*(matrix.to(self._x_ND.device) for matrix in expert))
        assert one.width is not None
        block = channel_block(cut.checkpoint, cut.layer)
        found, _ = narrow_expert(
            placed, plan.narrow, one.width, block, self._x_ND, *served, self._model.act
        )
        if not cut.writes_zeros:
            return found
        if plan.slim == "magnitude":
            return slim_by_magnitude(found, plan, one.sparsity, taken(cut))
        given = (self._x_ND, *served, self._model.act, taken(cut))
        return slim_by_data(found, plan, one.sparsity, *given)

    def serve(self, number: int, expert: Expert) -> None:
        """Add an expert's own outputs, while the stream goes on behind this layer."""
        assert self._layer is not None
        served = self._served({number})
        if self._layer.index < self._last and len(served[0]):
            running = place(expert, self._x_ND)
            add_expert(self._out_ND, self._x_ND, *served, running, self._model.act)

    def leave(self) -> None:
        """Finish the layer."""
        assert self._layer is not None
        if self._layer.index < self._last:
            self._model.add_shared(self._layer.index, self._x_ND, self._out_ND)
            self._state_STD += self._out_ND.view_as(self._state_STD)

    def _served(self, experts: set[int]) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._layer is not None
        assert self._routing is not None
        rows = range(self._routing.logits_NR.shape[1])
        leads = self._layer.redirect or tuple(rows)
        # As if all of them were expert 0, and nobody served the other rows.
        to_one = [0 if leads[row] in experts else None for row in rows]
        return expert_tokens(self._routing, 0, to_one)


class SharedZeros:
    """One expert's zeros at any sparsity, from one set of sums."""

    def __init__(self, expert: Expert, known: dict[Slimming, Known]) -> None:
        """Keep what was found out, by the kind of slimming."""
        self._expert, self._known = expert, known

    def at(self, plan: CutPlan, sparsity: float, taken: Taken = ALL) -> Expert:
        """The expert as a plan of one of the kinds slims it."""
        known = self._known[kind_of(plan)]
        return slim_by_known(self._expert, known, plan, sparsity, taken)


def _known(expert: Expert, plan: CutPlan, sums: Sequence[torch.Tensor]) -> Known:
    """The most that can be done once for all sparsities."""
    if plan.slim == "wanda" and plan.group is None:
        return [
            ranked(matrix, found) for matrix, found in zip(expert, sums, strict=True)
        ]
    return known_of(sums, plan)
