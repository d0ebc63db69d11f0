"""The commands that make a checkpoint from a checkpoint."""

import time
from pathlib import Path
from typing import Annotated

import typer

from .flags import (
    REPEAT,
    RESUME,
    AllowLinks,
    Device,
    Json,
    Overwrite,
    Resume,
    Revision,
    ShardSize,
    Source,
    Text,
    TrustCode,
    chosen_device,
    flag,
)
from .recipe_flags import Asked, takes_recipe


def inspect(
    source: Source,
    revision: Revision = None,
    allow_links: AllowLinks = False,
    as_json: Json = False,
) -> None:
    """Show family, sizes and experts of a checkpoint; reads headers only.

    Example: `vllm-moe-prune inspect mistralai/Mixtral-8x7B-v0.1`
    """
    from ..checkpoint.source import open_headers
    from .output.show import show_checkpoint

    show_checkpoint(open_headers(source, revision, allow_links=allow_links), as_json)


@takes_recipe()
def measure(
    asked: Asked,
    source: Source,
    output: Annotated[Path, flag("Statistics file to write.", "--output", "-o")],
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    allow_links: AllowLinks = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Collect the statistics that `plan` needs for a recipe.

    Recipes that use router rows only need no text and no forward pass.

    Example: `vllm-moe-prune measure CKPT -o stats.safetensors --calibration c4.txt`

    On several processes: `torchrun --nproc-per-node 4 -m vllm_moe_prune measure ...`
    """
    from .. import pipeline
    from ..checkpoint.output_path import check_file
    from ..checkpoint.source import open_checkpoint
    from ..ranks.group import joined
    from .output.draw import resumable, watching
    from .output.show import show_stats

    with joined() as ranks:
        checkpoint = open_checkpoint(
            source, revision, trust_code=trust_remote_code, allow_links=allow_links
        )
        device = chosen_device(device)
        pipeline.validate_input(checkpoint, device)
        check_file(output, checkpoint.folder)
        recipe = asked.recipe_for(checkpoint)
        # None where no decision of the recipe needs data.
        tokens = pipeline.measuring_tokens(checkpoint, recipe)
        with resumable(REPEAT), watching(as_json or ranks.rank > 0) as report:
            options = pipeline.RunOptions(device=device, report=report, ranks=ranks)
            stats = pipeline.measure_into(output, checkpoint, recipe, tokens, options)
        if ranks.rank == 0:
            show_stats(checkpoint, stats, output, as_json)


@takes_recipe()
def plan(
    asked: Asked,
    source: Source,
    output: Annotated[Path, flag("Plan file to write.", "--output", "-o")],
    stats: Annotated[
        Path | None, flag("Statistics of `measure`; needed to remove experts.")
    ] = None,
    revision: Revision = None,
    allow_links: AllowLinks = False,
    shard_size: ShardSize = "5GB",
    sweep: Annotated[
        str | None,
        flag(
            "One plan per value, KEY=FIRST:LAST:STEP, e.g. total=0.2:0.7:0.1; -o is a "
            "folder then."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Decide what to remove and predict the size to the byte; writes no weights.

    Example: `vllm-moe-prune plan CKPT --stats stats.safetensors --total 0.5 -o p.json`

    `--blend code=0.5,chat=0.5` weighs the sources of the statistics anew, without
    another pass.

    `--sweep total=0.2:0.7:0.1` writes one plan per value, all from one measurement.
    """
    from .. import pipeline
    from ..calibrate.stats_file import load_stats
    from ..checkpoint.output_path import check_file, check_folder
    from ..checkpoint.source import open_checkpoint
    from ..recipes.loading import swept
    from ..recipes.numbers import parse_size
    from .output.show import note_dense_zeros, show_plan
    from .output.show_search import show_sweep

    max_shard_bytes = parse_size(shard_size)
    checkpoint = open_checkpoint(source, revision, allow_links=allow_links)
    if sweep is None:
        check_file(output, checkpoint.folder)
    else:
        check_folder(output, checkpoint.folder)
    loaded = load_stats(stats) if stats is not None else None
    recipe = asked.recipe_for(checkpoint)
    if sweep is not None:
        # All from one measurement: decisions read statistics, never weights.
        recipes = swept(recipe, sweep)
        plans = pipeline.plan_sweep(
            checkpoint, recipes, loaded, output, max_shard_bytes
        )
        show_sweep(plans, as_json)
        return
    decided = pipeline.plan(checkpoint, recipe, loaded, max_shard_bytes)
    pipeline.save_plan(decided, output)
    show_plan(checkpoint, decided, output, as_json)
    note_dense_zeros(decided)


def cut(
    source: Source,
    plan: Annotated[Path, flag("Plan file to execute.")],
    output: Annotated[Path, flag("Output folder.", "--output", "-o")],
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    allow_links: AllowLinks = False,
    calibration: Text = None,
    stats: Annotated[
        Path | None,
        flag("Statistics behind the plan; needed where it puts means in their place."),
    ] = None,
    device: Device = "auto",
    storage: Annotated[
        str | None,
        flag(
            "Storage of expert weights: dense, or bitmask (zeros are not stored). "
            "Default: what the plan's recipe says.",
            "--storage",
            "--layout",
        ),
    ] = None,
    shard_size: ShardSize = "5GB",
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Execute a plan in one streaming pass; holds one layer in memory.

    Example: `vllm-moe-prune cut CKPT --plan plan.json -o OUT`

    On several processes: `torchrun --nproc-per-node 4 -m vllm_moe_prune cut ...`
    """
    from .. import pipeline
    from ..calibrate.stats_file import load_stats
    from ..checkpoint.source import open_checkpoint
    from ..decide.cut_plan import load_plan
    from ..ranks.group import joined
    from ..recipes.calibration import parse_texts
    from ..recipes.numbers import parse_size
    from .output.draw import resumable, watching
    from .output.show import note_dense_zeros, show_cut

    started = time.monotonic()
    stored = pipeline.parse_storage_name(storage) if storage is not None else None
    max_shard_bytes = parse_size(shard_size)
    text = parse_texts(calibration, "--calibration") if calibration else None
    with joined() as ranks:
        decided = load_plan(plan)
        device = chosen_device(device)
        checkpoint = open_checkpoint(
            source, revision, trust_code=trust_remote_code, allow_links=allow_links
        )
        with resumable(RESUME), watching(as_json or ranks.rank > 0) as report:
            options = pipeline.RunOptions(
                device=device,
                resume=resume,
                overwrite=overwrite,
                max_shard_bytes=max_shard_bytes,
                report=report,
                storage=stored,
                ranks=ranks,
            )
            result = pipeline.cut(
                checkpoint,
                decided,
                output,
                options,
                text=text,
                where=str(plan),
                stats=load_stats(stats) if stats is not None else None,
            )
        if ranks.rank == 0:
            elapsed = time.monotonic() - started
            show_cut(checkpoint, decided, result, elapsed, as_json)
            note_dense_zeros(decided, stored)


def convert(
    source: Source,
    output: Annotated[Path, typer.Argument(help="Output folder.")],
    storage: Annotated[
        str,
        flag("bitmask (zeros are not stored) or dense.", "--storage", "--layout"),
    ] = "dense",
    spelling: Annotated[
        str,
        flag(
            "Layers that differ: moe-prune (for the plugin) or stock-vllm (for vLLM "
            "from 0.33 on without it)."
        ),
    ] = "moe-prune",
    revision: Revision = None,
    allow_links: AllowLinks = False,
    shard_size: ShardSize = "5GB",
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Store a checkpoint otherwise, the same weights; reads what other tools cut.

    Example: `vllm-moe-prune convert DENSE OUT --storage bitmask`

    Uneven checkpoints of other tools (lists of counts, `per_layer_num_experts`,
    `block_configs`, `approximate_experts`, ...) are written as this tool's, for the
    plugin to serve.
    """
    from .. import pipeline
    from ..checkpoint.source import open_checkpoint
    from ..recipes.numbers import parse_size
    from .output.draw import resumable, watching
    from .output.show import show_converted

    stored = pipeline.parse_storage_name(storage)
    spelled = pipeline.parse_spelling_name(spelling)
    max_shard_bytes = parse_size(shard_size)
    checkpoint = open_checkpoint(source, revision, allow_links=allow_links)
    with resumable(RESUME), watching(as_json) as report:
        options = pipeline.RunOptions(
            device="cpu",
            resume=resume,
            overwrite=overwrite,
            max_shard_bytes=max_shard_bytes,
            report=report,
            storage=stored,
            spelling=spelled,
        )
        result = pipeline.convert(checkpoint, output, options)
    show_converted(result, as_json)


def verify(
    output: Annotated[Path, typer.Argument(help="A pruned checkpoint folder.")],
    source: Annotated[
        str | None, flag("Compare every tensor with this original.")
    ] = None,
    revision: Revision = None,
    allow_links: AllowLinks = False,
    as_json: Json = False,
) -> None:
    """Check a pruned checkpoint: shapes, remap table, hashes of all weights, source.

    All weights are read, and compared with the hashes taken when they were written;
    with --source also with the original, tensor by tensor.

    Example: `vllm-moe-prune verify OUT --source CKPT`
    """
    from .. import pipeline
    from ..checkpoint.source import open_checkpoint
    from .output.draw import watching
    from .output.show import show_verified

    original = (
        open_checkpoint(source, revision, allow_links=allow_links)
        if source is not None
        else None
    )
    with watching(as_json) as report:
        verified = pipeline.verify(output, original, report, allow_links=allow_links)
    show_verified(verified, as_json)


@takes_recipe()
def run(
    asked: Asked,
    source: Source,
    output: Annotated[Path, typer.Argument(help="Output folder.")],
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    allow_links: AllowLinks = False,
    stats: Annotated[
        Path | None, flag("Statistics file: read if it exists, otherwise written.")
    ] = None,
    device: Device = "auto",
    shard_size: ShardSize = "5GB",
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure, plan, cut and verify; --resume continues an interrupted run.

    Example: `vllm-moe-prune run CKPT OUT --for cpu --total 0.5 --calibration c4.txt`

    On several processes: `torchrun --nproc-per-node 4 -m vllm_moe_prune run ...`
    """
    from .. import pipeline
    from ..checkpoint.source import open_checkpoint
    from ..ranks.group import joined
    from ..recipes.numbers import parse_size
    from .output.draw import resumable, watching
    from .output.show import note_dense_zeros, show_cut, show_plan

    started = time.monotonic()
    max_shard_bytes = parse_size(shard_size)
    with joined() as ranks:
        device = chosen_device(device)
        checkpoint = open_checkpoint(
            source, revision, trust_code=trust_remote_code, allow_links=allow_links
        )
        recipe = asked.recipe_for(checkpoint)
        with resumable(RESUME), watching(as_json or ranks.rank > 0) as report:
            options = pipeline.RunOptions(
                device=device,
                resume=resume,
                overwrite=overwrite,
                max_shard_bytes=max_shard_bytes,
                report=report,
                ranks=ranks,
            )
            decided, result, _ = pipeline.run(
                checkpoint, recipe, output, options, stats
            )
        if ranks.rank:
            return
    if not as_json:
        path = output / "plan.json"
        show_plan(checkpoint, decided, path, as_json=False, brief=True)
    show_cut(checkpoint, decided, result, time.monotonic() - started, as_json)
    note_dense_zeros(decided)
