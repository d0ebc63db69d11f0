"""READ ME FIRST: the stages in order, from a checkpoint to a checkpoint.

    CHECKPOINT -> measure -> stats -> plan -> plan.json -> cut -> CHECKPOINT' -> verify

Each stage is one function here and one command of the command line. ``measure`` looks
(zero or one forward pass), ``plan`` decides (no weights, no data), ``cut`` executes
(one streaming pass), ``verify`` checks. ``run`` is all four and can be resumed.
"""

import dataclasses
import shutil
import time
from pathlib import Path

from .calibrate.data import Tokens
from .calibrate.stats import Stats, load_stats, save_stats
from .checkpoint.open import Checkpoint
from .checkpoint.output_path import check_file, check_folder
from .checkpoint.source import open_checkpoint
from .cut.convert import Converted, parse_storage_name
from .cut.convert import convert as convert_checkpoint
from .cut.execute import CutResult, execute_plan
from .cut.finish import write_run_record
from .cut.output import check_output, partial_folder, staging_folder
from .cut.predict import model_facts
from .cut.verify import Verified
from .cut.verify import verify as verify_output
from .decide.cut_plan import CutPlan, check_plan, load_plan, save_plan
from .decide.order import halves
from .decide.required_stats import needed_statistics
from .errors import PlanError
from .progress import Report, ignore
from .recipes.schema import Calibration, ExpertStage, Recipe, SlimStage
from .recover.options import Training
from .recover.recover import Recovered
from .recover.recover import recover as recover_checkpoint
from .stages.measure import (
    calibration_tokens,
    measure,
    measuring_tokens,
    resumed_stats,
    tokens_of,
)
from .stages.plan import plan, plan_sweep
from .stages.preflight import RunOptions, check_device, check_options, check_recipe
from .tune.search import tune


def cut(
    checkpoint: Checkpoint,
    decided: CutPlan,
    out: Path,
    options: RunOptions,
    tokens: Tokens | None = None,
    where: str = "plan",
    text: str | None = None,
    stats: Stats | None = None,
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
        stats: What the plan was made from, to be kept in the output.
    """
    started = time.monotonic()
    check_options(checkpoint, out, options)
    check_plan(decided, checkpoint.layers, checkpoint.fingerprint, where)
    if options.storage != "dense" and decided.is_quantized:
        raise PlanError(
            f"{where}: quantizes experts, which --storage {options.storage} cannot "
            "store. Leave --storage out."
        )
    if tokens is None and decided.needs_activations:
        asked = decided.recipe.calibration
        if text is not None:
            asked = asked.model_copy(update={"source": text})
        tokens = tokens_of(checkpoint, asked)
    dense = out if options.storage == "dense" else staging_folder(out)
    result = execute_plan(
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
        stats=stats,
    )
    if dense != out:
        # Sizes are known only when every zero is: compressed in a second pass.
        packed = convert(open_checkpoint(dense), out, options)
        shutil.rmtree(dense)
        result = dataclasses.replace(result, out=out, file_bytes=packed.file_bytes)
    write_run_record(out, time.monotonic() - started, resumed=options.resume)
    return result


def convert(checkpoint: Checkpoint, out: Path, options: RunOptions) -> Converted:
    """Write a checkpoint again in ``options.storage``, bit for bit the same weights."""
    check_folder(out, checkpoint.folder)
    check_output(out, resume=options.resume, overwrite=options.overwrite)
    return convert_checkpoint(
        checkpoint,
        out,
        options.storage,
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
    started = time.monotonic()
    check_options(checkpoint, out, options)
    if original is not None:
        check_folder(out, original.folder)
    result = recover_checkpoint(
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
    write_run_record(out, time.monotonic() - started, resumed=options.resume)
    return result


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
    if recipe.tune is not None:
        return _run_best(checkpoint, recipe, out, options, started)
    check_recipe(checkpoint, recipe)
    tokens = calibration_tokens(checkpoint, recipe)
    kept = stats_file or partial_folder(out).with_suffix(".stats.safetensors")
    work = kept.with_name(kept.name + ".work")
    if options.overwrite and not options.resume and work.is_dir():
        shutil.rmtree(work)
    if stats_file is not None and kept.is_file():
        stats = load_stats(kept)
    elif options.resume and kept.is_file():
        stats = resumed_stats(kept, tokens)
    else:
        stats = measure(checkpoint, recipe, tokens, options, work)
        save_stats(stats, kept)
    decided = plan(checkpoint, recipe, stats, options.max_shard_bytes)
    result = cut(
        checkpoint, decided, out, options, tokens, where=recipe.name, stats=stats
    )
    if stats_file is None:
        kept.unlink()
    verified = verify(out, checkpoint, options.report)
    write_run_record(out, time.monotonic() - started, resumed=options.resume)
    return decided, result, verified


def _run_best(
    checkpoint: Checkpoint, recipe: Recipe, out: Path, options: RunOptions, began: float
) -> tuple[CutPlan, CutResult, Verified]:
    """Search for a plan and carry it out; the plan found survives a kill."""
    found = partial_folder(out).with_suffix(".plan.json")
    work = found.with_name(found.name + ".work")
    if options.overwrite and not options.resume:
        found.unlink(missing_ok=True)
        if work.is_dir():
            shutil.rmtree(work)
    if not (options.resume and found.is_file()):
        save_plan(tune(checkpoint, recipe, options, work=work).best.plan, found)
    decided = load_plan(found)
    result = cut(checkpoint, decided, out, options, where=recipe.name)
    found.unlink()
    if work.is_dir():
        shutil.rmtree(work)
    verified = verify(out, checkpoint, options.report)
    write_run_record(out, time.monotonic() - began, resumed=options.resume)
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
        dense = dataclasses.replace(options, storage="dense")
        run(checkpoint, first, between, dense)
    between_opened = open_checkpoint(between, trust_code=checkpoint.trust_code)
    result = run(between_opened, second, out, options)
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
    "measuring_tokens",
    "parse_storage_name",
    "plan",
    "plan_sweep",
    "recover",
    "run",
    "save_plan",
    "tune",
    "verify",
]
