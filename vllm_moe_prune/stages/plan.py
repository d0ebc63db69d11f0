"""The ``plan`` stage: statistics and a recipe become every decision, with its size."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import __version__
from ..calibrate.shipped import NOTE, SHIPPED
from ..calibrate.stats import Stats
from ..checkpoint.claims import warn_once
from ..checkpoint.open import Checkpoint
from ..checkpoint.writer import MAX_SHARD_BYTES
from ..cut.predict import model_facts, with_prediction
from ..decide.blend import coverage, decide_blended
from ..decide.build_plan import make_plan
from ..decide.cut_plan import CutPlan, Measurement, save_plan, trimming
from ..decide.facts import ModelFacts
from ..errors import PlanError, RecipeError
from ..files.atomic import writing
from ..files.json_file import parse_json
from ..recipes.schema import Recipe

MOST_TOTAL = 0.99
# The total comes out to within MOST_TOTAL / 2^16.
BISECTIONS = 16


def plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    stats: Stats | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> CutPlan:
    """Turn statistics and a recipe into every decision, with the predicted size.

    With ``max_bytes`` in the recipe, at the least total sparsity that fits.

    Raises:
        RecipeError: The recipe cannot be followed, or is one to search with.
        PlanError: The statistics do not suffice.
    """
    if recipe.tune is not None:
        raise RecipeError(
            f"recipe {recipe.name} searches for a plan. Use `vllm-moe-prune tune`, "
            "or `vllm-moe-prune run`."
        )
    facts = model_facts(checkpoint)

    def planned(sized: Recipe) -> CutPlan:
        decided = _decided(facts, sized, stats)
        return with_prediction(checkpoint, decided, max_shard_bytes, facts)

    if recipe.max_bytes is None:
        return planned(recipe)
    return least_that_fits(planned, recipe, recipe.max_bytes)


def _decided(facts: ModelFacts, recipe: Recipe, stats: Stats | None) -> CutPlan:
    """The plan without its predicted size."""

    def decide(known: Stats | None) -> CutPlan:
        return make_plan(known, recipe, facts, tool_version=__version__)

    decided, shares = decide_blended(stats, recipe.calibration.blend, decide)
    if stats is None:
        return decided
    if stats.calibration.get("source") == SHIPPED:
        warn_once(NOTE)
    _check_trimming(decided, stats)
    # Ordered as a statistics file gives it back, so that a resumed run, which reads
    # one, makes the same plan to the byte.
    calibration = parse_json(json.dumps(stats.calibration, sort_keys=True))
    measurement = Measurement(
        forward_passes=stats.forward_passes,
        calibration=calibration,
        blend=shares,
        coverage=coverage(stats, decided.layers),
    )
    return decided.model_copy(update={"measurement": measurement})


def least_that_fits(
    planned: Callable[[Recipe], CutPlan], recipe: Recipe, max_bytes: int
) -> CutPlan:
    """The plan of the least total sparsity whose files fit.

    Args:
        planned: Makes the plan of a recipe that has a total, with its predicted size.
        recipe: What is to be planned, whatever its size.
        max_bytes: Maximum size of the weight files.

    Raises:
        RecipeError: None fits.
    """

    def planned_at(total: float) -> CutPlan:
        asked = {"total_sparsity": total, "max_bytes": None}
        return planned(recipe.model_copy(update=asked))

    # Size falls as the total rises: the least total that fits keeps most.
    least = planned_at(0.0)
    if _file_bytes(least) <= max_bytes:
        return least
    low, high, found, smallest = 0.0, MOST_TOTAL, None, _file_bytes(least)
    for _ in range(BISECTIONS):
        total = (low + high) / 2
        try:
            tried = planned_at(total)
        except RecipeError:  # more than this recipe can remove
            high = total
            continue
        smallest = min(smallest, _file_bytes(tried))
        if _file_bytes(tried) <= max_bytes:
            high, found = total, tried
        else:
            low = total
    if found is None:
        raise RecipeError(
            f"recipe {recipe.name} cannot be as small as {max_bytes:,} bytes, "
            f"only {smallest:,}. Ask for more bytes, or choose another recipe."
        )
    return found


def _file_bytes(decided: CutPlan) -> int:
    assert decided.predicted is not None
    return decided.predicted.file_bytes


def plan_sweep(
    checkpoint: Checkpoint,
    recipes: Sequence[Recipe],
    stats: Stats | None,
    folder: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[tuple[Path, CutPlan]]:
    """Plan many recipes from one measurement, each into a file of its name.

    Nothing is written unless all of them can be followed.
    """
    plans = []
    for recipe in recipes:
        decided = plan(checkpoint, recipe, stats, max_shard_bytes)
        plans.append((folder / f"{recipe.name}.json", decided))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path, decided in plans:
        save_plan(decided, path)
    return plans


def _check_trimming(decided: CutPlan, stats: Stats) -> None:
    """Refuse outliers that were counted on other survivors than the plan's."""
    slim = decided.recipe.slim
    if slim.allocation != "owl" or not decided.is_slimmed:
        return
    if stats.trimming != trimming(decided):
        raise PlanError(
            "the outliers were counted on the survivors of another plan. Run "
            "`vllm-moe-prune measure` with this recipe, its drop and its total."
        )
