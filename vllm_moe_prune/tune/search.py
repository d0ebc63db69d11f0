"""Which plan loses least at a size: all are ranked by estimates, the best few judged.

Nothing is written: plans run in the streaming forward. Estimates take their zeros from
the intact model's calibration (``cut/quick.py``), so they calibrate nothing and share
what is known of every expert; only finalists are calibrated and judged as they would
be cut. Several sizes are one search: they share the measurement and every sweep.
Losses go into a journal, so that a killed search continues where it was.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ..calibrate.data import load_heldout
from ..calibrate.forward import StreamingModel
from ..calibrate.perplexity import perplexity_of
from ..calibrate.stats import Stats
from ..checkpoint.file_state import check_states
from ..checkpoint.open import Checkpoint
from ..cut.losses import Loss, LossJournal, Text
from ..cut.planned import planned_losses
from ..cut.quick import quick_losses
from ..decide.cut_plan import CutPlan, trimming
from ..decide.required_stats import needed_statistics
from ..decide.sensitivity import rule
from ..errors import RanksError, RecipeError
from ..progress import Progress, Report
from ..recipes.schema import ExpertStage, Recipe, SlimStage, TuneStage
from ..stages.measure import collect, tokens_of
from ..stages.plan import plan
from ..stages.preflight import RunOptions, check_ranks
from ..stages.probe import judging_model, with_owl, with_sensitivity
from .candidates import Candidate, refinements, structures, zeros_alone
from .judged import (
    ESTIMATED,
    FINAL,
    FIRST,
    RANKED,
    REFINED,
    Found,
    Judged,
    Tuned,
    better_half,
    distinct,
)
from .narrowings import narrowings
from .sizes import Size, size_of, sized


class _TimeIsUp(Exception):
    """Ends a search between two layers."""


def tune(
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: RunOptions,
    *,
    work: Path | None = None,
) -> Tuned:
    """Find the plan that loses least at the recipe's own size; see ``tune_sizes``."""
    sizes = [size_of(recipe)]
    return tune_sizes(checkpoint, recipe, options, sizes, work=work)[0]


def tune_sizes(
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: RunOptions,
    sizes: Sequence[Size],
    *,
    work: Path | None = None,
    minutes: float | None = None,
    started: Callable[[], None] = lambda: None,
) -> list[Tuned]:
    """Find the plans that lose least, one for each size.

    Args:
        checkpoint: The model.
        recipe: Its ``tune`` says what to vary.
        options: How to run.
        sizes: What the plans are to come to.
        work: A folder for what a killed search needs to continue; the caller's to
            delete.
        minutes: When to stop with the best so far.
        started: Called when the texts have been read, before anything is run.

    Raises:
        RecipeError: No candidate can reach a size, or time was up before any was
            ranked.
    """
    search = _Search(checkpoint, recipe, options, sizes, work, minutes)
    started()
    return search.run()


class _Search:
    """One search: what its steps share."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        options: RunOptions,
        sizes: Sequence[Size],
        work: Path | None,
        minutes: float | None,
    ) -> None:
        if minutes is not None and options.ranks.size > 1:
            raise RanksError(
                "--minutes goes by each process's own clock. Leave it out, or start "
                "tune without torchrun."
            )
        self.until = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.checkpoint = checkpoint
        self.recipe = recipe
        self.settings = recipe.tune or TuneStage()
        self.options = options
        self.work = work
        self.model = StreamingModel(checkpoint, options.device)
        self.ranking = judging_model(checkpoint, options.device)
        self.tokens = tokens_of(checkpoint, recipe.calibration)
        self.heldout = load_heldout(checkpoint, recipe.calibration)
        asked = self.settings.model_dump_json(), tuple(sizes), self.heldout.sha256
        check_ranks(checkpoint, options, self.tokens, search=asked)
        if work is not None:
            options.ranks.check_shared(work.absolute().parent)
        kept = None if work is None else work / "losses.jsonl"
        self.journal = LossJournal(kept, options.ranks)
        self.found = [Found(size) for size in sizes]
        self._outliers: dict[float, Stats] = {}
        """By OWL's threshold."""

    def run(self) -> list[Tuned]:
        candidates = {
            at: structures(sized(self.recipe, one.size), self.checkpoint.layers)
            for at, one in enumerate(self.found)
        }
        complete = True
        try:
            stats = self._measured(candidates[0])
            self._rank(candidates, stats)
            self._refine(stats)
            self._judge(stats)
        except _TimeIsUp:
            complete = False
        if not all(one.judged for one in self.found):
            raise RecipeError(
                "time was up before any candidate was ranked. Repeat the command to "
                "continue, with more --minutes."
            )
        intact = self._intact()
        check_states(self.checkpoint.folder, self.checkpoint.files)
        return [
            Tuned(
                one.size,
                intact,
                tuple(one.best(ESTIMATED)),
                tuple(one.left_out),
                complete,
            )
            for one in self.found
        ]

    def _measured(self, candidates: Sequence[Candidate]) -> dict[str, Stats]:
        """The statistics of each rule by which experts leave; sizes share them."""
        recipes = [candidate.recipe for candidate in candidates]
        options = dataclasses.replace(self.options, report=self._tell)
        stats = collect(self.checkpoint, recipes, self.tokens, options, self.work)
        found: dict[str, Stats] = {}
        for recipe in recipes:
            # Curves hold for one rule by which experts leave; its recipes share them.
            key = rule(recipe)
            if key in found or "sensitivity_P2" not in needed_statistics(recipe):
                continue
            found[key] = with_sensitivity(
                self.ranking, recipe, stats, self.heldout, self.journal, self._tell
            )
        return {rule(recipe): found.get(rule(recipe), stats) for recipe in recipes}

    def _rank(
        self, candidates: Mapping[int, Sequence[Candidate]], stats: Mapping[str, Stats]
    ) -> None:
        """All structures on some of the tokens, the better half on all of them."""
        plans: dict[tuple[int, str], CutPlan] = {}
        for at, structures_of in candidates.items():
            found = self.found[at]
            for candidate in structures_of:
                known = stats[rule(candidate.recipe)]
                decided = self._if_possible(found, candidate, known)
                if decided is not None:
                    plans[at, candidate.name] = decided
            if len(found.left_out) == len(structures_of):
                name, why = found.left_out[0]
                raise RecipeError(
                    f"no candidate reaches the size {found.size}; {name}: {why}"
                )
        self._estimate(plans, ESTIMATED)
        better = {}
        for at, one in enumerate(self.found):
            count = better_half(len(one.judged), self.settings.finalists)
            for judged in self._better(one.best(ESTIMATED), count):
                better[at, judged.name] = judged.plan
        self._estimate(better, RANKED)

    def _better(self, judged: Sequence[Judged], count: int) -> list[Judged]:
        """The first ones, and zeros alone.

        They change least, and lead where little has to go, but estimates hardly show
        it.
        """
        rest = [one for one in judged[count:] if self._zeros_alone(one)]
        return [*judged[:count], *rest]

    def _zeros_alone(self, judged: Judged) -> bool:
        return zeros_alone(judged.plan.recipe, self.recipe)

    def _refine(self, stats: Mapping[str, Stats]) -> None:
        """The best structures with their zeros written or spread in other ways."""
        plans: dict[tuple[int, str], CutPlan] = {}
        for at, found in enumerate(self.found):
            leading = distinct(found.best(RANKED))
            for one in self._better(leading, self.settings.finalists):
                plans[at, one.name] = one.plan
                structure = Candidate(one.name, one.plan.recipe)
                for other in refinements(structure, self.settings):
                    known = stats[rule(other.recipe)]
                    if other.recipe.slim.allocation == "owl":
                        known = self._intact_outliers(other.recipe, known, one.plan)
                    decided = self._plan_as(at, other.recipe, known)
                    if decided is not None:
                        plans[at, other.name] = decided
        self._estimate(plans, REFINED)

    def _intact_outliers(self, recipe: Recipe, known: Stats, like: CutPlan) -> Stats:
        """OWL's outliers as the intact model has them: one pass for all estimates."""
        key = recipe.slim.owl_m
        if key not in self._outliers:
            whole = recipe.model_copy(
                update={
                    "experts": ExpertStage(method="none"),
                    "layers": type(recipe.layers)(),
                    "structured_share": None,
                }
            )
            few = dataclasses.replace(
                self.tokens, ids_ST=self._share(self.tokens.ids_ST)
            )
            self._outliers[key] = with_owl(self.ranking, whole, known, few, self._tell)
        counted = self._outliers[key].layers
        layers = dict(known.layers)
        for index, found in counted.items():
            outliers = {"owl_outliers_E": found.owl_outliers_E, "owl_m": found.owl_m}
            before = layers.get(index, found)
            layers[index] = dataclasses.replace(before, **outliers)
        # Taken for those of its survivors, until it is judged.
        return dataclasses.replace(known, layers=layers, trimming=trimming(like))

    def _judge(self, stats: Mapping[str, Stats]) -> None:
        """The finalists, calibrated and on all tokens."""
        plans: dict[tuple[int, str], CutPlan] = {}
        for at, found in enumerate(self.found):
            finalists = distinct(found.best(REFINED))[: self.settings.finalists]
            alone = [one for one in found.best(REFINED) if self._zeros_alone(one)]
            # The best way of zeros alone is judged too; see _better.
            for one in {each.name: each for each in [*finalists, *alone[:1]]}.values():
                decided: CutPlan | None = one.plan
                if one.plan.recipe.slim.allocation == "owl":
                    known = stats[rule(one.plan.recipe)]
                    counted = with_owl(
                        self.model, one.plan.recipe, known, self.tokens, self._tell
                    )
                    decided = self._plan_as(at, one.plan.recipe, counted)
                if decided is not None:
                    plans[at, one.name] = decided
            plans |= self._narrower(at, found, stats)
        losses = self._losses(plans.values(), self._tell)
        for (at, name), loss in zip(plans, losses, strict=True):
            self._keep(at, Judged(name, plans[at, name], loss, FINAL))

    def _narrower(
        self, at: int, found: Found, stats: Mapping[str, Stats]
    ) -> dict[tuple[int, str], CutPlan]:
        """The size by narrowing, which no estimate ranks; see ``narrowings``."""
        plans: dict[tuple[int, str], CutPlan] = {}
        leading = [Candidate(one.name, one.plan.recipe) for one in found.best(REFINED)]
        # Where no expert leaves, any rule's will do: they are of the same pass.
        first = next(iter(stats.values()))
        asked = sized(self.recipe, found.size)
        for other in narrowings(asked, leading, self.settings):
            known = stats.get(rule(other.recipe), first)
            decided = self._if_possible(found, other, known)
            if decided is not None:
                plans[at, other.name] = decided
        return plans

    def _estimate(self, plans: Mapping[tuple[int, str], CutPlan], step: int) -> None:
        """Rank plans of all sizes in one sweep."""
        heldout_ST = self.heldout.ids_ST
        losses = quick_losses(
            self.ranking,
            list(plans.values()),
            [Text(self._share(heldout_ST) if step == ESTIMATED else heldout_ST)],
            # A part suffices to say which weights matter least.
            self._share(self.tokens.ids_ST),
            journal=self.journal,
            report=self._tell,
        )
        for (at, name), (loss,) in zip(plans, losses, strict=True):
            self._keep(at, Judged(name, plans[at, name], loss, step))

    def _share(self, ids_ST: torch.Tensor) -> torch.Tensor:
        # The first windows: those of a step are among the next one's.
        return ids_ST[: max(1, round(FIRST * len(ids_ST)))]

    def _losses(self, plans: Iterable[CutPlan], report: Report) -> list[Loss]:
        found = planned_losses(
            self.model,
            list(plans),
            [Text(self.heldout.ids_ST)],
            self.tokens.ids_ST,
            journal=self.journal,
            report=report,
        )
        return [loss for (loss,) in found]

    def _keep(self, at: int, judged: Judged) -> None:
        self.found[at].judged[judged.name] = judged

    def _plan_as(self, at: int, recipe: Recipe, stats: Stats) -> CutPlan | None:
        """The plan of a refined structure, at the structure's own total, if it fits."""
        decided = self._plan(recipe, stats)
        return decided if self._fits(at, decided) else None

    def _if_possible(
        self, found: Found, candidate: Candidate, stats: Stats
    ) -> CutPlan | None:
        """Its plan. One that cannot reach the size does not end the search."""
        try:
            return self._plan(candidate.recipe, stats)
        except RecipeError as error:
            found.left_out.append((candidate.name, str(error)))
            return None

    def _plan(self, recipe: Recipe, stats: Stats | None) -> CutPlan:
        return plan(self.checkpoint, recipe, stats, self.options.max_shard_bytes)

    def _fits(self, at: int, decided: CutPlan) -> bool:
        limit = self.found[at].size.max_bytes
        size = decided.predicted.file_bytes if decided.predicted else 0
        return limit is None or size <= limit

    def _intact(self) -> Judged:
        recipe = Recipe(
            name="intact",
            experts=ExpertStage(method="none"),
            slim=SlimStage(method="none"),
            calibration=self.recipe.calibration,
        )
        whole = self._plan(recipe, None)
        # Not through _tell: it is asked for when time is up, too.
        (loss,) = self._losses([whole], self.options.report)
        return Judged("intact", whole, loss, FINAL)

    def _tell(self, progress: Progress) -> None:
        """Pass on how far a stage is, with the best so far; end where time is up."""
        best = [one.best(ESTIMATED)[0] for one in self.found if one.judged]
        note = ""
        if best:
            losses = ", ".join(f"{perplexity_of(one.loss.mean):.2f}" for one in best)
            note = f"best {losses}"
        self.options.report(dataclasses.replace(progress, note=note))
        if time.monotonic() > self.until:
            raise _TimeIsUp
