"""Arguments and flags that several commands share."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..recipes.schema import Recipe

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
RecipeName = Annotated[str, flag("Shipped recipe, or path of a YAML file.")]
Total = Annotated[
    float | None, flag("Share of the expert parameters to remove or zero, 0 to 1.")
]
Drop = Annotated[float | None, flag("Share of the experts to remove, 0 to 1.")]
Keep = Annotated[int | None, flag("Experts to keep per layer (the mean if global).")]
Budget = Annotated[
    str | None,
    flag("Split over layers: global, per-layer (all equal) or sensitivity (measured)."),
]
Slim = Annotated[
    str | None,
    flag(
        "Zeros in kept experts by: wanda, wanda-variant, magnitude, sparsegpt or none."
    ),
]
Routing = Annotated[
    str | None,
    flag(
        "Router rows of removed experts: drop (delete), or redirect (send their tokens "
        "to the kept expert of the cluster)."
    ),
]
Text = Annotated[
    list[str] | None,
    flag(
        "Calibration text: a .txt, .json, .jsonl (each also .gz) or .parquet file, "
        "or hub:NAME[/CONFIG]. Several: NAME=TEXT each, or NAME:WEIGHT=TEXT.",
        "--calibration",
    ),
]
Samples = Annotated[int | None, flag("Number of calibration windows.")]
Length = Annotated[int | None, flag("Tokens per calibration window.")]
Seed = Annotated[int | None, flag("Seed for choosing the calibration windows.")]
Device = Annotated[str, flag("Device of the forward pass: cpu or cuda.")]
Resume = Annotated[bool, flag("Continue an interrupted run.", "--resume")]
Overwrite = Annotated[
    bool,
    flag("Replace an existing output once the new one is complete.", "--overwrite"),
]
ShardSize = Annotated[
    str, flag("Maximum size of a shard, e.g. 5GB (decimal, as on the Hub).")
]
StoredAs = Annotated[
    str,
    flag(
        "Storage of expert weights: dense, or bitmask (zeros are not stored).",
        "--storage",
        "--layout",
    ),
]


def load_with(recipe: str, **overrides: object) -> "Recipe":
    """The named recipe with the flags that were given put over it."""
    from ..recipes.loading import load_recipe, with_overrides

    return with_overrides(load_recipe(recipe), overrides)
