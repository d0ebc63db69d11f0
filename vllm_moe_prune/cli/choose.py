"""The commands that help to choose: a recipe, or the best plan for a size."""

import time
from pathlib import Path
from typing import Annotated

import typer

from .flags import (
    REPEAT,
    AllowLinks,
    Device,
    Json,
    Revision,
    ShardSize,
    Source,
    TrustCode,
    chosen_device,
    flag,
)
from .recipe_flags import WISH, Asked, takes_recipe


def recipes(as_json: Json = False) -> None:
    """List the shipped recipes and what each is for.

    Example: `vllm-moe-prune recipes`
    """
    from ..recipes.loading import load_recipe, shipped_recipes
    from .output.show_search import show_recipes

    show_recipes([load_recipe(name) for name in shipped_recipes()], as_json)


def families(as_json: Json = False) -> None:
    """List the model families: what serves them, what is refused, what is tested.

    Example: `vllm-moe-prune families`
    """
    from ..archs.support import family_support
    from .output.show_families import show_families

    show_families(family_support(), as_json)


def recommend(
    source: Source,
    revision: Revision = None,
    allow_links: AllowLinks = False,
    wish: Annotated[str | None, flag(WISH, "--for")] = None,
    memory: Annotated[
        str | None,
        flag("Maximum size of the weights, e.g. 24GiB.", "--memory", "--bytes"),
    ] = None,
    total: Annotated[
        float | None, flag("Share of the expert parameters that leaves for --for.")
    ] = None,
    speed: Annotated[
        str | None, flag("Minimum reduction of the bytes read per token, e.g. 2x.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the recipes that meet a memory or speed limit; reads headers only.

    Speed is estimated from the bytes of weights read per token at batch 1, which
    bound decoding. Nothing is measured. With --for, recipes that save nothing where
    the output is served are left out, and its own is made as small as --bytes or
    --total says.

    Example: `vllm-moe-prune recommend mistralai/Mixtral-8x7B-v0.1 --memory 24GiB`

    Example: `vllm-moe-prune recommend CKPT --speed 2x --json`
    """
    from ..checkpoint.source import open_headers
    from ..errors import RecipeError
    from ..recipes.flags import with_overrides
    from ..recipes.loading import load_recipe, shipped_recipes, wished
    from ..recipes.numbers import parse_size
    from ..tune import recommend as choosing
    from ..tune.wishes import first_that_fits, saves_for
    from .output.show_search import show_recommended

    if memory is None and speed is None and wish is None:
        raise RecipeError("say what for: --for cpu, --memory 24GiB or --speed 2x.")
    # Limits are read before the Hub is asked for headers.
    size = parse_size(memory) if memory is not None else None
    times = choosing.parse_speed(speed) if speed is not None else None
    checkpoint = open_headers(source, revision, allow_links=allow_links)
    recipes = [load_recipe(name) for name in shipped_recipes()]
    recipes = [one for one in recipes if saves_for(one, wish)]
    if wish is not None and (size is not None or total is not None):
        # Its total wins over the bytes, which the list is then held to.
        how = {"bytes": size} if total is None else {"total": total}
        own = [with_overrides(one, how) for one in wished(None, wish)]
        fitting = first_that_fits(checkpoint, own)
        said = f"--for {wish} " + (
            f"--bytes {memory}" if total is None else f"--total {total:g}"
        )
        recipes.append(fitting.model_copy(update={"name": said}))
    found = choosing.recommend(checkpoint, recipes, size, times)
    show_recommended(checkpoint, found, as_json)


@takes_recipe(search=True, without=("bytes",))
def tune(
    asked: Asked,
    source: Source,
    output: Annotated[
        Path,
        flag("Plan file to write; of several sizes a folder.", "--output", "-o"),
    ],
    revision: Revision = None,
    trust_remote_code: TrustCode = False,
    allow_links: AllowLinks = False,
    total: Annotated[
        str | None,
        flag(
            "Share of the expert parameters to remove or zero, 0 to 1; several as "
            "0.4,0.5,0.65."
        ),
    ] = None,
    max_bytes: Annotated[
        str | None,
        flag(
            "Maximum size of the files, e.g. 24GiB, or several; replaces --total.",
            "--bytes",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.0, help="Stop after so long, with the best so far."),
    ] = None,
    plot: Annotated[
        Path | None, flag("Plot size against perplexity into this .png or .svg file.")
    ] = None,
    device: Device = "auto",
    shard_size: ShardSize = "5GB",
    as_json: Json = False,
) -> None:
    """Search for the plan with the least held-out loss at a size; writes no weights.

    Several sizes are one search and cost little more than one; -o is a folder then,
    with a plan of each, total-0.5.json or bytes-24000000000.json.

    Example: `vllm-moe-prune tune CKPT --total 0.5 --calibration c4.txt -o plan.json`

    Example: `vllm-moe-prune tune CKPT --total 0.4,0.5,0.65 -o plans --plot front.svg`

    Then: `vllm-moe-prune cut CKPT --plan plan.json -o OUT`

    On several processes: `torchrun --nproc-per-node 4 -m vllm_moe_prune tune ...`
    """
    from .. import pipeline
    from ..checkpoint.output_path import check_file, check_folder
    from ..checkpoint.source import open_checkpoint
    from ..files.atomic import remove_folder, writing
    from ..ranks.group import joined
    from ..recipes.numbers import parse_size
    from ..tune.estimate import estimate
    from ..tune.front import check_plot, plot_front
    from ..tune.sizes import sizes_of
    from .output.draw import resumable, watching
    from .output.show_search import show_estimate, show_tuned

    with joined() as ranks:
        device = chosen_device(device)
        sizes = sizes_of(asked.recipe, total, max_bytes)
        checkpoint = open_checkpoint(
            source, revision, trust_code=trust_remote_code, allow_links=allow_links
        )
        # Everything is checked before the search, which takes long.
        pipeline.validate_input(checkpoint, device)
        several = len(sizes) > 1
        (check_folder if several else check_file)(output, checkpoint.folder)
        if plot is not None:
            check_file(plot, checkpoint.folder)
            check_plot(plot)
        # Beside the plan, by its name: the same command finds a killed search's work.
        work = output.with_name(output.name + ".work")
        quiet = as_json or ranks.rank > 0
        with resumable(REPEAT), watching(quiet) as report:
            options = pipeline.RunOptions(
                device=device,
                max_shard_bytes=parse_size(shard_size),
                report=report,
                ranks=ranks,
            )
            expected = estimate(checkpoint, asked.recipe, sizes, device)
            began = time.monotonic()
            tuned = pipeline.tune_sizes(
                checkpoint,
                asked.recipe,
                options,
                sizes,
                work=work,
                minutes=minutes,
                started=lambda: None if quiet else show_estimate(expected),
            )
            took_s = time.monotonic() - began
            if ranks.rank:
                return
            if several:
                with writing(output):
                    output.mkdir(parents=True, exist_ok=True)
            plans = [
                output / f"{one.size}.json" if several else output for one in tuned
            ]
            for one, path in zip(tuned, plans, strict=True):
                pipeline.save_plan(one.best.plan, path)
            if plot is not None:
                plot_front(tuned, plot)
            # Last: until plan and plot are written, repeating the command needs it.
            remove_folder(work)
    show_tuned(checkpoint, tuned, plans, expected, took_s, as_json)
