"""Where recipes come from: shipped ones, YAML files, wishes, and sweeps over them."""

import logging
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..files.regular import KIB, Kind
from ..files.yaml_file import parse_yaml, read_yaml
from .flags import recipe_flags, with_overrides
from .old_spelling import current_spelling
from .schema import Recipe, parse_recipe

log = logging.getLogger(__name__)

ALIASES = {"stun40": ("stun40-paper", "cpu40"), "stun65": ("stun65-paper", "cpu65")}
"""Other names of shipped recipes, and what loses less."""
WISHES = {
    "any": ("default",),
    "cpu": ("cpu50",),
    "gpu": ("gpu", "gpu-fp8", "gpu-int4"),
    "stock-vllm": ("stock-vllm", "stock-vllm-mean"),
}
"""What each wish means: the first that the family's routers allow and that fits into
the bytes given, if any are."""

RECIPE = Kind(
    name="recipe", max_bytes=256 * KIB, error=RecipeError, remedy="Mend that place."
)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files(__package__)
    return sorted(
        item.name.removesuffix(".yaml")
        for item in folder.iterdir()
        if item.name.endswith(".yaml")
    )


def load_recipe(name_or_path: str) -> Recipe:
    """Read a shipped recipe by name, or any YAML file."""
    if alias := ALIASES.get(name_or_path):
        name_or_path, better = alias
        log.warning(
            "%s is STUN as published; %s loses less at the same size.",
            name_or_path,
            better,
        )
    path = Path(name_or_path)
    shipped = resources.files(__package__) / f"{name_or_path}.yaml"
    # A shipped name wins over a file called so; ./NAME means the file.
    known = name_or_path in shipped_recipes()
    if not known and (path.is_dir() or not path.exists()):
        raise RecipeError(
            f"recipe {name_or_path!r}: no such file, and no shipped recipe has "
            f"that name. Shipped: {', '.join(shipped_recipes())}."
        )
    data = parse_yaml(shipped.read_bytes()) if known else read_yaml(path, RECIPE)
    where = f"recipe {name_or_path}"
    return parse_recipe(current_spelling(data, where), name_or_path)


def wished(
    recipe: str | None, wish: str | None, *, search: bool = False
) -> list[Recipe]:
    """The recipes that a command line names, of which the first that fits is meant.

    Args:
        recipe: What ``--recipe`` says.
        wish: What ``--for`` says.
        search: Whether the command searches for its plan.

    Raises:
        RecipeError: Both are given, or one is unknown.
    """
    if wish is not None and wish not in WISHES:
        raise RecipeError(f"--for {wish!r} is not one of: {', '.join(WISHES)}.")
    if search and recipe is None:
        recipe = "best"
    if wish == "stock-vllm" and recipe == "best":
        raise RecipeError(
            "--for stock-vllm is a recipe of its own; leave out --recipe, and use "
            "`run` or `plan`, which do not search."
        )
    if recipe is None:
        return [load_recipe(name) for name in WISHES[wish or "any"]]
    if wish is None:
        return [load_recipe(recipe)]
    if recipe != "best":
        raise RecipeError(
            f"--for {wish} chooses the recipe; leave out --recipe {recipe}, or --for."
        )
    return [load_recipe(f"best-{wish}")]


# What a sweep varies -> where it goes in the recipe, and what else then has no say.
SWEPT: dict[str, tuple[str, ...]] = {
    "total": ("total_sparsity",),
    "drop": ("experts", "drop"),
    "keep": ("experts", "keep"),
    "share": ("structured_share",),
    "moe-count": ("layers", "moe_count"),
    "block-count": ("layers", "block_count"),
}
INSTEAD: dict[str, dict[str, Any]] = {
    "share": {"experts": {"drop": None, "keep": None}},
    "moe-count": {"layers": {"drop_moe": (), "moe_share": None}},
    "block-count": {"layers": {"drop_blocks": (), "block_share": None}},
}
WHOLE = ("keep", "moe-count", "block-count")
MOST_SWEPT = 1000


def swept(recipe: Recipe, sweep: str) -> list[Recipe]:
    """One recipe for each value of ``KEY=FIRST:LAST:STEP``, named after the value.

    Raises:
        RecipeError: The sweep, or a recipe with one of its values, makes no sense.
    """
    key, _, values = sweep.partition("=")
    try:
        # Decimal: in floats 0.1 steps would miss LAST by rounding.
        first, last, step = (Decimal(part) for part in values.split(":"))
        count = int((last - first) / step) + 1 if step > 0 else 0
        if not step.is_finite():
            raise ValueError(step)
    except (ValueError, ArithmeticError) as error:
        raise RecipeError(
            f"sweep {sweep!r}: write KEY=FIRST:LAST:STEP, such as total=0.2:0.7:0.1."
        ) from error
    if key not in SWEPT or not 1 <= count <= MOST_SWEPT:
        raise RecipeError(
            f"sweep {sweep!r}: sweeps {', '.join(SWEPT)} upwards, in at most "
            f"{MOST_SWEPT:,} steps."
        )
    numbers = [first + at * step for at in range(count)]
    if key in WHOLE and any(number != int(number) for number in numbers):
        raise RecipeError(f"sweep {sweep!r}: {key} takes whole numbers.")
    return [_with_value(recipe, key, number) for number in numbers]


def _with_value(recipe: Recipe, key: str, number: Decimal) -> Recipe:
    named = recipe.model_copy(update={"name": f"{recipe.name}-{key}-{number}"})
    value = int(number) if key in WHOLE else float(number)
    if key in recipe_flags():
        return with_overrides(named, {key: value})
    data = named.model_dump()
    for part, values in INSTEAD[key].items():
        data[part] |= values
    *path, last = SWEPT[key]
    target = data
    for name in path:
        target = target[name]
    target[last] = value
    return parse_recipe(data, named.name)
