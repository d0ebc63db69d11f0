"""The flags of a recipe: one for every key of its schema, and what each implies.

A flag is spelled as its key, ``min_experts`` as ``--min-experts``; keys that say what
their whole stage does are spelled as the stage (``--slim``), and a few are short.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel

from ..errors import RecipeError
from ..files.yaml_file import parse_yaml
from .calibration import parse_blend, parse_texts
from .schema import Recipe, parse_recipe

Path = tuple[str, ...]
NAMES: dict[Path, str] = {
    ("total_sparsity",): "total",
    ("max_bytes",): "bytes",
    ("experts", "method"): "experts",
    ("experts", "seed"): "experts_seed",
    ("narrow", "share"): "narrow",
    ("narrow", "of_total"): "narrow_of_total",
    ("narrow", "multiple"): "narrow_multiple",
    ("narrow", "refit"): "narrow_refit",
    ("narrow", "ridge"): "narrow_ridge",
    ("slim", "method"): "slim",
    ("quantize", "method"): "quantize",
    ("quantize", "weights"): "bits",
    ("calibration", "source"): "calibration",
    ("calibration", "heldout_source"): "judge_on",
}
"""Where a flag is not spelled as its key."""
TEXTS = {"calibration": "--calibration", "judge_on": "--judge-on"}
"""Flags that name texts, each perhaps several times."""
# Not to be said by a flag: what a recipe is called, and what a search varies.
WITHOUT = {("name",), ("description",), ("tune",)}
PANELS = {
    "": "Recipe",
    "experts": "Whole experts",
    "narrow": "Fewer channels",
    "slim": "Zeros",
    "quantize": "Fewer bits",
    "layers": "Layers and blocks",
    "calibration": "Calibration",
}
"""Stage -> how ``--help`` titles its flags."""


@dataclass(frozen=True)
class RecipeFlag:
    """One flag, and the key that it sets."""

    name: str
    path: Path
    type: Any
    """bool, int, float, str, or ``list[str]`` for texts: as Typer reads it."""
    several: bool
    """Whether it takes a list (``3,4``) or a map (``{0: [3]}``)."""
    help: str
    panel: str


@cache
def recipe_flags() -> dict[str, RecipeFlag]:
    """Every flag by its name, in the order of the schema."""
    found = {}
    for key, field in Recipe.model_fields.items():
        stage = field.annotation
        if (key,) in WITHOUT:
            continue
        if isinstance(stage, type) and issubclass(stage, BaseModel):
            for name, inner in stage.model_fields.items():
                path, about = (key, name), inner.description
                # A word that an earlier stage has gets its own stage in front.
                word = NAMES.get(path, name)
                word = f"{key}_{name}" if word in found else word
                found[word] = _flag(word, path, inner.annotation, about)
        else:
            word = NAMES.get((key,), key)
            found[word] = _flag(word, (key,), stage, field.description)
    return found


def _flag(name: str, path: Path, annotation: Any, about: str | None) -> RecipeFlag:
    kinds = _kinds(annotation)
    choices = [one for kind in kinds for one in _choices(kind)]
    text = " ".join((about or "").split()).replace("``", "`")
    if choices:
        word = "One of" if _takes_words(kinds) else "Or"
        text += f" {word}: {', '.join(choices)}."
    plain: Any = next((k for k in (bool, int, float) if kinds == [k]), str)
    if choices and all(choice.isdigit() for choice in choices):
        plain = int
    several = any(get_origin(kind) in (tuple, dict) for kind in kinds)
    stage = path[0] if len(path) > 1 else ""
    if name in TEXTS:
        plain, several = list[str], False
    return RecipeFlag(name, path, plain, several, text, PANELS[stage])


def _kinds(annotation: Any) -> list[Any]:
    """What a key may be, ``None`` left out, without constraints."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin is None or origin in (tuple, dict, Literal):
        return [] if annotation is type(None) else [annotation]
    return [kind for one in get_args(annotation) for kind in _kinds(one)]


def _takes_words(kinds: list[Any]) -> bool:
    """Whether a key takes words alone."""
    return all(get_origin(kind) is Literal for kind in kinds)


def _choices(kind: Any) -> list[str]:
    return [str(one) for one in get_args(kind)] if get_origin(kind) is Literal else []


EXPERTS_LEAVE = ("drop", "keep", "structured_share")
"""How many experts leave, in three ways."""
SIZES = ("total", "bytes", "sparsity")
COUNTS = {
    "moe": ("drop_moe", "moe_count", "moe_share"),
    "block": ("drop_blocks", "block_count", "block_share"),
}
# Flags of which the given one replaces the recipe's others.
INSTEAD = (EXPERTS_LEAVE, SIZES, *COUNTS.values())


def with_overrides(recipe: Recipe, flags: Mapping[str, Any]) -> Recipe:
    """The recipe with the flags that are not None put over it, validated again.

    Raises:
        RecipeError: A flag does nothing, or the recipe makes no sense with it.
    """
    # Of a repeatable flag that was not given Typer makes an empty list.
    given = {
        name: value
        for name, value in flags.items()
        if value is not None and value != []
    }
    if not given:
        return recipe
    known = recipe_flags()
    data = recipe.model_dump()

    def put(name: str, value: Any) -> None:
        *path, last = known[name].path
        target = data
        for key in path:
            target = target[key]
        target[last] = value

    for group in INSTEAD:
        if given.keys() & set(group):
            for name in group:
                put(name, () if name in ("drop_moe", "drop_blocks") else None)
    for name, value in given.items():
        put(name, _parsed(known[name], value))
    if "criterion" in given and "experts" not in given:
        data["experts"]["method"] = "score"
    _meet_size(data, given)
    changed = parse_recipe(data, recipe.name)
    _refuse_idle(changed, given)
    return changed


def _parsed(flag: RecipeFlag, value: Any) -> Any:
    """A value as the schema takes it: lists are written 3,4."""
    if flag.name in TEXTS and isinstance(value, list):
        return parse_texts(value, TEXTS[flag.name])
    if flag.name == "blend" and isinstance(value, str):
        return parse_blend(value)
    if not (flag.several and isinstance(value, str)):
        return value
    if value.lstrip()[:1] in ("[", "{"):
        return parse_yaml(value.encode())
    return [item.strip() for item in value.split(",") if item.strip()]


def _meet_size(data: dict[str, Any], given: Mapping[str, Any]) -> None:
    """What a size means for a recipe: by its zeros, or by experts if it has none."""
    experts, slim = data["experts"], data["slim"]
    # n:m says how many zeros there are; no other size can be met by them.
    if given.get("pattern", "unstructured") != "unstructured":
        for name in ("total_sparsity", "max_bytes", "structured_share"):
            data[name] = data[name] if name in _keys(given) else None
        slim["sparsity"] = slim["sparsity"] if "sparsity" in given else None
    if given.get("slim") == "none" and not given.keys() & set(SIZES):
        slim["sparsity"] = None
        if data["structured_share"] is not None:
            data["structured_share"] = 1.0  # experts take all of the size
        else:
            # The size counted zeros too: only what the recipe drops is left of it.
            data["total_sparsity"] = data["max_bytes"] = None
    if given.keys() & {"drop", "keep", "experts"} and experts["method"] == "none":
        data["structured_share"] = None
    sized = given.keys() & {"total", "bytes"}
    by_experts = slim["method"] == "none" and experts["method"] != "none"
    if sized and by_experts and not given.keys() & set(EXPERTS_LEAVE):
        experts["drop"] = experts["keep"] = None
        data["structured_share"] = 1.0


def _keys(given: Mapping[str, Any]) -> set[str]:
    return {recipe_flags()[name].path[-1] for name in given}


def _refuse_idle(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Refuse flags of a stage that does nothing.

    Raises:
        RecipeError: Naming the flag and what would give it a meaning.
    """
    stages = {
        "experts": (recipe.experts.method == "none", "--criterion reap"),
        "slim": (recipe.slim.method == "none", "--slim sparsegpt"),
        "quantize": (recipe.quantize.method == "none", "--quantize awq"),
    }
    for name in given:
        stage, *_ = recipe_flags()[name].path
        idle, remedy = stages.get(stage, (False, ""))
        if idle and name != stage:
            raise RecipeError(
                f"recipe {recipe.name}: {name} does nothing, because {stage}.method is "
                f"none. Add {remedy}, or choose another recipe."
            )
    if given.get("slim", "none") != "none" and not recipe.asks_zeros:
        raise RecipeError(
            f"recipe {recipe.name}: --slim {given['slim']} writes no zeros without a "
            "number of them. Add --total, --sparsity or --pattern."
        )
