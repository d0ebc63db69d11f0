"""What the user asks for: a recipe, written as YAML or built from flags.

A recipe names no tensor and no layer count; ``decide`` turns it, together with the
statistics of one checkpoint, into a plan that does.
"""

from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import RecipeError

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Strict(BaseModel):
    """Base of every model read from a file: unknown keys are errors, values frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ExpertStage(Strict):
    """Stage 1: which experts go (STUN, spec in ``docs/methods.md``)."""

    method: Literal["stun", "none"] = "stun"
    drop: Share | None = None
    """Share of all experts to remove, met exactly after rounding to whole experts."""
    keep: int | None = Field(default=None, ge=1)
    """Instead of ``drop``: mean number of experts kept per MoE layer."""
    budget: Literal["global", "per-layer"] = "global"
    router_weight: float = Field(default=1.0, ge=0.0)
    """Lambda 1, weight of the distance between router rows (STUN Eq. 7)."""
    coactivation_weight: float = Field(default=1.0, ge=0.0)
    """Lambda 2, weight of the co-activation counts (STUN Eq. 7)."""
    divide_by_router_norm: bool = True
    min_experts: int | None = Field(default=None, ge=1)
    """Fewest experts any layer keeps; the model's top-k where not given."""
    max_removed: int | None = Field(default=None, ge=0)
    """Most experts removed from one layer (the paper's per-layer cap)."""
    reconstruct: Literal["selective", "never", "always"] = "selective"
    reconstruct_below: int = Field(default=3, ge=1)
    """Kappa: ``selective`` averages clusters in layers with fewer clusters."""

    @model_validator(mode="after")
    def _one_target(self) -> "ExpertStage":
        if self.drop is not None and self.keep is not None:
            raise ValueError("give drop or keep, not both")
        if self.method == "stun" and not (
            self.router_weight or self.coactivation_weight
        ):
            raise ValueError("router_weight and coactivation_weight are both zero")
        return self


class SlimStage(Strict):
    """Stage 2: unstructured zeros inside the surviving experts."""

    method: Literal["wanda", "magnitude", "none"] = "wanda"
    sparsity: Share | None = None
    """Zeros among surviving expert weights; else from ``total_sparsity``."""


class Calibration(Strict):
    """Which text the statistics come from."""

    source: str | None = None
    """A text or JSONL file, or ``hub:NAME[/CONFIG]``; required once data is needed."""
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=2048, ge=2)
    seed: int = 0


class LayerStage(Strict):
    """Whole sublayers or blocks to remove, by index."""

    drop_moe: tuple[int, ...] = ()
    drop_blocks: tuple[int, ...] = ()


class Recipe(Strict):
    """Everything a run needs to know besides the checkpoint."""

    name: str = "custom"
    description: str = ""
    total_sparsity: Share | None = None
    """Removed and zeroed parameters over all parameters in ``sparsity_of``."""
    sparsity_of: Literal["experts", "all"] = "experts"
    experts: ExpertStage = ExpertStage()
    slim: SlimStage = SlimStage()
    layers: LayerStage = LayerStage()
    routing: Literal["drop", "redirect"] = "drop"
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.total_sparsity is not None and self.slim.sparsity is not None:
            raise ValueError("give total_sparsity or slim.sparsity, not both")
        return self

    @property
    def needs_coactivation(self) -> bool:
        """Whether stage 1 needs a forward pass (co-activation has a weight)."""
        return self.experts.method == "stun" and self.experts.coactivation_weight > 0

    @property
    def needs_activations(self) -> bool:
        """Whether the cut needs calibration activations."""
        return self.slim.method == "wanda"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files(__package__) / "recipes"
    return sorted(
        item.name.removesuffix(".yaml")
        for item in folder.iterdir()
        if item.name.endswith(".yaml")
    )


def load_recipe(name_or_path: str) -> Recipe:
    """Read a shipped recipe by name, or any YAML file."""
    if name_or_path in shipped_recipes():
        text = (
            resources.files(__package__) / "recipes" / f"{name_or_path}.yaml"
        ).read_text("utf-8")
    else:
        path = Path(name_or_path)
        if not path.is_file():
            raise RecipeError(
                f"recipe {name_or_path!r}: no such file, and no shipped recipe has "
                f"that name. Shipped: {', '.join(shipped_recipes())}."
            )
        text = path.read_text("utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        raise RecipeError(f"recipe {name_or_path}: not valid YAML: {line}") from error
    return parse_recipe(data, name_or_path)


def parse_recipe(data: object, where: str) -> Recipe:
    """Validate recipe data; pydantic's report becomes one line."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"recipe {where}: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """The first problem pydantic found, as ``field.path: message (got value)``."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"]) or "top level"
    got = repr(problem["input"])
    shown = got if len(got) <= 60 else got[:57] + "..."
    return f"{place}: {problem['msg']} (got {shown})"


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
}


def with_overrides(recipe: Recipe, flags: dict[str, Any]) -> Recipe:
    """The recipe with the flags that are not None put over it, validated again."""
    data = recipe.model_dump()
    given = {name: value for name, value in flags.items() if value is not None}
    for name, value in given.items():
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
    if given.get("slim") == "none" and "total" not in given:
        data["total_sparsity"] = None
    return parse_recipe(data, recipe.name)


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
        size = int(float(number) * units.get(unit, 1))
    except (ValueError, OverflowError) as error:
        raise RecipeError(f"{text!r} is not a size; write e.g. 5GB or 2GiB.") from error
    if size < 1:
        raise RecipeError(f"{text!r}: a size must be positive.")
    return size
