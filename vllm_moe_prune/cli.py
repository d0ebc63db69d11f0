"""The command line: parse, call the pipeline, draw. No decisions are made here."""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from . import __version__
from .errors import Interrupted, MoePruneError, said_by

if TYPE_CHECKING:
    from .recipe import Recipe

# Typer keeps click's exceptions to itself; this one is for wrong command lines.
UsageError: Any = typer.BadParameter.__base__
NAME = "vllm-moe-prune"
REPEAT = "Run the same command again to continue."
RESUME = "Run the same command with --resume to continue."

app = typer.Typer(
    name=NAME,
    help="Prune Mixture-of-Experts checkpoints and serve them with vLLM.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _flag(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text)


Source = Annotated[str, typer.Argument(help="Checkpoint folder, or Hub id owner/name.")]
Revision = Annotated[str | None, _flag("Branch, tag or commit of a Hub id.")]
Json = Annotated[bool, _flag("Print JSON instead of tables.", "--json")]
RecipeName = Annotated[str, _flag("A shipped recipe, or the path of a YAML file.")]
Total = Annotated[
    float | None, _flag("Total sparsity of the expert parameters, 0 to 1.")
]
Drop = Annotated[float | None, _flag("Share of the experts to remove, 0 to 1.")]
Keep = Annotated[int | None, _flag("Experts to keep per layer (a mean if global).")]
Budget = Annotated[str | None, _flag("global (uneven layers) or per-layer (uniform).")]
Slim = Annotated[str | None, _flag("wanda, magnitude or none, inside the survivors.")]
Routing = Annotated[str | None, _flag("drop (router rows go) or redirect (they stay).")]
Text = Annotated[
    str | None, _flag("Text or .jsonl file, or hub:NAME[/CONFIG], to calibrate on.")
]
Samples = Annotated[int | None, _flag("Calibration windows.")]
Length = Annotated[int | None, _flag("Tokens per calibration window.")]
Seed = Annotated[int | None, _flag("Chooses the calibration windows.")]
Device = Annotated[str, _flag("Where the forward pass runs: cpu, cuda.")]
Resume = Annotated[bool, _flag("Continue an interrupted run.", "--resume")]
Overwrite = Annotated[
    bool,
    _flag("Replace an existing output once the new one is complete.", "--overwrite"),
]
ShardSize = Annotated[
    str, _flag("Largest output file, e.g. 5GB (decimal, as on the Hub).")
]


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vllm-moe-prune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print it."),
    ] = False,
    debug: Annotated[bool, _flag("Show tracebacks of errors.", "--debug")] = False,
) -> None:
    if debug:
        os.environ["MOE_PRUNE_DEBUG"] = "1"


@app.command()
def inspect(source: Source, revision: Revision = None, as_json: Json = False) -> None:
    """Show what a checkpoint is and what can be done with it; reads headers only.

    Example: `vllm-moe-prune inspect mistralai/Mixtral-8x7B-v0.1`
    """
    from .checkpoint.source import open_headers
    from .show import show_checkpoint

    show_checkpoint(open_headers(source, revision), as_json)


@app.command()
def measure(
    context: typer.Context,
    source: Source,
    output: Annotated[Path, _flag("Statistics file.", "--output", "-o")],
    revision: Revision = None,
    recipe: RecipeName = "stun40",
    calibration: Text = None,
    samples: Samples = None,
    sequence_length: Length = None,
    seed: Seed = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Collect the statistics that a recipe's decisions need: 0 or 1 forward pass.

    Example: `vllm-moe-prune measure CKPT -o stats.safetensors --calibration c4.txt`
    """
    from . import pipeline
    from .calibrate.stats import save_stats
    from .checkpoint.place import check_file
    from .checkpoint.source import open_checkpoint
    from .draw import resumable, watching
    from .show import show_stats

    asked = _recipe(context)
    pipeline.check_device(device)
    checkpoint = open_checkpoint(source, revision)
    check_file(output, checkpoint.folder)
    tokens = pipeline.measuring_tokens(checkpoint, asked)
    with resumable(REPEAT), watching(as_json) as report:
        options = pipeline.RunOptions(device=device, report=report)
        work = output.with_name(output.name + ".work")
        stats = pipeline.measure(checkpoint, asked, tokens, options, work)
    save_stats(stats, output)
    show_stats(checkpoint, stats, output, as_json)


@app.command()
def plan(
    context: typer.Context,
    source: Source,
    output: Annotated[Path, _flag("Plan file.", "--output", "-o")],
    stats: Annotated[Path | None, _flag("Statistics, where experts are to go.")] = None,
    revision: Revision = None,
    recipe: RecipeName = "stun40",
    total: Total = None,
    drop: Drop = None,
    keep: Keep = None,
    budget: Budget = None,
    slim: Slim = None,
    routing: Routing = None,
    calibration: Text = None,
    samples: Samples = None,
    sequence_length: Length = None,
    seed: Seed = None,
    shard_size: ShardSize = "5GB",
    as_json: Json = False,
) -> None:
    """Decide everything and predict the size to the byte; writes no weights.

    Example: `vllm-moe-prune plan CKPT --stats stats.safetensors --total 0.5 -o p.json`
    """
    from . import pipeline
    from .calibrate.stats import load_stats
    from .checkpoint.place import check_file
    from .checkpoint.source import open_checkpoint
    from .recipe import parse_size
    from .show import show_plan

    asked = _recipe(context)
    max_shard_bytes = parse_size(shard_size)
    checkpoint = open_checkpoint(source, revision)
    check_file(output, checkpoint.folder)
    loaded = load_stats(stats) if stats is not None else None
    decided = pipeline.plan(checkpoint, asked, loaded, max_shard_bytes)
    pipeline.save_plan(decided, output)
    show_plan(checkpoint, decided, output, as_json)


@app.command()
def cut(
    source: Source,
    plan: Annotated[Path, _flag("The plan to execute.")],
    output: Annotated[Path, _flag("Output folder.", "--output", "-o")],
    revision: Revision = None,
    calibration: Text = None,
    device: Device = "cpu",
    shard_size: ShardSize = "5GB",
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Execute a plan in one streaming pass; memory holds a layer, never the model.

    Example: `vllm-moe-prune cut CKPT --plan plan.json -o OUT`
    """
    from . import pipeline
    from .checkpoint.source import open_checkpoint
    from .decide.plan import load_plan
    from .draw import resumable, watching
    from .recipe import parse_size
    from .show import show_cut

    started = time.monotonic()
    max_shard_bytes = parse_size(shard_size)
    decided = load_plan(plan)
    checkpoint = open_checkpoint(source, revision)
    with resumable(RESUME), watching(as_json) as report:
        options = pipeline.RunOptions(
            device, resume, overwrite, max_shard_bytes, report
        )
        result = pipeline.cut(
            checkpoint, decided, output, options, text=calibration, where=str(plan)
        )
    show_cut(checkpoint, decided, result, time.monotonic() - started, as_json)


@app.command()
def verify(
    output: Annotated[Path, typer.Argument(help="A pruned checkpoint folder.")],
    source: Annotated[
        str | None, _flag("Compare every tensor with this original.")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Check a pruned checkpoint: shapes, remap table, and weights against the source.

    Example: `vllm-moe-prune verify OUT --source CKPT`
    """
    from . import pipeline
    from .checkpoint.source import open_checkpoint
    from .draw import watching
    from .show import show_verified

    original = open_checkpoint(source, revision) if source is not None else None
    with watching(as_json) as report:
        verified = pipeline.verify(output, original, report)
    show_verified(verified, as_json)


@app.command()
def run(
    context: typer.Context,
    source: Source,
    output: Annotated[Path, typer.Argument(help="Output folder.")],
    revision: Revision = None,
    recipe: RecipeName = "stun40",
    total: Total = None,
    drop: Drop = None,
    keep: Keep = None,
    budget: Budget = None,
    slim: Slim = None,
    routing: Routing = None,
    calibration: Text = None,
    samples: Samples = None,
    sequence_length: Length = None,
    seed: Seed = None,
    stats: Annotated[
        Path | None, _flag("Use this statistics file, or keep it here.")
    ] = None,
    device: Device = "cpu",
    shard_size: ShardSize = "5GB",
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure, plan, cut and verify in one go; after a kill, add --resume.

    Example: `vllm-moe-prune run mistralai/Mixtral-8x7B-v0.1 ./mixtral-stun40`
    """
    from . import pipeline
    from .checkpoint.source import open_checkpoint
    from .draw import resumable, watching
    from .recipe import parse_size
    from .show import show_cut, show_plan

    started = time.monotonic()
    asked = _recipe(context)
    max_shard_bytes = parse_size(shard_size)
    checkpoint = open_checkpoint(source, revision)
    with resumable(RESUME), watching(as_json) as report:
        options = pipeline.RunOptions(
            device, resume, overwrite, max_shard_bytes, report
        )
        decided, result, _ = pipeline.run(checkpoint, asked, output, options, stats)
    if not as_json:
        show_plan(checkpoint, decided, output / "plan.json", as_json=False, brief=True)
    show_cut(checkpoint, decided, result, time.monotonic() - started, as_json)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def serve(
    context: typer.Context,
    source: Source,
    revision: Revision = None,
    plan: Annotated[
        Path | None, _flag("Prune the original while loading; nothing is written.")
    ] = None,
    dry_run: Annotated[
        bool, _flag("Print the command, don't run it.", "--dry-run")
    ] = False,
) -> None:
    """Check a checkpoint and become `vllm serve` for it; other flags go to vLLM.

    Example: `vllm-moe-prune serve ./mixtral-stun40 --port 8000 --max-model-len 4096`
    """
    import shlex

    from .draw import err
    from .serve_command import run_server, serve_command

    command = serve_command(source, revision, plan, context.args)
    if dry_run:
        typer.echo(shlex.join(command))
        return
    err.print(f"+ {shlex.join(command)}", style="dim")
    run_server(command)


@app.command("eval")
def evaluate(
    source: Source,
    text: Annotated[
        list[str],
        _flag("Held-out text or .jsonl file, or hub:NAME[/CONFIG]; repeatable."),
    ],
    revision: Revision = None,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens per window.")
    ] = 2048,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Judge on at most this many tokens per text."),
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Held-out perplexity by the streaming forward; the model need not fit in memory.

    Example: `vllm-moe-prune eval OUT --text heldout.txt`
    """
    from .checkpoint.source import open_checkpoint
    from .draw import watching
    from .evaluate import perplexity
    from .pipeline import check_device
    from .show import show_perplexities

    check_device(device)
    checkpoint = open_checkpoint(source, revision)
    with watching(as_json) as report:
        results = [
            perplexity(
                checkpoint,
                item,
                sequence_length=sequence_length,
                max_tokens=max_tokens,
                device=device,
                report=report,
            )
            for item in text
        ]
    show_perplexities(results, as_json)


def _recipe(context: typer.Context) -> "Recipe":
    """The named recipe with the flags that were given put over it."""
    from .recipe import FLAGS, load_recipe, with_overrides

    given = context.params
    flags = {name: given[name] for name in FLAGS if name in given}
    return with_overrides(load_recipe(given["recipe"]), flags)


def main() -> None:
    """Entry point: what is refused becomes one line and status 2."""
    try:
        arguments = sys.argv[1:] or ["--help"]
        status = app(arguments, prog_name=NAME, standalone_mode=False) or 0
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else NAME
        said = error.format_message()
        stop = "" if said.endswith((".", "?")) else "."
        _fail("error", f"{said}{stop} See `{command} --help`.", 2)
    except (MoePruneError, OSError) as error:
        if os.environ.get("MOE_PRUNE_DEBUG"):
            raise
        interrupted = isinstance(error, Interrupted)
        label, status = ("interrupted", 130) if interrupted else ("error", 2)
        _fail(label, said_by(error), status)
    if status == 130:  # Typer's word for a Ctrl-C that nobody caught
        _fail("interrupted", "nothing was changed.", status)
    sys.exit(status)


def _fail(label: str, message: str, status: int) -> NoReturn:
    """One line on stderr; what a hostile file had printed stays harmless."""
    line = "".join(sign if sign.isprintable() else " " for sign in message)
    sys.stderr.write(f"{label}: {line}\n")
    sys.exit(status)
