"""The losses of models that plans would make, with nothing written.

All plans run side by side, layer by layer, so that the weights are read once however
many there are. Plans that agree on all layers so far share their hidden states: a
sensitivity curve costs the layers above the one it varies, and no more.

Axes: S sequences, T tokens of a sequence, D hidden, N = S*T tokens.
"""

import hashlib
import json
import math
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field

from ..calibrate.data import sha256_of
from ..calibrate.expert_forward import add_expert, expert_tokens, place
from ..calibrate.forward import StreamingModel
from ..calibrate.memory import release_freed
from ..calibrate.workers import Workers, workers
from ..checkpoint.open import Layer
from ..decide.cut_plan import CutPlan
from ..errors import CalibrationError, CheckpointError, OutputError, RecipeError
from ..files.atomic import writing
from ..files.json_file import parse_json
from ..files.regular import MIB, Kind, read_file
from ..progress import Progress, Report, ignore
from .layer_cut import LayerCut, layer_cuts
from .slim_layer import slimmed_experts, trimmed_routing
from .trimmed import survivor

STATE_BYTES = 1 << 30
"""Of hidden states held at once; more plans than fit take further sweeps."""
LOSSES = Kind(name="journal of losses", max_bytes=256 * MIB, error=OutputError)


@dataclass(frozen=True)
class Text:
    """Tokens that models are judged on."""

    ids_ST: torch.Tensor
    targets_ST: torch.Tensor | None = None
    """What is to be predicted, ``NO_TARGET`` elsewhere; everything if None. With
    targets of its own a text is also judged by its exact matches."""


@dataclass(frozen=True)
class Loss:
    """Summed next-token negative log-likelihood in nats, and how many tokens."""

    nll: float
    tokens: int
    exact: int = 0
    """Sequences of a text with targets that greedy decoding gets right."""

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens


@dataclass
class _Branch:
    """Plans that agree so far, and the hidden states they share."""

    members: list[int]
    states: list[torch.Tensor]
    """Hidden states [S, T, D] of each text, then of the calibration if any slims."""


@dataclass
class _Split:
    """Plans of a branch that agree in one layer too, on their way through it."""

    members: list[int]
    states: list[torch.Tensor]
    cut: LayerCut | None = None
    """None: they drop the block."""
    inputs: Sequence[torch.Tensor] = ()
    """What router and experts see [N, D]; other splits read them too."""


class _Line(BaseModel):
    """A line of the journal; a loss that is not finite is null there."""

    key: str
    losses: tuple[
        tuple[
            Annotated[float, Field(ge=0.0)] | None,
            Annotated[int, Field(ge=1)],
            Annotated[int, Field(ge=0)],
        ],
        ...,
    ]


class LossJournal:
    """Losses found so far, one line each, so that a killed search can continue."""

    def __init__(self, path: Path | None = None) -> None:
        """Read what is there; a line cut short by a kill is left out."""
        self._path = path
        self.losses: dict[str, tuple[Loss, ...]] = {}
        """By what ``planned_losses`` knows a plan by."""
        if path is None or not path.is_file():
            return
        for line in read_file(path, LOSSES).split(b"\n"):
            with suppress(ValueError):  # of pydantic too
                entry = _Line.model_validate(parse_json(line))
                self.losses[entry.key] = tuple(
                    Loss(math.inf if nll is None else nll, tokens, exact)
                    for nll, tokens, exact in entry.losses
                )

    def add(self, key: str, losses: tuple[Loss, ...]) -> None:
        """Keep what a plan loses on each text.

        Raises:
            OutputError: It cannot be written.
        """
        self.losses[key] = losses
        if self._path is None:
            return
        rows = [
            (one.nll if math.isfinite(one.nll) else None, one.tokens, one.exact)
            for one in losses
        ]
        line = json.dumps({"key": key, "losses": rows})
        with writing(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                # A line of its own, even behind one that was cut short.
                file.write(("\n" if file.tell() else "") + line)


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
    todo = [at for at, key in enumerate(keys) if key not in journal.losses]
    inputs = [text.ids_ST for text in texts]
    if calibration_ST is not None and any(plans[at].needs_activations for at in todo):
        inputs.append(calibration_ST)
    width = int(model.checkpoint.config[model.checkpoint.arch.config.hidden])
    # At worst each plan ends on a branch of its own, with states of every text, what
    # the experts read and what they give.
    size = 3 * sum(ids.numel() for ids in inputs) * width * model.dtype.itemsize
    together = max(1, STATE_BYTES // size)
    sweeps = math.ceil(len(todo) / together)
    for sweep in range(sweeps):
        chunk = todo[sweep * together : (sweep + 1) * together]
        run = _Sweep(model, [plans[at] for at in chunk], report, stage, sweep, sweeps)
        for at, found in zip(chunk, run.losses(inputs, texts), strict=True):
            journal.add(keys[at], found)
    return [journal.losses[key] for key in keys]


def check_plans(plans: Sequence[CutPlan], calibration_ST: torch.Tensor | None) -> None:
    """Refuse plans whose losses cannot be found without writing them.

    Raises:
        CalibrationError: A plan needs calibration and there is none.
        RecipeError: A plan slims more than experts, or quantizes.
    """
    if any(plan.is_slimmed and plan.slim_parts != ("experts",) for plan in plans):
        raise RecipeError(
            "plans are judged with zeros in experts alone; set slim.scope: [experts]."
        )
    if any(plan.is_quantized for plan in plans):
        raise RecipeError("plans are judged unquantized; leave out quantize.")
    if any(plan.needs_activations for plan in plans) and calibration_ST is None:
        raise CalibrationError("a plan slims by data: calibration tokens are needed.")


def key_of(
    plan: CutPlan, texts: Sequence[Text], calibration_ST: torch.Tensor | None
) -> str:
    """Identifies a loss: the plan's effect on which model, judged by which tokens."""
    # Nothing of recipe or prediction: plans of the same effect share a loss.
    slim = (plan.slim, plan.pattern, plan.router_weighted, plan.slim_parts)
    layers = [layer.model_dump_json() for layer in plan.layers]
    tokens = [sha256_of(text.ids_ST) for text in texts]
    tokens += [
        sha256_of(text.targets_ST) for text in texts if text.targets_ST is not None
    ]
    # Other plans have the same loss whatever the calibration.
    if plan.needs_activations and calibration_ST is not None:
        tokens.append(sha256_of(calibration_ST))
    said = (plan.model.fingerprint, plan.routing, slim, plan.slim_exclude, layers)
    narrows = plan.narrow.model_dump_json() if plan.is_narrowed else None
    return hashlib.sha256(repr((said, narrows, tokens)).encode()).hexdigest()


class _Sweep:
    """One pass through the layers with some of the plans."""

    def __init__(
        self,
        model: StreamingModel,
        plans: Sequence[CutPlan],
        report: Report,
        stage: str,
        sweep: int,
        sweeps: int,
    ) -> None:
        self.model = model
        self.checkpoint = model.checkpoint
        self.plans = plans
        self._cuts = [layer_cuts(model.checkpoint, plan) for plan in plans]
        self._report = report
        self._stage = stage
        self._sweep, self._sweeps = sweep, sweeps

    def losses(
        self, inputs: Sequence[torch.Tensor], texts: Sequence[Text]
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
                self._tell(layer.index + 1)
        found: list[tuple[Loss, ...]] = [()] * len(self.plans)
        for branch in branches:
            states = branch.states[: len(texts)]
            pairs = zip(texts, states, strict=True)
            # Norm and head run once per branch, not once per plan.
            losses = tuple(self._loss(text, state) for text, state in pairs)
            for member in branch.members:
                found[member] = losses
        return found

    def _loss(self, text: Text, state: torch.Tensor) -> Loss:
        targets_ST = text.ids_ST if text.targets_ST is None else text.targets_ST
        nll, tokens = self.model.nll(state, targets_ST)
        exact = 0
        if text.targets_ST is not None:
            exact = self.model.exact_matches(state, targets_ST)
        return Loss(nll if math.isfinite(nll) else math.inf, tokens, exact)

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
        groups: dict[Hashable, list[int]] = {}
        skipped: list[int] = []
        for member in branch.members:
            if self._cuts[member][layer.index].drops_block:
                skipped.append(member)
            else:
                groups.setdefault(self._what(layer, member), []).append(member)
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
        for number, members in enumerate(groups.values()):
            last = number == len(groups) - 1
            # _moe adds in place: the last split takes the states, the others a copy.
            own = states if last else [state.clone() for state in states]
            cut = self._cuts[members[0]][layer.index]
            splits.append(_Split(members, own, cut, inputs))
        return splits

    def _what(self, layer: Layer, member: int) -> Hashable:
        """Everything a plan says about one layer."""
        plan, cut = self.plans[member], self._cuts[member][layer.index]
        how = (plan.slim, plan.pattern, plan.router_weighted, plan.slim_exclude)
        slims = how if cut.writes_zeros else None
        narrows = plan.narrow if cut.layer_plan.narrows else None
        return plan.routing, cut.layer_plan, slims, narrows

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
            # The calibration's input is the last one; see planned_losses.
            slimmed = slimmed_experts(
                cut, model if by_data else None, inputs[-1] if by_data else None
            )
        inputs, routings = inputs[:wanted], routings[:wanted]
        outputs = [torch.zeros_like(x_ND) for x_ND in inputs]
        for new in range(trimmed.num_experts):
            # The iterator yields every expert in order, with or without tokens here.
            expert = next(slimmed).expert if slimmed else None
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

    def _tell(self, layers: int) -> None:
        release_freed()
        count = len(self.checkpoint.decoder_layers)
        total = self.checkpoint.tensor_bytes
        done = self._sweep * count + layers
        self._report(
            Progress(
                stage=self._stage,
                layer=done,
                layers=count * self._sweeps,
                bytes_done=total * done // count,
                bytes_total=total * self._sweeps,
            )
        )
