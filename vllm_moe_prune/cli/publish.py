"""The command that publishes an output."""

from pathlib import Path
from typing import Annotated

import typer

from .flags import REPEAT, AllowLinks, Json, flag


def push(
    output: Annotated[Path, typer.Argument(help="A pruned checkpoint folder.")],
    repo: Annotated[str, typer.Argument(help="Hub id OWNER/NAME to upload it to.")],
    private: Annotated[
        bool,
        typer.Option("--private/--public", help="Who may see a new repository."),
    ] = True,
    base_model: Annotated[
        str | None,
        flag("Hub id of the original for the card, if it was cut from a folder."),
    ] = None,
    dry_run: Annotated[
        bool, flag("Verify and list what would be uploaded; send nothing.", "--dry-run")
    ] = False,
    allow_links: AllowLinks = False,
    as_json: Json = False,
) -> None:
    """Upload a verified output to the Hub, its card with scores and serve command.

    The folder is verified first. The same command again continues an interrupted
    upload. Who may write is known from `hf auth login` or HF_TOKEN.

    Example: `vllm-moe-prune push OUT OWNER/NAME --dry-run`
    """
    from .. import pipeline, publish
    from ..checkpoint.source import open_checkpoint
    from .output.draw import err, resumable, watching
    from .output.show_pushed import show_pushed

    parcel = publish.pack(
        open_checkpoint(output, allow_links=allow_links),
        repo,
        private=private,
        base_model=base_model,
    )
    with watching(as_json) as report:
        verified = pipeline.verify(output, None, report, allow_links=allow_links)
    pushed = None
    if not dry_run:
        with resumable(REPEAT):
            pushed = publish.push(parcel, bars=err.is_terminal and not as_json)
    show_pushed(parcel, verified, pushed, as_json)
