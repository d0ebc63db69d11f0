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
Json = Annotated[bool, flag("Print JSON instead of tables.", "--json")]
RecipeName = Annotated[str, flag("A shipped recipe, or the path of a YAML file.")]
Total = Annotated[
    float | None, flag("Total sparsity of the expert parameters, 0 to 1.")
]
Drop = Annotated[float | None, flag("Share of the experts to remove, 0 to 1.")]
Keep = Annotated[int | None, flag("Experts to keep per layer (a mean if global).")]
Budget = Annotated[str | None, flag("global (uneven layers) or per-layer (uniform).")]
Slim = Annotated[str | None, flag("wanda, magnitude or none, inside the survivors.")]
Routing = Annotated[str | None, flag("drop (router rows go) or redirect (they stay).")]
Text = Annotated[
    str | None,
    flag(
        "Text to calibrate on: a .txt, .json, .jsonl (each also .gz) or .parquet file, "
        "or hub:NAME[/CONFIG]."
    ),
]
Samples = Annotated[int | None, flag("Calibration windows.")]
Length = Annotated[int | None, flag("Tokens per calibration window.")]
Seed = Annotated[int | None, flag("Chooses the calibration windows.")]
Device = Annotated[str, flag("Where the forward pass runs: cpu, cuda.")]
Resume = Annotated[bool, flag("Continue an interrupted run.", "--resume")]
Overwrite = Annotated[
    bool,
    flag("Replace an existing output once the new one is complete.", "--overwrite"),
]
ShardSize = Annotated[
    str, flag("Largest output file, e.g. 5GB (decimal, as on the Hub).")
]
StoredAs = Annotated[
    str,
    flag(
        "How expert weights are stored: dense, or bitmask (without zeros).",
        "--storage",
        "--layout",
    ),
]


def load_with(recipe: str, **overrides: object) -> "Recipe":
    """The named recipe with the flags that were given put over it."""
    from ..recipes.loading import load_recipe, with_overrides

    return with_overrides(load_recipe(recipe), overrides)
