"""Losses of very many plans at once, with zeros as the intact model's inputs suggest.

Experts are outermost: each is read once, for all plans that keep it. Which weights
become zero is decided by one calibration stream, that of the intact model, and not by
each plan's own: ranks and factorizations are shared by all plans and sparsities, and
no plan calibrates. So losses of plans that write zeros by data are estimates, good for
ranking; ``planned`` has the true ones. Plans that write none lose what is said here.

Axes: S sequences, T tokens of a sequence, D hidden, N = S*T tokens.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..calibrate.expert_forward import Routing, add_expert, expert_tokens, place
from ..calibrate.forward import StreamingModel
from ..calibrate.workers import Workers, workers
from ..checkpoint.open import Layer
from ..checkpoint.reader import Expert, read_expert
from ..decide.cut_plan import CutPlan
from ..errors import CheckpointError
from ..progress import Report, ignore
from .intact import IntactStream, SharedZeros, alone
from .layer_cut import LayerCut, Members, layer_cuts
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
from .matrices import taken
from .slim_expert import kind_of, slim_by_magnitude
from .slim_layer import naming, trimmed_routing
from .trimmed import survivor


@dataclass
class _Branch:
    """Plans that agree so far."""

    members: list[int]
    state_STD: torch.Tensor


@dataclass
class _Part:
    """Plans of one branch that do the same to this layer."""

    members: list[int]
    cut: LayerCut
    before_STD: torch.Tensor
    """What enters the experts' residual: shared by the parts of a branch."""
    x_ND: torch.Tensor | None
    routing: Routing | None = None
    out_ND: torch.Tensor | None = None


@torch.no_grad()
def quick_losses(
    model: StreamingModel,
    plans: Sequence[CutPlan],
    texts: Sequence[Text],
    calibration_ST: torch.Tensor | None = None,
    *,
    journal: LossJournal | None = None,
    report: Report = ignore,
    stage: str = "rank",
) -> list[tuple[Loss, ...]]:
    """What each plan's model loses on texts, zeros by the intact model's inputs.

    Experts are not refitted.

    Args:
        model: The input of all plans.
        plans: Checked already.
        texts: Of windows of one length, all tokens predicted.
        calibration_ST: Token ids for the intact model's stream, if a plan slims by
            data.
        journal: Losses known from before, and where new ones go.
        report: Called after every layer of every sweep.
        stage: How progress calls it.

    Raises:
        CalibrationError: A plan needs calibration and there is none.
        RecipeError: A plan slims more than experts, or quantizes.
    """
    journal = journal or LossJournal()
    plans = [plan.unrefitted for plan in plans]
    check_plans(plans, calibration_ST)
    ids_ST = torch.cat([text.ids_ST for text in texts])
    keys = [f"quick {key_of(plan, texts, calibration_ST)}" for plan in plans]

    def sweep(
        some: Sequence[CutPlan], tell: Callable[[int], None]
    ) -> list[tuple[Loss, ...]]:
        return _Sweep(model, some, calibration_ST).losses(ids_ST, texts, tell)

    checkpoint = model.checkpoint
    layer_bytes = checkpoint.tensor_bytes // max(1, model.num_layers)
    # States as large as a layer's weights: each sweep reads all weights again.
    together = plans_together(model, ids_ST.numel(), layer_bytes)
    todo = journal.missing(keys, plans)
    add_losses(journal, todo, together, sweep, checkpoint, report, stage)
    return [journal.losses[key] for key in keys]


class _Sweep:
    """One pass through the layers with some of the plans."""

    def __init__(
        self,
        model: StreamingModel,
        plans: Sequence[CutPlan],
        calibration_ST: torch.Tensor | None,
    ) -> None:
        self.model = model
        self.plans = plans
        self._cuts = [layer_cuts(model.checkpoint, plan) for plan in plans]
        by_data = [
            layer.index
            for layer in model.checkpoint.decoder_layers
            for plan, cuts in zip(plans, self._cuts, strict=True)
            if plan.needs_activations and cuts[layer.index].changes_experts
        ]
        self._intact: IntactStream | None = None
        if by_data and calibration_ST is not None:
            self._intact = IntactStream(model, calibration_ST, last=max(by_data))

    def losses(
        self,
        ids_ST: torch.Tensor,
        texts: Sequence[Text],
        tell: Callable[[int], None],
    ) -> list[tuple[Loss, ...]]:
        state_STD = self.model.embed(ids_ST)
        branches = [_Branch(list(range(len(self.plans))), state_STD)]
        widest = max(layer.width for layer in self.model.checkpoint.layers)
        with workers(self.model.device, widest * state_STD.shape[-1]) as team:
            for layer in self.model.checkpoint.decoder_layers:
                with self.model.holding():
                    branches = self._through(layer, branches, team)
                tell(layer.index + 1)
        found: list[tuple[Loss, ...]] = [()] * len(self.plans)
        for branch in branches:
            sizes = [len(text.ids_ST) for text in texts]
            states = torch.split(branch.state_STD, sizes)
            pairs = zip(texts, states, strict=True)
            losses = tuple(loss_of(self.model, text, state) for text, state in pairs)
            for member in branch.members:
                found[member] = losses
        return found

    def _through(
        self, layer: Layer, branches: Sequence[_Branch], team: Workers
    ) -> list[_Branch]:
        """One layer; a branch whose plans differ in it splits."""
        skipped, parts = self._entered(layer, branches, team)
        intact = self._intact
        if intact is not None:
            intact = intact if intact.enter(layer) else None
        live = [part for part in parts if part.x_ND is not None]
        team.run(self._route, live)
        live = [part for part in live if part.routing is not None]
        self._experts(layer, live, intact, team)
        if intact is not None:
            intact.leave()
        team.run(self._leave, live)
        after = [_Branch(part.members, part.before_STD) for part in parts]
        return _apart([*skipped, *after])

    def _entered(
        self, layer: Layer, branches: Sequence[_Branch], team: Workers
    ) -> tuple[list[_Branch], list[_Part]]:
        """Every branch run up to the experts; those that drop the block as they are."""
        skipped: list[_Branch] = []
        parts: list[list[_Part]] = []
        jobs: list[tuple[torch.Tensor, list[_Part]]] = []
        for branch in branches:
            leave, groups = split_at(branch.members, self._cuts, layer.index)
            state_STD = branch.state_STD
            if leave:
                skipped.append(_Branch(leave, state_STD))
                # enter works in place, but these keep the state before it.
                state_STD = state_STD.clone()
            stay = [
                _Part(members, self._cuts[members[0]][layer.index], state_STD, None)
                for members in groups
            ]
            if stay:
                jobs.append((state_STD, stay))
            parts.append(stay)

        def enter(job: tuple[torch.Tensor, list[_Part]]) -> None:
            state_STD, stay = job
            state_STD, x_ND = self.model.enter(layer.index, state_STD)
            for part in stay:
                part.before_STD, part.x_ND = state_STD, x_ND

        team.run(enter, jobs)
        return skipped, [part for stay in parts for part in stay]

    def _route(self, part: _Part) -> None:
        """Route a part's tokens, or settle what becomes of it without experts."""
        assert part.x_ND is not None
        trimmed = part.cut.trimmed
        if not trimmed.has_moe:
            if trimmed.norm_only:
                part.before_STD = part.before_STD + part.x_ND.view_as(part.before_STD)
            return
        try:
            part.routing = trimmed_routing(self.model, part.cut, part.x_ND)
        except CheckpointError:
            # This plan's model overflowed; its loss will not be finite either.
            part.before_STD = torch.full_like(part.before_STD, math.nan)
            return
        part.out_ND = torch.zeros_like(part.x_ND)

    def _leave(self, part: _Part) -> None:
        assert part.x_ND is not None
        assert part.out_ND is not None
        self.model.add_shared(part.cut.index, part.x_ND, part.out_ND)
        # A tensor of its own: other parts read the one before.
        part.before_STD = part.out_ND.view_as(part.before_STD).add_(part.before_STD)

    def _experts(
        self,
        layer: Layer,
        parts: Sequence[_Part],
        intact: IntactStream | None,
        team: Workers,
    ) -> None:
        """All experts of a layer, in the input's order, each for all who keep it."""
        users: dict[tuple[int, Members], list[tuple[_Part, int]]] = {}
        if intact is not None:
            # Its stream needs those too that no plan keeps.
            for number in range(layer.num_experts):
                users[number, alone(number)] = []
        for part in parts:
            for new, kept in enumerate(part.cut.keep):
                users.setdefault((kept, part.cut.members(new)), []).append((part, new))
        for kept, members in sorted(users, key=lambda one: one[0]):
            found = users[kept, members]
            if found:
                part, new = found[0]
                expert = survivor(part.cut, new)
            else:
                expert = read_expert(self.model.checkpoint, layer, kept)
            jobs = self._uses(expert, members, found, intact)
            if intact is not None and members == alone(kept):
                jobs.append(partial(intact.serve, kept, expert))
            team.run(_do, jobs)

    def _uses(
        self,
        expert: Expert,
        members: Members,
        users: Sequence[tuple[_Part, int]],
        intact: IntactStream | None,
    ) -> list[Callable[[], None]]:
        """Running an expert for all who keep it; zeros of one kind are made once."""
        jobs: list[Callable[[], None]] = []
        slimming: dict[Hashable, list[tuple[_Part, int]]] = {}
        for user in users:
            how = _how(user[0].cut)
            if how is None:
                jobs.append(partial(self._serve, [user], lambda: expert))
            else:
                slimming.setdefault(how, []).append(user)
        cuts = [group[0][0].cut for group in slimming.values()]
        by_data = [cut for cut in cuts if _shares(cut)]
        zeros = None
        if by_data and intact is not None:
            with naming(users[0][0].cut, users[0][1]):
                zeros = intact.zeros(expert, members, [cut.plan for cut in by_data])
        for group in slimming.values():
            make = partial(_changed, group, expert, members, zeros, intact)
            jobs.append(partial(self._serve, group, make))
        return jobs

    def _serve(
        self, users: Sequence[tuple[_Part, int]], make: Callable[[], Expert]
    ) -> None:
        """Add an expert's outputs for its tokens, of each part."""
        placed = None
        for part, new in users:
            assert part.routing is not None
            assert part.x_ND is not None
            assert part.out_ND is not None
            served = expert_tokens(part.routing, new, part.cut.trimmed.redirect)
            if len(served[0]) == 0:
                continue
            if placed is None:
                placed = place(make(), part.x_ND)
            add_expert(part.out_ND, part.x_ND, *served, placed, self.model.act)


def _apart(branches: list[_Branch]) -> list[_Branch]:
    """Branches with states of their own: the next layer works in place."""
    seen: set[int] = set()
    for branch in branches:
        if branch.state_STD.data_ptr() in seen:
            branch.state_STD = branch.state_STD.clone()
        seen.add(branch.state_STD.data_ptr())
    return branches


def _changed(
    users: Sequence[tuple[_Part, int]],
    expert: Expert,
    members: Members,
    zeros: SharedZeros | None,
    intact: IntactStream | None,
) -> Expert:
    """An expert narrowed, slimmed or both, as some parts all have it."""
    cut, new = users[0][0].cut, users[0][1]
    with naming(cut, new):
        if cut.layer_plan.narrows and intact is not None:
            return intact.narrowed(cut, expert, members)
        sparsity = cut.layer_plan.sparsity
        if zeros is None or not _shares(cut):
            return slim_by_magnitude(expert, cut.plan, sparsity, taken(cut))
        return zeros.at(cut.plan, sparsity, taken(cut))


def _shares(cut: LayerCut) -> bool:
    """Whether its zeros are taken from what all sparsities share."""
    by_data = cut.plan.needs_activations and cut.writes_zeros
    return by_data and not cut.layer_plan.narrows


def _how(cut: LayerCut) -> Hashable:
    """By what a plan changes a layer's experts; None: it does not."""
    plan, one = cut.plan, cut.layer_plan
    if not cut.changes_experts:
        return None
    narrows = (one.width, plan.narrow) if one.narrows else None
    return kind_of(plan), plan.slim_exclude, one.sparsity, narrows


def _do(job: Callable[[], None]) -> None:
    job()
