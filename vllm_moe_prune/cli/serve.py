"""The commands for what was made: serving and showing it."""

from pathlib import Path
from typing import Annotated

import typer

from .flags import AllowLinks, Json, Revision, flag


def serve(
    context: typer.Context,
    model: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint folder, or Hub id owner/name; then options of vLLM.",
        ),
    ],
    revision: Revision = None,
    allow_links: AllowLinks = False,
    plan: Annotated[
        Path | None, flag("Prune the original by this plan while it loads.")
    ] = None,
    watch: Annotated[
        bool, flag("Add /plugins/moe-prune/: report, remap table, live routing load.")
    ] = False,
    cores: Annotated[
        str,
        flag(
            "On CPUs, the cores that compute: auto, vllm (as it does by itself), or a "
            "list such as 0-3."
        ),
    ] = "auto",
    preload: Annotated[
        bool,
        typer.Option(help="On CPUs, load tcmalloc first where it is installed."),
    ] = True,
    dry_run: Annotated[
        bool, flag("Print the vLLM command and exit.", "--dry-run")
    ] = False,
) -> None:
    """Check a checkpoint, then run `vllm serve` on it.

    Every option that is not listed here is passed on to vLLM as it is, before or after
    MODEL: `vllm serve --help=all` lists them.

    Example: `vllm-moe-prune serve ./mixtral-stun40 --port 8000 --max-model-len 4096`
    """
    import shlex

    from ..plugin.launch import run_server, serve_command, split_model
    from ..plugin.machine import settings
    from .output.draw import err

    # Unknown options pass through to vLLM, so -h arrives as MODEL.
    if model == ["-h"]:
        typer.echo(context.get_help())
        return
    source, flags = split_model(model)
    environment, chosen = settings(flags, cores=cores, preload=preload)
    command = serve_command(
        source,
        revision,
        plan,
        flags,
        watch=watch,
        allow_links=allow_links,
        environment=environment,
    )
    if dry_run:
        typer.echo(shlex.join(command))
        return
    if chosen:
        err.print(f"CPU: {chosen}", style="dim")
    err.print(f"+ {shlex.join(command)}", style="dim")
    run_server(command)


def report(
    output: Annotated[Path, typer.Argument(help="A pruned checkpoint folder.")],
    stats: Annotated[
        list[Path] | None,
        flag("Statistics of the source, if OUTPUT has none; repeatable."),
    ] = None,
    html: Annotated[
        Path | None, flag("Page to write. Default: OUTPUT.report.html beside OUTPUT.")
    ] = None,
    png: Annotated[
        Path | None, flag("Folder for PNG files as well; needs matplotlib.")
    ] = None,
    allow_links: AllowLinks = False,
    as_json: Json = False,
) -> None:
    """Report on a pruned checkpoint: one self-contained HTML page, PNGs with --png.

    Example: `vllm-moe-prune report OUT`
    """
    from ..checkpoint.output_path import check_file, check_folder
    from ..report.figures import write_figures
    from ..report.page import write_page
    from ..report.read import read_numbers
    from .output.show_reported import show_report

    folder = output.resolve()
    # `.` has no name: its page goes beside the folder it stands for.
    beside = output.parent if output.name else folder.parent
    page = html or beside / f"{folder.name}.report.html"
    check_file(page, folder)
    if png is not None:
        check_folder(png, folder)
    numbers = read_numbers(output, stats or (), allow_links=allow_links)
    # First: a missing matplotlib is told of before anything is written.
    pictures = write_figures(numbers, png) if png is not None else []
    write_page(numbers, page)
    show_report(numbers, page, pictures, as_json)
