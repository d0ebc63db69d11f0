"""Successive halving over candidate plans, by the held-out loss of each.

Nothing is written: plans are judged in the streaming forward. Every loss goes into a
journal, so that a killed search continues where it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..calibrate.data import load_heldout
from ..calibrate.forward import StreamingModel
from ..calibrate.stats import Stats
from ..checkpoint.file_state import check_states
from ..checkpoint.open import Checkpoint
from ..cut.planned import Loss, LossJournal, Text, planned_losses
from ..decide.cut_plan import CutPlan
from ..decide.required_stats import needed_statistics
from ..decide.sensitivity import rule
from ..errors import RecipeError
from ..recipes.schema import ExpertStage, Recipe, SlimStage, TuneStage
from ..stages.measure import collect, tokens_of
from ..stages.plan import plan
from ..stages.preflight import RunOptions
from ..stages.probe import with_owl, with_sensitivity
from .candidates import Candidate, refinements, structures, zeros_alone
from .narrowings import narrowings

RUNGS = (0.25, 0.5)
"""Shares of the tokens on which all, then the better half, are judged first."""


@dataclass(frozen=True)
class Judged:
    """A candidate, its plan, and what the plan's model loses."""

    name: str
    plan: CutPlan
    loss: Loss
    final: bool
    """Judged on all held-out tokens, not only on the first of them."""

    @property
    def file_bytes(self) -> int:
        """Size of the output."""
        return self.plan.predicted.file_bytes if self.plan.predicted else 0


@dataclass(frozen=True)
class Tuned:
    """What a search found."""

    intact: Judged
    judged: tuple[Judged, ...]
    """Best first; those judged on fewer tokens behind all others."""
    left_out: tuple[tuple[str, str], ...]
    """Candidates that cannot reach the size, and why."""

    @property
    def best(self) -> Judged:
        """The winner."""
        return self.judged[0]


def tune(
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: RunOptions,
    *,
    work: Path | None = None,
) -> Tuned:
    """Find the plan that loses least at a size.

    Args:
        checkpoint: The model.
        recipe: Its ``tune`` says what to vary; its ``total_sparsity`` or ``max_bytes``
            is the size.
        options: How to run.
        work: A folder for what a killed search needs to continue; the caller's to
            delete.

    Raises:
        RecipeError: No size is given, or no candidate can reach it.
    """
    if not recipe.size_asked:
        raise RecipeError(f"recipe {recipe.name}: tune needs --total or --bytes.")
    return _Search(checkpoint, recipe, options, work).run()


class _Search:
    """One search: what its steps share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        options: RunOptions,
        work: Path | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.settings = recipe.tune or TuneStage()
        self.options = options
        self.max_bytes = recipe.max_bytes
        self.work = work
        self.model = StreamingModel(checkpoint, options.device)
        self.journal = LossJournal(None if work is None else work / "losses.jsonl")
        self.tokens = tokens_of(checkpoint, recipe.calibration)
        self.heldout = load_heldout(checkpoint, recipe.calibration)
        self.left_out: list[tuple[str, str]] = []

    def run(self) -> Tuned:
        candidates = structures(self.recipe, self.checkpoint.layers)
        stats = self._measured(candidates)
        plans = self._planned(candidates, stats)
        if not plans:
            name, why = self.left_out[0]
            raise RecipeError(f"no candidate reaches the size; {name}: {why}")
        early: list[Judged] = []
        for share in RUNGS:
            judged = self._judge(plans, share)
            better, worse = self._split(judged, (len(judged) + 1) // 2)
            early += worse
            plans = {one.name: plans[one.name] for one in better}
        judged = self._judge(plans, 1.0)
        refined = self._refined(self._split(judged, 0)[0], stats)
        # What was judged on all windows is in the journal: only refinements run.
        judged = self._judge({**plans, **refined}, 1.0)
        early.sort(key=lambda one: (one.loss.mean, one.file_bytes, one.name))
        check_states(self.checkpoint.folder, self.checkpoint.files)
        return Tuned(self._intact(), tuple(judged + early), tuple(self.left_out))

    def _measured(self, candidates: Sequence[Candidate]) -> dict[str, Stats]:
        """The statistics of each rule by which experts leave."""
        recipes = [candidate.recipe for candidate in candidates]
        stats = collect(self.checkpoint, recipes, self.tokens, self.options, self.work)
        found: dict[str, Stats] = {}
        for recipe in recipes:
            # Curves hold for one rule by which experts leave; its recipes share them.
            key = rule(recipe)
            if key in found or "sensitivity_P2" not in needed_statistics(recipe):
                continue
            found[key] = with_sensitivity(
                self.model,
                recipe,
                stats,
                self.heldout,
                self.journal,
                self.options.report,
            )
        return {rule(recipe): found.get(rule(recipe), stats) for recipe in recipes}

    def _planned(
        self, candidates: Sequence[Candidate], stats: Mapping[str, Stats]
    ) -> dict[str, CutPlan]:
        plans = {}
        for candidate in candidates:
            try:
                # Where no expert leaves, any rule's will do: they are of the same pass.
                first = next(iter(stats.values()))
                known = stats.get(rule(candidate.recipe), first)
                plans[candidate.name] = self._plan(candidate.recipe, known)
            except RecipeError as error:
                # One structure that cannot reach the size does not end the search.
                self.left_out.append((candidate.name, str(error)))
        return plans

    def _plan(self, recipe: Recipe, stats: Stats) -> CutPlan:
        return plan(self.checkpoint, recipe, stats, self.options.max_shard_bytes)

    def _judge(self, plans: Mapping[str, CutPlan], share: float) -> list[Judged]:
        """Judge plans on a share of the windows; best first."""
        heldout_ST, calibration_ST = (
            # The first windows: those of a rung are among the next one's.
            tokens.ids_ST[: max(1, round(share * len(tokens.ids_ST)))]
            for tokens in (self.heldout, self.tokens)
        )
        losses = self._losses(list(plans.values()), heldout_ST, calibration_ST)
        judged = [
            Judged(name, found, loss, final=share == 1.0)
            for (name, found), loss in zip(plans.items(), losses, strict=True)
        ]
        # Ties by size, then name: a repeated search ranks alike.
        return sorted(judged, key=lambda one: (one.loss.mean, one.file_bytes, one.name))

    def _split(
        self, judged: Sequence[Judged], count: int
    ) -> tuple[list[Judged], list[Judged]]:
        """The better ones, ``count`` or as many as finalists, and the others.

        Zeros alone are never among the others: they change least, and lead where
        little has to go, but with few tokens that is hard to see.
        """
        count = max(self.settings.finalists, count)
        simplest = zeros_alone(self.settings)
        rest = judged[count:]
        better = [*judged[:count], *(one for one in rest if one.name == simplest)]
        return better, [one for one in rest if one.name != simplest]

    def _losses(
        self,
        plans: Sequence[CutPlan],
        heldout_ST: torch.Tensor,
        calibration_ST: torch.Tensor,
    ) -> list[Loss]:
        found = planned_losses(
            self.model,
            plans,
            [Text(heldout_ST)],
            calibration_ST,
            journal=self.journal,
            report=self.options.report,
        )
        return [loss for (loss,) in found]

    def _refined(
        self, better: Sequence[Judged], stats: Mapping[str, Stats]
    ) -> dict[str, CutPlan]:
        """The best structures with other ways of writing their zeros."""
        plans = {}
        structures = [Candidate(one.name, one.plan.recipe) for one in better]
        ways = [refinements(one, self.settings) for one in structures]
        for candidate in (one for found in ways for one in found):
            recipe = candidate.recipe
            known = stats[rule(recipe)]
            if recipe.slim.allocation == "owl":
                report = self.options.report
                known = with_owl(self.model, recipe, known, self.tokens, report)
            decided = plan(self.checkpoint, recipe, known, self.options.max_shard_bytes)
            if self._fits(decided):
                plans[candidate.name] = decided
        narrower = narrowings(self.recipe, structures, self.settings)
        return plans | self._planned(narrower, stats)

    def _fits(self, decided: CutPlan) -> bool:
        size = decided.predicted.file_bytes if decided.predicted else 0
        return self.max_bytes is None or size <= self.max_bytes

    def _intact(self) -> Judged:
        recipe = Recipe(
            name="intact",
            experts=ExpertStage(method="none"),
            slim=SlimStage(method="none"),
            calibration=self.recipe.calibration,
        )
        whole = plan(self.checkpoint, recipe, None, self.options.max_shard_bytes)
        loss = self._losses([whole], self.heldout.ids_ST, self.tokens.ids_ST)[0]
        return Judged("intact", whole, loss, final=True)
