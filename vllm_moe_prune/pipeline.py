"""READ ME FIRST: the stages in order, from a checkpoint to a checkpoint.

    CHECKPOINT -> measure -> stats -> plan -> plan.json -> cut -> CHECKPOINT' -> verify

Each stage is one function here and one command of the command line. ``measure`` looks
(zero or one forward pass), ``plan`` decides (no weights, no data), ``cut`` executes
(one streaming pass), ``verify`` checks. ``run`` is all four and can be resumed.
"""

import json
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from . import __version__
from .calibrate import routed
from .calibrate.data import Tokens, load_tokens
from .calibrate.forward import StreamingModel
from .calibrate.measure import measure as measure_checkpoint
from .calibrate.stats import Stats, load_stats, save_stats
from .checkpoint.open import Checkpoint
from .checkpoint.place import check_file, check_folder
from .checkpoint.reader import check_routers
from .checkpoint.writer import MAX_SHARD_BYTES
from .cut.apply import CutResult
from .cut.apply import cut as cut_checkpoint
from .cut.finish import write_run_record
from .cut.output import check_output, companions, partial_folder
from .cut.predict import model_facts, with_prediction
from .decide.build import make_plan
from .decide.needs import needed_statistics, needs_tokens
from .decide.plan import CutPlan, Measurement, check_plan, save_plan
from .errors import OutputError, PlanError, RecipeError
from .progress import Report, ignore
from .recipe import Calibration, Recipe
from .verify import Verified
from .verify import verify as verify_output

ROUTER_FIELDS = frozenset({"router_sqdist_EE", "router_norm", "router_row_norm_E"})
COUNTS = frozenset({"tokens", "routed_E", "coactivation_EE"})
MEASURABLE = ROUTER_FIELDS | COUNTS | routed.FIELDS | {"weight_sqdist_EE"}
"""The statistics that ``measure`` can collect."""


@dataclass(frozen=True)
class RunOptions:
    """How to run, as opposed to what to do (that is the recipe's)."""

    device: str = "cpu"
    resume: bool = False
    overwrite: bool = False
    max_shard_bytes: int = MAX_SHARD_BYTES
    report: Report = ignore


def check_options(checkpoint: Checkpoint, out: Path, options: RunOptions) -> None:
    """Refuse what cannot work, before any work is done.

    Raises:
        RecipeError: The device is not there.
        OutputError: The output is in the way, cannot be written, or is the input.
        CheckpointError: A router holds NaN, or a file beside the weights is a trap.
    """
    check_device(options.device)
    check_folder(out, checkpoint.folder)
    check_output(out, resume=options.resume, overwrite=options.overwrite)
    check_routers(checkpoint)
    companions(checkpoint)


def check_device(name: str) -> None:
    """Refuse a device that is unknown or not in this machine.

    Raises:
        RecipeError: Saying which there are.
    """
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in there and not (name == "cuda" and len(there) > 1):
        raise RecipeError(
            f"device {name!r} is not one of this machine's: {', '.join(there)}."
        )


def check_recipe(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Refuse what no statistics could make possible, before measuring them.

    Raises:
        RecipeError: What was asked for cannot be done with this checkpoint.
    """
    check_measurable(recipe)
    # A PlanError says that statistics are missing, and they are.
    with suppress(PlanError):
        make_plan(None, recipe, model_facts(checkpoint), tool_version=__version__)


def check_measurable(recipe: Recipe) -> None:
    """Refuse a recipe whose decisions or order this version cannot carry out.

    Raises:
        RecipeError: Saying what is missing.
    """
    if missing := sorted(needed_statistics(recipe) - MEASURABLE):
        raise RecipeError(
            f"recipe {recipe.name}: its decisions need {', '.join(missing)}, which "
            "measure does not collect. Choose another criterion, budget or allocation."
        )
    if recipe.order != "structured-first":
        raise RecipeError(
            f"recipe {recipe.name}: order {recipe.order} takes two cuts; run them one "
            "after the other."
        )


def _tokens(checkpoint: Checkpoint, calibration: Calibration) -> Tokens:
    """Tokens for a forward pass, which is first seen to be possible."""
    StreamingModel(checkpoint)  # compares config and tensors, reads no weight
    return load_tokens(checkpoint, calibration)


def calibration_tokens(checkpoint: Checkpoint, recipe: Recipe) -> Tokens | None:
    """The calibration tokens, or None where the recipe needs no data at all."""
    if not (needs_tokens(recipe) or recipe.needs_activations):
        return None
    return _tokens(checkpoint, recipe.calibration)


def measuring_tokens(checkpoint: Checkpoint, recipe: Recipe) -> Tokens | None:
    """The calibration tokens, or None where the decisions need no data."""
    if not needs_tokens(recipe):
        return None
    return _tokens(checkpoint, recipe.calibration)


def measure(
    checkpoint: Checkpoint,
    recipe: Recipe,
    tokens: Tokens | None,
    options: RunOptions,
    work: Path | None = None,
) -> Stats:
    """Collect what the recipe's decisions need: 0 forward passes, or 1."""
    check_routers(checkpoint)
    check_measurable(recipe)
    needed = needed_statistics(recipe)
    clusters = recipe.experts.method == "stun"
    return measure_checkpoint(
        checkpoint,
        router=clusters or bool(needed & ROUTER_FIELDS),
        weights=clusters,
        tokens=tokens if needs_tokens(recipe) else None,
        fields=needed & routed.FIELDS,
        device=options.device,
        report=options.report,
        work=work,
    )


def plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    stats: Stats | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> CutPlan:
    """Turn statistics and a recipe into every decision, with the predicted size."""
    facts = model_facts(checkpoint)
    decided = make_plan(stats, recipe, facts, tool_version=__version__)
    if stats is not None:
        # Ordered as a statistics file gives it back, so that a resumed run, which
        # reads one, makes the same plan to the byte.
        calibration = json.loads(json.dumps(stats.calibration, sort_keys=True))
        measurement = Measurement(
            forward_passes=stats.forward_passes, calibration=calibration
        )
        decided = decided.model_copy(update={"measurement": measurement})
    return with_prediction(checkpoint, decided, max_shard_bytes)


def cut(
    checkpoint: Checkpoint,
    decided: CutPlan,
    out: Path,
    options: RunOptions,
    tokens: Tokens | None = None,
    where: str = "plan",
    text: str | None = None,
) -> CutResult:
    """Execute a plan: read each layer once, write each shard once.

    Args:
        checkpoint: The input.
        decided: The plan.
        out: The output folder.
        options: How to run.
        tokens: What to calibrate on, if it has been read already.
        where: How errors name the plan.
        text: What to calibrate on instead of the plan's own text.
    """
    started = time.monotonic()
    check_options(checkpoint, out, options)
    check_plan(decided, checkpoint.layers, checkpoint.fingerprint, where)
    if tokens is None and decided.needs_activations:
        asked = decided.recipe.calibration
        if text is not None:
            asked = asked.model_copy(update={"source": text})
        tokens = _tokens(checkpoint, asked)
    result = cut_checkpoint(
        checkpoint,
        decided,
        out,
        tokens=tokens,
        device=options.device,
        resume=options.resume,
        overwrite=options.overwrite,
        max_shard_bytes=options.max_shard_bytes,
        report=options.report,
        where=where,
    )
    write_run_record(out, time.monotonic() - started, resumed=options.resume)
    return result


def verify(
    folder: Path, source: Checkpoint | None = None, report: Report = ignore
) -> Verified:
    """Check a finished folder, against its source if there is one."""
    return verify_output(folder, source, report)


def _resumed_stats(path: Path, recipe: Recipe, tokens: Tokens | None) -> Stats:
    """What an interrupted run measured, if it was of the same text."""
    stats = load_stats(path)
    if not needs_tokens(recipe) or tokens is None:
        return stats
    if stats.calibration.get("sha256") != tokens.sha256:
        raise OutputError(
            f"{path}: the interrupted run measured another calibration text. Resume "
            "with that one, or start again with --overwrite."
        )
    return stats


def run(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    options: RunOptions,
    stats_file: Path | None = None,
) -> tuple[CutPlan, CutResult, Verified]:
    """Measure, plan, cut and verify; after a kill, ``options.resume`` continues.

    Args:
        checkpoint: The input.
        recipe: What to do.
        out: The output folder.
        options: How to run.
        stats_file: Statistics to use if the file exists, and to write if not.
    """
    started = time.monotonic()
    check_options(checkpoint, out, options)
    if stats_file is not None:
        check_file(stats_file, checkpoint.folder)
    check_recipe(checkpoint, recipe)
    tokens = calibration_tokens(checkpoint, recipe)
    kept = stats_file or partial_folder(out).with_suffix(".stats.safetensors")
    work = kept.with_name(kept.name + ".work")
    if options.overwrite and not options.resume and work.is_dir():
        shutil.rmtree(work)
    if stats_file is not None and kept.is_file():
        stats = load_stats(kept)
    elif options.resume and kept.is_file():
        stats = _resumed_stats(kept, recipe, tokens)
    else:
        stats = measure(checkpoint, recipe, tokens, options, work)
        save_stats(stats, kept)
    decided = plan(checkpoint, recipe, stats, options.max_shard_bytes)
    result = cut(checkpoint, decided, out, options, tokens, where=recipe.name)
    if stats_file is None:
        kept.unlink()
    verified = verify(out, checkpoint, options.report)
    write_run_record(out, time.monotonic() - started, resumed=options.resume)
    return decided, result, verified


__all__ = [
    "RunOptions",
    "calibration_tokens",
    "check_device",
    "check_options",
    "cut",
    "measure",
    "plan",
    "run",
    "save_plan",
    "verify",
]
