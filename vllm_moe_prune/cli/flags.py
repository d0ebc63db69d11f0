"""Arguments and flags that several commands share."""

from typing import Annotated, Any

import typer

REPEAT = "Run the same command again to continue."
RESUME = "Run the same command with --resume to continue."


def flag(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text)


Source = Annotated[str, typer.Argument(help="Checkpoint folder, or Hub id owner/name.")]
Revision = Annotated[str | None, flag("Branch, tag or commit of a Hub id.")]
TrustCode = Annotated[
    bool,
    flag(
        "Run the checkpoint's own tokenizer code if it has no tokenizer file.",
        "--trust-remote-code",
    ),
]
AllowLinks = Annotated[
    bool,
    flag("Follow symbolic links that lead out of the folder.", "--allow-links"),
]
Json = Annotated[bool, flag("Print JSON instead of tables.", "--json")]
CALIBRATION = (
    "Calibration text: a .txt, .json, .jsonl (each also .gz) or .parquet file, or "
    "hub:NAME[/CONFIG]. Several: NAME=TEXT each, or NAME:WEIGHT=TEXT."
)
Text = Annotated[list[str] | None, flag(CALIBRATION, "--calibration")]
Samples = Annotated[int | None, flag("Number of calibration windows.")]
Length = Annotated[int | None, flag("Tokens per calibration window.")]
Device = Annotated[
    str,
    flag("Device of the forward pass: auto (CUDA if there is one), cpu or cuda."),
]
Resume = Annotated[bool, flag("Continue an interrupted run.", "--resume")]
Overwrite = Annotated[
    bool,
    flag("Replace an existing output once the new one is complete.", "--overwrite"),
]
ShardSize = Annotated[
    str, flag("Maximum size of a shard, e.g. 5GB (decimal, as on the Hub).")
]


def chosen_device(name: str) -> str:
    """The device that ``--device`` means; one line says which if ``auto`` found CUDA.

    Raises:
        RecipeError: There is none of that name.
    """
    from .. import pipeline
    from .output.draw import err

    device = pipeline.device_of(name)
    pipeline.check_device(device)
    if device != name and device != "cpu":
        err.print(f"device: {device} (--device cpu for the CPU)", style="dim")
    return device
