"""READ ME FIRST: the stages in order, from a checkpoint to a checkpoint.

    CHECKPOINT -> measure -> stats -> plan -> plan.json -> cut -> CHECKPOINT' -> verify

Each stage is one function here and one command of the command line. ``measure`` looks
(zero or one forward pass), ``plan`` decides (no weights, no data), ``cut`` executes
(one streaming pass), ``verify`` checks. ``run`` is all four and can be resumed.
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path

from . import __version__
from .calibrate import routed
from .calibrate.data import Tokens, load_heldout, load_tokens
from .calibrate.forward import StreamingModel
from .calibrate.measure import measure as measure_checkpoint
from .calibrate.stats import Stats, load_stats, save_stats
from .checkpoint.open import Checkpoint
from .checkpoint.place import check_file, check_folder
from .checkpoint.reader import check_routers
from .checkpoint.source import open_checkpoint
from .checkpoint.writer import MAX_SHARD_BYTES
from .convert import Converted, parse_layout
from .convert import convert as convert_checkpoint
from .cut.apply import CutResult
from .cut.apply import cut as cut_checkpoint
from .cut.finish import write_run_record
from .cut.output import check_output, partial_folder, staging_folder
from .cut.planned import LossJournal
from .cut.predict import model_facts, with_prediction
from .decide.build import make_plan
from .decide.needs import needed_statistics, needs_tokens
from .decide.order import halves
from .decide.plan import CutPlan, Measurement, check_plan, save_plan, trimming
from .errors import OutputError, PlanError
from .preflight import RunOptions, check_device, check_options, check_recipe
from .probe import with_owl, with_sensitivity
from .progress import Report, ignore
from .recipe import Calibration, ExpertStage, Recipe, SlimStage
from .verify import Verified
from .verify import verify as verify_output

ROUTER_FIELDS = frozenset({"router_sqdist_EE", "router_norm", "router_row_norm_E"})


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
    """Collect what the recipe's decisions need: 0 forward passes, or 1.

    A further one counts OWL's outliers; sensitivities are judged on held-out windows.
    """
    check_routers(checkpoint)
    needed = needed_statistics(recipe)
    later = needed & {"sensitivity_P2", "owl_outliers_E"}
    first = work / "measured.safetensors" if work is not None and later else None
    stats = _first_measured(first, recipe, tokens)
    if stats is None and not needed - later and tokens is not None:
        calibration = tokens.describe()
        stats = Stats(checkpoint.fingerprint, {}, calibration=calibration)
    if stats is None:
        clusters = recipe.experts.method == "stun"
        stats = measure_checkpoint(
            checkpoint,
            router=clusters or bool(needed & ROUTER_FIELDS),
            weights=clusters,
            tokens=tokens if needs_tokens(recipe) else None,
            fields=needed & routed.FIELDS,
            device=options.device,
            report=options.report,
            work=work,
        )
        if first is not None:
            first.parent.mkdir(parents=True, exist_ok=True)
            save_stats(stats, first)
    if later and tokens is not None:
        stats = _tried_out(checkpoint, recipe, stats, tokens, options, work)
    if first is not None:
        shutil.rmtree(first.parent)
    return stats


def _first_measured(
    path: Path | None, recipe: Recipe, tokens: Tokens | None
) -> Stats | None:
    """What an interrupted ``measure`` had finished before its later phases."""
    if path is None or not path.is_file():
        return None
    return _resumed_stats(path, recipe, tokens)


def _tried_out(
    checkpoint: Checkpoint,
    recipe: Recipe,
    stats: Stats,
    tokens: Tokens,
    options: RunOptions,
    work: Path | None,
) -> Stats:
    """Measure what decisions have to be tried out for: sensitivity, outliers."""
    model = StreamingModel(checkpoint, options.device)
    needed = needed_statistics(recipe)
    if "sensitivity_P2" in needed:
        heldout = load_heldout(checkpoint, recipe.calibration)
        journal = LossJournal(None if work is None else work / "losses.jsonl")
        stats = with_sensitivity(model, recipe, stats, heldout, journal, options.report)
    if "owl_outliers_E" in needed:
        stats = with_owl(model, recipe, stats, tokens, options.report)
    return stats


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
        _check_trimming(decided, stats)
        # Ordered as a statistics file gives it back, so that a resumed run, which
        # reads one, makes the same plan to the byte.
        calibration = json.loads(json.dumps(stats.calibration, sort_keys=True))
        measurement = Measurement(
            forward_passes=stats.forward_passes, calibration=calibration
        )
        decided = decided.model_copy(update={"measurement": measurement})
    return with_prediction(checkpoint, decided, max_shard_bytes)


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
    dense = out if options.layout == "dense" else staging_folder(out)
    result = cut_checkpoint(
        checkpoint,
        decided,
        dense,
        tokens=tokens,
        device=options.device,
        resume=options.resume,
        overwrite=options.overwrite or (options.resume and dense != out),
        max_shard_bytes=options.max_shard_bytes,
        report=options.report,
        where=where,
    )
    if dense != out:
        # Sizes are known only when every zero is: compressed in a second pass.
        packed = convert(open_checkpoint(dense), out, options)
        shutil.rmtree(dense)
        result = dataclasses.replace(result, out=out, file_bytes=packed.file_bytes)
    write_run_record(out, time.monotonic() - started, resumed=options.resume)
    return result


def convert(checkpoint: Checkpoint, out: Path, options: RunOptions) -> Converted:
    """Write a checkpoint again in ``options.layout``, bit for bit the same weights."""
    check_folder(out, checkpoint.folder)
    check_output(out, resume=options.resume, overwrite=options.overwrite)
    return convert_checkpoint(
        checkpoint,
        out,
        options.layout,
        resume=options.resume,
        overwrite=options.overwrite,
        max_shard_bytes=options.max_shard_bytes,
        report=options.report,
    )


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
    if recipe.order == "unstructured-first":
        return _run_zeros_first(checkpoint, recipe, out, options)
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


def _run_zeros_first(
    checkpoint: Checkpoint, recipe: Recipe, out: Path, options: RunOptions
) -> tuple[CutPlan, CutResult, Verified]:
    """The control ``order: unstructured-first``: two runs, the second of the first's.

    The folder between them is ``OUT.zeros``; it is gone at the end.
    """
    check_options(checkpoint, out, options)
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
    between = out.with_name(out.name + ".zeros")
    if not (options.resume and between.is_dir()):
        dense = dataclasses.replace(options, layout="dense")
        run(checkpoint, first, between, dense)
    result = run(open_checkpoint(between), second, out, options)
    shutil.rmtree(between)
    return result


__all__ = [
    "RunOptions",
    "calibration_tokens",
    "check_device",
    "check_options",
    "convert",
    "cut",
    "measure",
    "parse_layout",
    "plan",
    "run",
    "save_plan",
    "verify",
]
