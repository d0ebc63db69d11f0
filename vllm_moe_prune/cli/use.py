"""The commands for what was made: serving, judging and showing it."""

from pathlib import Path
from typing import Annotated

import typer

from .flags import (
    Device,
    Json,
    Revision,
    Source,
    flag,
)


def serve(
    context: typer.Context,
    source: Source,
    revision: Revision = None,
    plan: Annotated[
        Path | None, flag("Prune the original while loading; nothing is written.")
    ] = None,
    watch: Annotated[
        bool, flag("Add /plugins/moe-prune/: report, tables, live routing load.")
    ] = False,
    dry_run: Annotated[
        bool, flag("Print the command, don't run it.", "--dry-run")
    ] = False,
) -> None:
    """Check a checkpoint and become `vllm serve` for it; other flags go to vLLM.

    Example: `vllm-moe-prune serve ./mixtral-stun40 --port 8000 --max-model-len 4096`
    """
    import shlex

    from ..draw import err
    from ..serve_command import run_server, serve_command

    command = serve_command(source, revision, plan, context.args, watch=watch)
    if dry_run:
        typer.echo(shlex.join(command))
        return
    err.print(f"+ {shlex.join(command)}", style="dim")
    run_server(command)


def evaluate(
    source: Source,
    text: Annotated[
        list[str],
        flag("Held-out text or .jsonl file, or hub:NAME[/CONFIG]; repeatable."),
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
    from ..checkpoint.source import open_checkpoint
    from ..draw import watching
    from ..evaluate import perplexity
    from ..pipeline import check_device
    from ..show import show_perplexities

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


def report(
    output: Annotated[Path, typer.Argument(help="A pruned checkpoint folder.")],
    stats: Annotated[
        list[Path] | None,
        flag("Statistics of the source, for what OUTPUT does not keep; repeatable."),
    ] = None,
    html: Annotated[
        Path | None, flag("The page; OUTPUT.report.html beside it if not given.")
    ] = None,
    png: Annotated[
        Path | None, flag("A folder for PNG files too; needs matplotlib.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw what a run did: one HTML page, self-contained; with --png pictures too.

    Example: `vllm-moe-prune report OUT`
    """
    from ..checkpoint.place import check_file, check_folder
    from ..report.figures import write_figures
    from ..report.page import write_page
    from ..report.read import read_numbers
    from ..show import show_report

    folder = output.resolve()
    beside = output.parent if output.name else folder.parent
    page = html or beside / f"{folder.name}.report.html"
    check_file(page, folder)
    if png is not None:
        check_folder(png, folder)
    numbers = read_numbers(output, stats or ())
    pictures = write_figures(numbers, png) if png is not None else []
    write_page(numbers, page)
    show_report(numbers, page, pictures, as_json)
