"""The losses of models that plans would make, with nothing written.

All plans run side by side, layer by layer, so that the weights are read once however
many there are. Plans that agree on all layers so far share their hidden states: a
sensitivity curve costs the layers above the one it varies, and no more.

Axes: S sequences, T tokens of a sequence, D hidden, N = S*T tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..calibrate.expert_forward import add_expert, expert_tokens, place
from ..calibrate.forward import StreamingModel
from ..calibrate.workers import Workers, workers
from ..checkpoint.open import Layer
from ..decide.cut_plan import CutPlan
from ..errors import CheckpointError
from ..progress import Report, ignore
from .layer_cut import LayerCut, layer_cuts
from .losses import (
    Loss,
    LossJournal,
    Text,
    add_losses,
    check_plans,
    key_of,
    loss_of,
    plans_together,
    split_at,
)
from .slim_layer import slimmed_experts, trimmed_routing
from .trimmed import survivor


@dataclass
class _Branch:
    """Plans that agree so far, and the hidden states they share."""

    members: list[int]
    states: list[torch.Tensor]
    """Hidden states [S, T, D] of each text, then of the calibration if any slims."""


@dataclass
class _Split:
    """Plans of a branch that do the same to one layer, while it runs."""

    members: list[int]
    states: list[torch.Tensor]
    cut: LayerCut | None = None
    """None: they drop the block."""
    inputs: Sequence[torch.Tensor] = ()
    """What router and experts see [N, D]; other splits read them too."""


@torch.no_grad()
def planned_losses(
    model: StreamingModel,
    plans: Sequence[CutPlan],
    texts: Sequence[Text],
    calibration_ST: torch.Tensor | None = None,
    *,
    journal: LossJournal | None = None,
    report: Report = ignore,
    stage: str = "judge",
) -> list[tuple[Loss, ...]]:
    """What each plan's model loses on held-out texts, before experts are refitted.

    Args:
        model: The input of all plans.
        plans: Checked already; they may slim by data if there is calibration.
        texts: What is predicted.
        calibration_ST: Token ids that slimming is calibrated on.
        journal: Losses known from before, and where new ones go.
        report: Called after every layer of every sweep.
        stage: How progress calls it.

    Returns:
        For each plan its loss on each text, infinite where it is not finite.

    Raises:
        CalibrationError: A plan needs calibration and there is none.
        RecipeError: A plan slims more than experts.
    """
    journal = journal or LossJournal()
    # Refits only help, and take longer than all the rest of judging.
    plans = [plan.unrefitted for plan in plans]
    check_plans(plans, calibration_ST)
    keys = [key_of(plan, texts, calibration_ST) for plan in plans]
    todo = journal.missing(keys, plans)
    inputs = [text.ids_ST for text in texts]
    by_data = any(plan.needs_activations for plan in todo.values())
    if calibration_ST is not None and by_data:
        inputs.append(calibration_ST)

    def sweep(
        some: Sequence[CutPlan], tell: Callable[[int], None]
    ) -> list[tuple[Loss, ...]]:
        return _Sweep(model, some).losses(inputs, texts, tell)

    together = plans_together(model, sum(ids.numel() for ids in inputs))
    add_losses(journal, todo, together, sweep, model.checkpoint, report, stage)
    return [journal.losses[key] for key in keys]


class _Sweep:
    """One pass through the layers with some of the plans."""

    def __init__(self, model: StreamingModel, plans: Sequence[CutPlan]) -> None:
        self.model = model
        self.checkpoint = model.checkpoint
        self.plans = plans
        self._cuts = [layer_cuts(model.checkpoint, plan) for plan in plans]

    def losses(
        self,
        inputs: Sequence[torch.Tensor],
        texts: Sequence[Text],
        tell: Callable[[int], None],
    ) -> list[tuple[Loss, ...]]:
        states = [self.model.embed(ids_ST) for ids_ST in inputs]
        # No plan changes the embedding: all begin on one branch.
        branches = [_Branch(list(range(len(self.plans))), states)]
        widest = max(layer.width for layer in self.checkpoint.layers)
        with workers(self.model.device, widest * states[0].shape[-1]) as team:
            # MTP layers add nothing to the next token's logits.
            for layer in self.checkpoint.decoder_layers:
                with self.model.holding():
                    branches = self._all_through(layer, branches, len(texts), team)
                tell(layer.index + 1)
        found: list[tuple[Loss, ...]] = [()] * len(self.plans)
        for branch in branches:
            states = branch.states[: len(texts)]
            pairs = zip(texts, states, strict=True)
            # Norm and head run once per branch, not once per plan.
            losses = tuple(loss_of(self.model, text, state) for text, state in pairs)
            for member in branch.members:
                found[member] = losses
        return found

    def _all_through(
        self, layer: Layer, branches: list[_Branch], texts: int, team: Workers
    ) -> list[_Branch]:
        """One layer, side by side: first up to the experts, then each plan's own."""
        found: dict[int, list[_Split]] = {}

        def enter(at: int) -> None:
            # The calibration has done its work where no plan needs it any more.
            if not self._calibrates(branches[at].members, layer.index):
                del branches[at].states[texts:]
            found[at] = self._entered(layer, branches[at])

        def leave(split: _Split) -> None:
            # What the last such layer makes of the calibration, nobody reads.
            go_on = self._calibrates(split.members, layer.index + 1)
            split.states = self._moe(split, None if go_on else texts)

        team.run(enter, range(len(branches)))
        splits = [split for at in range(len(branches)) for split in found[at]]
        team.run(leave, [split for split in splits if split.cut is not None])
        return [_Branch(split.members, split.states) for split in splits]

    def _calibrates(self, members: Sequence[int], first: int) -> bool:
        """Whether a plan changes experts by data in layer ``first`` or behind it."""
        return any(
            self.plans[member].needs_activations
            and any(cut.changes_experts for cut in self._cuts[member][first:])
            for member in members
        )

    def _entered(self, layer: Layer, branch: _Branch) -> list[_Split]:
        """A branch up to the experts of a layer, split where its plans differ there."""
        skipped, groups = split_at(branch.members, self._cuts, layer.index)
        splits = [_Split(skipped, branch.states)] if skipped else []
        if not groups:
            return splits
        states = branch.states
        # enter works in place, but skipped plans go on with the states before it.
        if skipped:
            states = [state.clone() for state in states]
        # Plans differ in the experts, so what comes before them runs once for all.
        entered = [self.model.enter(layer.index, state) for state in states]
        states = [state for state, _ in entered]
        inputs = [x_ND for _, x_ND in entered if x_ND is not None]
        for number, members in enumerate(groups):
            last = number == len(groups) - 1
            # _moe adds in place: the last split takes the states, the others a copy.
            own = states if last else [state.clone() for state in states]
            cut = self._cuts[members[0]][layer.index]
            splits.append(_Split(members, own, cut, inputs))
        return splits

    def _moe(self, split: _Split, wanted: int | None) -> list[torch.Tensor]:
        """The states behind the experts, of the first ``wanted`` inputs; None: all."""
        cut, inputs = split.cut, split.inputs
        assert cut is not None
        trimmed, states = cut.trimmed, split.states[:wanted]
        if not trimmed.has_moe:
            if trimmed.norm_only:
                for state, x_ND in zip(states, inputs[:wanted], strict=True):
                    state += x_ND.view_as(state)
            return states
        model = self.model
        try:
            routings = [trimmed_routing(model, cut, x_ND) for x_ND in inputs]
        except CheckpointError:
            # This plan's model overflowed; its loss will not be finite either.
            return [torch.full_like(state, math.nan) for state in states]
        slimmed = None
        if cut.changes_experts:
            by_data = cut.plan.needs_activations
            slimmed = slimmed_experts(
                cut,
                model if by_data else None,
                # The calibration's input is the last one; see planned_losses.
                inputs[-1] if by_data else None,
                routings[-1] if by_data else None,
                range(trimmed.num_experts),
            )
        inputs, routings = inputs[:wanted], routings[:wanted]
        outputs = [torch.zeros_like(x_ND) for x_ND in inputs]
        for new in range(trimmed.num_experts):
            # The iterator yields every expert in order, with or without tokens here.
            expert = next(slimmed)[1] if slimmed else None
            for x_ND, routing, out_ND in zip(inputs, routings, outputs, strict=True):
                served = expert_tokens(routing, new, trimmed.redirect)
                if len(served[0]) == 0:
                    continue
                if expert is None:
                    expert = survivor(cut, new)
                add_expert(out_ND, x_ND, *served, place(expert, x_ND), model.act)
        for state, x_ND, out_ND in zip(states, inputs, outputs, strict=True):
            model.add_shared(cut.index, x_ND, out_ND)
            state += out_ND.view_as(state)
        return states
