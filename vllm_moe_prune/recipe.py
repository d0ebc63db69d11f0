"""What the user asks for: a recipe, written as YAML or built from flags.

A recipe names no tensor and no layer count; ``decide`` turns it, together with the
statistics of one checkpoint, into a plan that does.
"""

import re
import reprlib
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import RecipeError

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Index = Annotated[int, Field(ge=0)]
Criterion = Literal[
    "routing-score",
    "routing-score-selected",
    "frequency",
    "reap",
    "total-output",
    "router-norm",
    "removal-loss",
    "random",
]
"""How much an expert matters; the formulas are in ``decide/scores.py``."""
SlimMethod = Literal["wanda", "wanda-variant", "magnitude", "sparsegpt", "none"]
NEEDS_ACTIVATIONS = ("wanda", "wanda-variant", "sparsegpt")
Part = Literal["experts", "attention", "shared", "mlp"]
"""What can be slimmed: routed experts; attention; shared experts; other MLPs, that is
dense layers and Arctic's residual MLP. The router is none of them."""


class Strict(BaseModel):
    """Base of every model read from a file: unknown keys are errors, values frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,  # they become the schema's descriptions
    )


class ExpertStage(Strict):
    """Stage 1: which experts go (``docs/methods.md``)."""

    method: Literal["stun", "score", "none"] = "stun"
    """``stun`` keeps one expert of each cluster, ``score`` drops the lowest scores."""
    criterion: Criterion = "total-output"
    """The score of method ``score``."""
    reverse: bool = False
    """Drop the highest scores instead: a control."""
    search: Literal["greedy", "exhaustive"] = "greedy"
    """``exhaustive`` tries every set of experts (Lu et al.); small layers only."""
    drop: Share | None = None
    """Share of all experts to remove, met exactly after rounding to whole experts."""
    keep: int | None = Field(default=None, ge=1)
    """Instead of ``drop``: mean number of experts kept per MoE layer."""
    budget: Literal["global", "per-layer", "sensitivity"] = "global"
    """Where experts go: the lowest of the model, the same everywhere, or split by the
    measured loss of each layer."""
    protected: dict[Index, tuple[Index, ...]] = {}
    """Layer -> experts that always stay."""
    seed: Index = 0
    """Of criterion ``random``."""
    cluster_by: Literal["behaviour", "outputs"] = "behaviour"
    """Distance of STUN's clusters: Eq. 7, or between outputs on the same tokens."""
    linkage: Literal["complete", "reference"] = "complete"
    """``reference`` follows the rule of STUN's published code, for comparison."""
    representative: Literal["nearest-mean"] | Criterion = "nearest-mean"
    """Which member of a cluster stays; a criterion keeps the highest score."""
    merge: Literal["mean", "frequency"] = "mean"
    """How clusters are averaged where they are: plainly, or by tokens routed."""
    router_weight: float = Field(default=1.0, ge=0.0)
    """Lambda 1, weight of the distance between router rows (STUN Eq. 7)."""
    coactivation_weight: float = Field(default=1.0, ge=0.0)
    """Lambda 2, weight of the co-activation counts (STUN Eq. 7)."""
    divide_by_router_norm: bool = True
    min_experts: int | None = Field(default=None, ge=0)
    """Fewest experts any layer keeps; the model's top-k where not given. With 0 and
    method ``score`` a layer may lose all: its MoE goes, the norm before it stays."""
    max_removed: int | None = Field(default=None, ge=0)
    """Most experts removed from one layer (the paper's per-layer cap)."""
    reconstruct: Literal["selective", "never", "always"] = "selective"
    reconstruct_below: int = Field(default=3, ge=1)
    """Kappa: ``selective`` averages clusters in layers with fewer clusters."""

    @model_validator(mode="after")
    def _one_target(self) -> "ExpertStage":
        if self.drop is not None and self.keep is not None:
            raise ValueError("give drop or keep, not both")
        if self.clusters_by_behaviour and not (
            self.router_weight or self.coactivation_weight
        ):
            raise ValueError("router_weight and coactivation_weight are both zero")
        return self

    @model_validator(mode="after")
    def _fits_the_method(self) -> "ExpertStage":
        if self.method != "score" and (self.reverse or self.search == "exhaustive"):
            raise ValueError("reverse and search: exhaustive need method: score")
        if self.search == "exhaustive":
            if self.criterion != "removal-loss" or self.reverse:
                raise ValueError(
                    "search: exhaustive needs criterion: removal-loss, not reversed"
                )
            if self.budget == "global":
                raise ValueError(
                    "search: exhaustive needs budget: per-layer or sensitivity"
                )
        for layer, experts in self.protected.items():
            if len(set(experts)) < len(experts):
                raise ValueError(f"protected: layer {layer} lists an expert twice")
        return self

    @property
    def clusters_by_behaviour(self) -> bool:
        """Whether STUN's Eq. 7 decides."""
        return self.method == "stun" and self.cluster_by == "behaviour"


class SlimStage(Strict):
    """Stage 2: zeros inside what survives."""

    method: SlimMethod = "wanda"
    sparsity: Share | None = None
    """Zeros among surviving weights; else from ``total_sparsity``."""
    pattern: str = "unstructured"
    """Or ``n:m``: of m neighbours in a row n stay, as in 2:4 and 4:8."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """``owl`` spares layers with many outliers, at the same total."""
    owl_m: float = Field(default=3.0, gt=0.0)
    """A score above this many times its layer's mean is an outlier."""
    owl_lambda: float = Field(default=0.08, ge=0.0, lt=0.5)
    """How far a layer's sparsity may be from the mean."""
    router_weighted: bool = False
    """Wanda with inputs weighted by the router (MoE-Pruner)."""
    scope: tuple[Part, ...] = ("experts",)
    exclude: tuple[str, ...] = ()
    """Matrices whose name contains one of these stay dense."""

    @model_validator(mode="after")
    def _consistent(self) -> "SlimStage":
        parse_pattern(self.pattern)
        if self.is_grouped and self.method == "wanda-variant":
            raise ValueError("method: wanda-variant needs pattern: unstructured")
        if self.is_grouped and self.sparsity is not None:
            raise ValueError(f"pattern {self.pattern} sets the sparsity; give no other")
        if self.router_weighted and not self.method.startswith("wanda"):
            raise ValueError("router_weighted needs method: wanda or wanda-variant")
        if not self.scope or len(set(self.scope)) < len(self.scope):
            raise ValueError("scope needs at least one part, each once")
        if "" in self.exclude:
            raise ValueError("exclude: an empty string is in every name")
        return self

    @property
    def is_grouped(self) -> bool:
        """Whether the pattern is n:m."""
        return parse_pattern(self.pattern) is not None

    @property
    def asked(self) -> float | None:
        """The sparsity that method, pattern and ``sparsity`` ask for."""
        found = parse_pattern(self.pattern)
        if self.method == "none":
            return 0.0
        return self.sparsity if found is None else 1.0 - found[0] / found[1]


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(n, m) of ``n:m``, None for ``unstructured``."""
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", pattern)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError("pattern is unstructured, or n:m with n < m, such as 2:4")
    return int(match[1]), int(match[2])


class Calibration(Strict):
    """Which text the statistics come from."""

    source: str | None = None
    """A text or JSONL file, or ``hub:NAME[/CONFIG]``; required once data is needed."""
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=2048, ge=2)
    seed: int = 0


class LayerStage(Strict):
    """Whole sublayers or blocks to remove, by index or by how little they do."""

    drop_moe: tuple[int, ...] = ()
    drop_blocks: tuple[int, ...] = ()
    moe_count: int | None = Field(default=None, ge=0)
    """Instead of ``drop_moe``: how many, those that change their input least."""
    block_count: int | None = Field(default=None, ge=0)
    """Instead of ``drop_blocks``; chosen before ``moe_count``."""
    moe_norm: Literal["drop", "keep"] = "drop"
    """Whether the norm before a MoE leaves with it, in the metric (Eq. 9, Eq. 8) and
    in the output alike."""
    block_mode: Literal["discrete", "consecutive"] = "discrete"

    @model_validator(mode="after")
    def _one_way(self) -> "LayerStage":
        if self.drop_moe and self.moe_count is not None:
            raise ValueError("give drop_moe or moe_count, not both")
        if self.drop_blocks and self.block_count is not None:
            raise ValueError("give drop_blocks or block_count, not both")
        return self


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
    routing: Literal["drop", "redirect", "preserve"] = "drop"
    """A removed expert's router row goes; or leads to its cluster's survivor; or stays,
    and what it is chosen for is lost (a control)."""
    structured_share: float | None = Field(default=None, ge=0.0, le=1.0)
    """Instead of ``experts.drop``: share of ``total_sparsity`` taken by experts."""
    order: Literal["structured-first", "unstructured-first"] = "structured-first"
    """``unstructured-first`` slims before experts are chosen: a control, two cuts."""
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.total_sparsity is not None and self.slim.sparsity is not None:
            raise ValueError("give total_sparsity or slim.sparsity, not both")
        if (
            self.total_sparsity is not None
            and self.slim.is_grouped
            and self.slim.allocation == "uniform"
        ):
            raise ValueError(
                f"slim.pattern {self.slim.pattern} sets the sparsity of every layer; "
                "leave out total_sparsity, or set slim.allocation: owl"
            )
        if self.structured_share is not None:
            if self.total_sparsity is None or self.experts.method == "none":
                raise ValueError(
                    "structured_share needs total_sparsity and experts.method"
                )
            if self.experts.drop is not None or self.experts.keep is not None:
                raise ValueError(
                    "give structured_share or experts.drop or experts.keep, not two"
                )
        return self

    @model_validator(mode="after")
    def _routable(self) -> "Recipe":
        method = self.experts.method
        if self.routing == "redirect" and method == "score":
            raise ValueError("routing: redirect needs the clusters of method: stun")
        if self.routing == "preserve" and method == "stun":
            raise ValueError("routing: preserve needs experts.method: score")
        if self.routing == "preserve" and self.experts.min_experts == 0:
            raise ValueError("routing: preserve needs at least one expert per layer")
        if self.order == "unstructured-first" and self.slim.allocation == "owl":
            raise ValueError("order: unstructured-first needs slim.allocation: uniform")
        return self

    @property
    def needs_coactivation(self) -> bool:
        """Whether stage 1 needs a forward pass (co-activation has a weight)."""
        return (
            self.experts.clusters_by_behaviour and self.experts.coactivation_weight > 0
        )

    @property
    def needs_activations(self) -> bool:
        """Whether the cut needs calibration activations."""
        return self.slim.method in NEEDS_ACTIVATIONS


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
        ).read_bytes()
    else:
        path = Path(name_or_path)
        if not path.is_file():
            raise RecipeError(
                f"recipe {name_or_path!r}: no such file, and no shipped recipe has "
                f"that name. Shipped: {', '.join(shipped_recipes())}."
            )
        text = path.read_bytes()
    try:
        data = yaml.load(text, _Loader)
    # ValueError: a date or a number that there is not.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise RecipeError(f"recipe {name_or_path}: not valid YAML: {line}") from error
    return parse_recipe(data, name_or_path)


class _Loader(yaml.SafeLoader):
    """Safe, and without aliases: ten lines of them can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases are not read; write it out", problem_mark=mark
            )
        return super().compose_node(parent, index)


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
    got = reprlib.repr(problem["input"])
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
