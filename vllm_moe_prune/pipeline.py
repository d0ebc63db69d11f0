"""READ ME FIRST: the stages in order, from a checkpoint to a checkpoint.

    CHECKPOINT -> measure -> stats -> plan -> plan.json -> cut -> CHECKPOINT' -> verify

Each stage is one function here and one command of the command line. ``measure`` looks
(zero or one forward pass), ``plan`` decides (no weights, no data), ``cut`` executes
(one streaming pass), ``verify`` checks. ``run`` is all four and can be resumed.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from . import __version__
from .calibrate.data import Tokens, load_heldout
from .calibrate.stats import Stats
from .calibrate.stats_file import load_stats
from .checkpoint.open import Checkpoint
from .checkpoint.output_path import check_file, check_folder
from .checkpoint.source import open_checkpoint
from .checkpoint.writer import plan_shards
from .cut.convert import Converted, parse_spelling_name, parse_storage_name
from .cut.convert import convert as convert_checkpoint
from .cut.execute import CutResult, execute_plan, finished_cut
from .cut.means import means_of
from .cut.output import companions_sha256, cut_key
from .cut.predict import model_facts
from .cut.shared_output import is_complete_for, shared_transaction
from .cut.slice import output_tensors
from .cut.transaction import Workspace
from .cut.verify import Verified
from .cut.verify import verify as verify_output
from .decide.cut_plan import CutPlan, dump_plan, load_plan, save_plan
from .decide.order import halves
from .decide.required_stats import needed_statistics
from .errors import RecipeError
from .progress import Report, ignore
from .recipes.calibration import Calibration, Texts
from .recipes.schema import ExpertStage, Recipe, SlimStage
from .recover.options import Training
from .recover.recover import Recovered
from .recover.recover import recover as recover_checkpoint
from .stages.measure import (
    calibration_tokens,
    measure,
    measure_into,
    measuring_tokens,
    remove_work,
    tokens_of,
)
from .stages.plan import plan, plan_sweep
from .stages.preflight import (
    RunOptions,
    check_device,
    check_ranks,
    check_recipe,
    device_of,
    validate_input,
    validate_output,
    validate_plan,
)
from .tune.search import tune, tune_sizes
from .tune.wishes import first_that_fits

Stages = tuple[CutPlan, CutResult, Verified | None]


def cut(
    checkpoint: Checkpoint,
    decided: CutPlan,
    out: Path,
    options: RunOptions,
    tokens: Tokens | None = None,
    where: str = "plan",
    text: Texts | None = None,
    stats: Stats | None = None,
) -> CutResult:
    """Validate and execute a plan: read each layer once, write each shard once.

    Args:
        checkpoint: The input.
        decided: The plan.
        out: The output folder.
        options: How to run.
        tokens: What to calibrate on, if it has been read already.
        where: How errors name the plan.
        text: What to calibrate on instead of the plan's own text.
        stats: What the plan was made from, to be kept in the output.
    """
    validate_input(checkpoint, options.device)
    options.ranks.first(lambda: validate_output(checkpoint, out, options))
    validate_plan(checkpoint, decided, options, where)
    if tokens is None and decided.needs_activations:
        asked = decided.recipe.calibration
        if text is not None:
            asked = asked.model_copy(update={"source": text})
        tokens = tokens_of(checkpoint, asked)
    check_ranks(checkpoint, options, tokens, plan=dump_plan(decided))
    return _cut(checkpoint, decided, out, options, tokens, where, stats)


def _cut(
    checkpoint: Checkpoint,
    decided: CutPlan,
    out: Path,
    options: RunOptions,
    tokens: Tokens | None,
    where: str,
    stats: Stats | None = None,
) -> CutResult:
    """Execute a plan that was validated, or made here."""
    how: dict[str, Any] = {
        "tokens": tokens,
        "device": options.device,
        "max_shard_bytes": options.max_shard_bytes,
        "report": options.report,
        "where": where,
        "stats": stats,
        "ranks": options.ranks,
    }
    ranks = options.ranks
    ours: dict[str, Any] = {"resume": options.resume, "overwrite": options.overwrite}
    storage = options.storage or decided.recipe.storage
    if storage == "dense" and decided.spelling == "moe-prune":
        return execute_plan(checkpoint, decided, out, **how, **ours)
    means = means_of(checkpoint, decided, stats)
    shards = plan_shards(output_tensors(checkpoint, decided), options.max_shard_bytes)
    key = cut_key(checkpoint, decided, shards, tokens, stats, storage)
    if is_complete_for(ranks, out, key, **ours):
        return finished_cut(checkpoint, decided, out)
    with shared_transaction(ranks, out, key, [checkpoint], **ours) as space:
        # Sizes are known only when every zero is: compressed in a second pass. For
        # stock vLLM, too, the compact form is what is cut and what is read back.
        dense = space.work / "dense"
        # Always resumed: whatever lies in this folder is of the same key.
        result = execute_plan(checkpoint, decided, dense, **how, resume=True)

        def packed() -> int:
            return convert_checkpoint(
                open_checkpoint(dense),
                space.result,
                storage,
                decided.spelling,
                means=means,
                resume=True,
                max_shard_bytes=options.max_shard_bytes,
                report=options.report,
            ).file_bytes

        file_bytes = ranks.first(packed)
    return dataclasses.replace(result, out=out, file_bytes=file_bytes)


def convert(checkpoint: Checkpoint, out: Path, options: RunOptions) -> Converted:
    """Write a checkpoint again, stored or spelled otherwise, the same weights."""
    validate_output(checkpoint, out, options)
    return convert_checkpoint(
        checkpoint,
        out,
        options.storage or "dense",
        options.spelling,
        resume=options.resume,
        overwrite=options.overwrite,
        max_shard_bytes=options.max_shard_bytes,
        report=options.report,
    )


def recover(
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    out: Path,
    training: Training,
    calibration: Calibration,
    options: RunOptions,
) -> Recovered:
    """Train a pruned checkpoint, and write it again with the same files and shapes."""
    validate_input(checkpoint, options.device)
    validate_output(checkpoint, out, options)
    if original is not None:
        # The output may replace neither of the two checkpoints.
        check_folder(out, original.folder)
    return recover_checkpoint(
        checkpoint,
        original,
        out,
        training,
        calibration,
        device=options.device,
        resume=options.resume,
        overwrite=options.overwrite,
        report=options.report,
    )


def verify(
    folder: Path,
    source: Checkpoint | None = None,
    report: Report = ignore,
    *,
    allow_links: bool = False,
) -> Verified:
    """Check a finished folder, against its source if there is one."""
    return verify_output(folder, source, report, allow_links=allow_links)


def run(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    options: RunOptions,
    stats_file: Path | None = None,
) -> Stages:
    """Measure, plan, cut and verify; after a kill, ``options.resume`` continues.

    Args:
        checkpoint: The input.
        recipe: What to do.
        out: The output folder.
        options: How to run.
        stats_file: Statistics to use if the file exists, and to write if not.

    Returns:
        The plan, what was done, and what verifying found; None for that but on rank 0.
    """
    ranks = options.ranks
    validate_input(checkpoint, options.device)
    ranks.first(lambda: validate_output(checkpoint, out, options))
    if stats_file is not None:
        if recipe.tune is not None or recipe.order != "structured-first":
            raise RecipeError(
                f"recipe {recipe.name} measures for every step by itself, so that "
                f"{stats_file} would not be used; leave out --stats."
            )
        check_file(stats_file, checkpoint.folder)
    # Other recipes are checked in parts: a search leaves out candidates that cannot be
    # followed, and unstructured-first is two runs of their own.
    if recipe.tune is None and recipe.order == "structured-first":
        check_recipe(checkpoint, recipe)
    tokens = calibration_tokens(checkpoint, recipe)
    key = _run_key(checkpoint, recipe, options, tokens, stats_file)
    check_ranks(checkpoint, options, tokens, recipe=key)
    ours = {"resume": options.resume, "overwrite": options.overwrite}
    if is_complete_for(ranks, out, key, **ours):
        decided = load_plan(out / "plan.json")
        # After unstructured-first the plan is of the model between, which is gone.
        of_source = decided.model.fingerprint == checkpoint.fingerprint
        verified = _verified(out, checkpoint if of_source else None, options)
        return decided, finished_cut(checkpoint, decided, out), verified
    # Inside the work folder, which is of this key, everything is resumed.
    inner = dataclasses.replace(options, resume=True, overwrite=False)
    with shared_transaction(ranks, out, key, [checkpoint], **ours) as space:
        if recipe.order == "unstructured-first":
            stages = _zeros_first(checkpoint, recipe, space, inner)
        elif recipe.tune is not None:
            stages = _best(checkpoint, recipe, space, inner)
        else:
            texts = tokens, stats_file, options.resume
            stages = _planned(checkpoint, recipe, space, inner, *texts)
    decided, result, verified = stages
    return decided, dataclasses.replace(result, out=out), verified


def _verified(
    folder: Path, source: Checkpoint | None, options: RunOptions
) -> Verified | None:
    """What rank 0 finds; the others wait."""
    first = options.ranks.rank == 0
    found = verify(folder, source, options.report) if first else None
    options.ranks.wait()
    return found


def _run_key(
    checkpoint: Checkpoint,
    recipe: Recipe,
    options: RunOptions,
    tokens: Tokens | None,
    stats_file: Path | None,
) -> str:
    """Hash of everything that determines the output of ``run``, texts by content."""
    unnamed = {"source": None, "heldout_source": None}
    calibration = recipe.calibration.model_copy(update=unnamed)
    heldout = None
    if recipe.tune is not None:
        heldout = load_heldout(checkpoint, recipe.calibration).sha256
    said = (
        __version__,
        checkpoint.fingerprint,
        companions_sha256(checkpoint),
        recipe.model_copy(update={"calibration": calibration}).model_dump_json(),
        (options.storage or recipe.storage, options.max_shard_bytes),
        (tokens.sha256 if tokens is not None else None, heldout),
        # By its name: before the first run there is no content to hash.
        None if stats_file is None else str(stats_file.resolve()),
    )
    return hashlib.sha256(repr(said).encode()).hexdigest()


def _planned(
    checkpoint: Checkpoint,
    recipe: Recipe,
    space: Workspace,
    options: RunOptions,
    tokens: Tokens | None,
    stats_file: Path | None,
    resumed: bool,
) -> Stages:
    """Measure, plan, cut, verify."""
    kept = stats_file or space.work / "stats.safetensors"
    if options.ranks.first(kept.is_file):
        stats = load_stats(kept)
        # Left there by a kill between writing the file and removing the folder.
        if resumed and options.ranks.rank == 0:
            remove_work(kept)
    else:
        stats = measure_into(kept, checkpoint, recipe, tokens, options)
    decided = plan(checkpoint, recipe, stats, options.max_shard_bytes)
    out, where = space.result, recipe.name
    validate_plan(checkpoint, decided, options, where)
    result = _cut(checkpoint, decided, out, options, tokens, where, stats)
    return decided, result, _verified(out, checkpoint, options)


def _best(
    checkpoint: Checkpoint, recipe: Recipe, space: Workspace, options: RunOptions
) -> Stages:
    """Search for a plan and carry it out; the plan found survives a kill."""
    found, out = space.work / "plan.json", space.result
    # The search is the long part; its result outlives a kill of the cut.
    if not options.ranks.first(found.is_file):
        tuned = tune(checkpoint, recipe, options, work=space.work / "tune")
        if options.ranks.rank == 0:
            save_plan(tuned.best.plan, found)
        options.ranks.wait()
    decided = load_plan(found)
    validate_plan(checkpoint, decided, options, recipe.name)
    tokens = None
    if decided.needs_activations:
        tokens = tokens_of(checkpoint, decided.recipe.calibration)
    result = _cut(checkpoint, decided, out, options, tokens, recipe.name)
    return decided, result, _verified(out, checkpoint, options)


def _zeros_first(
    checkpoint: Checkpoint, recipe: Recipe, space: Workspace, options: RunOptions
) -> Stages:
    """The control ``order: unstructured-first``: the second run is of the first's."""
    layers = Recipe(
        layers=recipe.layers,
        calibration=recipe.calibration,
        experts=ExpertStage(method="none"),
        slim=SlimStage(method="none"),
    )
    stats = None
    if needed_statistics(layers):
        tokens = measuring_tokens(checkpoint, layers)
        stats = measure(checkpoint, layers, tokens, options)
    first, second = halves(stats, recipe, model_facts(checkpoint))
    between = space.work / "zeros"
    # Dense: the second run reads it at once, and the last output alone is kept.
    run(checkpoint, first, between, dataclasses.replace(options, storage="dense"))
    between_opened = open_checkpoint(between, trust_code=checkpoint.trust_code)
    return run(between_opened, second, space.result, options)


__all__ = [
    "RunOptions",
    "calibration_tokens",
    "check_device",
    "convert",
    "cut",
    "device_of",
    "first_that_fits",
    "measure",
    "measure_into",
    "measuring_tokens",
    "parse_spelling_name",
    "parse_storage_name",
    "plan",
    "plan_sweep",
    "recover",
    "run",
    "save_plan",
    "tune",
    "tune_sizes",
    "validate_input",
    "verify",
]
