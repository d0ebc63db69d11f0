"""Where recipes come from: shipped ones, YAML files, and flags put over them."""

from collections.abc import Mapping
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..files.regular import KIB, Kind
from ..files.yaml_file import parse_yaml, read_yaml
from .calibration import parse_texts
from .old_spelling import current_spelling
from .schema import Recipe, parse_recipe

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


# Flag of the command line -> where it goes in the recipe.
FLAGS = {
    "total": ("total_sparsity",),
    "drop": ("experts", "drop"),
    "keep": ("experts", "keep"),
    "budget": ("experts", "budget"),
    "slim": ("slim", "method"),
    "routing": ("routing",),
    "calibration": ("calibration", "source"),
    "samples": ("calibration", "samples"),
    "sequence_length": ("calibration", "sequence_length"),
    "seed": ("calibration", "seed"),
    "heldout": ("calibration", "heldout"),
    "judge_on": ("calibration", "heldout_source"),
}

TEXTS = {"calibration": "--calibration", "judge_on": "--judge-on"}
"""Flags that name texts, each perhaps several times."""


def with_overrides(recipe: Recipe, flags: Mapping[str, Any]) -> Recipe:
    """The recipe with the flags that are not None put over it, validated again."""
    data = recipe.model_dump()
    # Of a repeatable flag that was not given Typer makes an empty list.
    given = {
        name: value
        for name, value in flags.items()
        if value is not None and value != []
    }
    for name, value in given.items():
        if name in TEXTS and isinstance(value, list):
            value = parse_texts(value, TEXTS[name])
        *path, last = FLAGS[name]
        target = data
        for key in path:
            target = target[key]
        target[last] = value
    # A flag replaces the recipe's own way of saying the same thing.
    if "keep" in given and "drop" not in given:
        data["experts"]["drop"] = None
    if "drop" in given and "keep" not in given:
        data["experts"]["keep"] = None
    if "drop" in given or "keep" in given:
        data["structured_share"] = None
    if "total" in given:
        data["slim"]["sparsity"] = None
    if given.get("slim") == "none" and "total" not in given:
        data["total_sparsity"] = data["structured_share"] = None
    idle = given.keys() & {"drop", "keep"}
    if idle and data["experts"]["method"] == "none":
        raise RecipeError(
            f"recipe {recipe.name}: {min(idle)} does nothing, because experts.method "
            "is none. Choose a recipe that removes experts, such as stun40."
        )
    return parse_recipe(data, recipe.name)


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
    if key in FLAGS:
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


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB (decimal) or 2GiB (binary)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    cleaned = text.strip().upper()
    for unit in sorted(units, key=len, reverse=True):
        number = cleaned.removesuffix(unit)
        if number != cleaned:
            break
    else:
        number, unit = cleaned, ""
    try:
        # float takes nan and inf; int refuses them.
        size = int(float(number) * units.get(unit, 1))
    except (ValueError, OverflowError) as error:
        raise RecipeError(f"{text!r} is not a size; write e.g. 5GB or 2GiB.") from error
    if size < 1:
        raise RecipeError(f"{text!r}: a size must be positive.")
    return size
