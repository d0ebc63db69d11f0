"""What the user asks for: a recipe, written as YAML or built from flags.

A recipe names no tensor and no layer count; ``decide`` turns it, together with the
statistics of one checkpoint, into a plan that does.
"""

import re
import reprlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import RecipeError
from .numbers import MOST, MOST_TOKENS, Index, Indices, Seed

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Part01 = Annotated[float, Field(ge=0.0, le=1.0)]
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
Chooser = Literal["stun"] | Criterion
Budget = Literal["global", "per-layer", "sensitivity"]
SlimMethod = Literal["wanda", "wanda-variant", "magnitude", "sparsegpt", "none"]
# magnitude looks at weights only.
NEEDS_ACTIVATIONS = ("wanda", "wanda-variant", "sparsegpt")
QuantMethod = Literal["rtn", "gptq", "awq", "none"]
Part = Literal["experts", "attention", "shared", "mlp"]
"""What can be slimmed: routed experts; attention; shared experts; other MLPs, that is
dense layers and Arctic's residual MLP. The router is none of them."""


class Strict(BaseModel):
    """Base of every model read from a file: unknown keys are errors, values frozen."""

    # Docstrings of fields become the descriptions of the JSON Schema.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def refuse(*problems: str | Literal[False]) -> None:
    """Raise the first problem, each given as ``condition and message``."""
    if found := [problem for problem in problems if problem]:
        raise ValueError(found[0])


class ExpertStage(Strict):
    """Stage 1: which experts are removed."""

    method: Literal["stun", "score", "none"] = "stun"
    """``stun`` keeps one expert of each cluster, ``score`` drops the lowest scores."""
    criterion: Criterion = "total-output"
    """The score of method ``score``."""
    reverse: bool = False
    """Drop the highest scores instead; a control."""
    search: Literal["greedy", "exhaustive"] = "greedy"
    """``exhaustive`` tries every set of experts (Lu et al.), up to 200,000 sets."""
    drop: Share | None = None
    """Share of the experts to remove, rounded to whole experts."""
    keep: int | None = Field(default=None, ge=1, lt=MOST)
    """Experts kept per MoE layer, on average; replaces ``drop``."""
    budget: Budget = "global"
    """Split over layers: lowest scores of the model, equal, or by measured loss."""
    protected: dict[Index, Indices] = {}
    """Layer -> experts that are always kept."""
    seed: Seed = 0
    """Seed of criterion ``random``."""
    cluster_by: Literal["behavior", "outputs"] = "behavior"
    """Distance of experts: STUN's Eq. 7, or of their outputs on the same tokens."""
    linkage: Literal["complete", "reference"] = "complete"
    """``reference`` follows STUN's published code, for comparison."""
    representative: Literal["nearest-mean"] | Criterion = "nearest-mean"
    """The expert kept of a cluster: nearest to the mean, or the highest score."""
    merge: Literal["mean", "frequency"] = "mean"
    """Weights of the mean where clusters are averaged: equal, or tokens routed."""
    router_weight: float = Field(default=1.0, ge=0.0, le=1e6)
    """Lambda 1 of STUN's Eq. 7: weight of the distance between router rows."""
    coactivation_weight: float = Field(default=1.0, ge=0.0, le=1e6)
    """Lambda 2 of STUN's Eq. 7: weight of the co-activation counts."""
    divide_by_router_norm: bool = True
    """Divide router distances by the norm of the layer's router."""
    min_experts: int | None = Field(default=None, ge=0, lt=MOST)
    """Minimum of experts per layer; default: the model's top-k. With 0 and method
    ``score`` a layer may lose all experts: its MoE is dropped, its norm kept."""
    groups: Literal["equal", "uneven"] = "equal"
    """Expert groups (DeepSeek-V2, V3): ``equal`` removes as many from each, as stock
    routers need; ``uneven`` removes the lowest of the layer and needs the plugin."""
    max_removed: int | None = Field(default=None, ge=0, lt=MOST)
    """Maximum of experts removed from one layer."""
    reconstruct: Literal["selective", "never", "always"] = "selective"
    """Replace kept experts by the mean of their cluster (STUN, Algorithm 2)."""
    reconstruct_below: int = Field(default=3, ge=1, lt=MOST)
    """Kappa: ``selective`` averages in layers with fewer clusters than this."""

    @model_validator(mode="after")
    def _consistent(self) -> "ExpertStage":
        weights = self.router_weight or self.coactivation_weight
        exhaustive = self.search == "exhaustive"
        by_loss = self.criterion == "removal-loss" and not self.reverse
        twice = [at for at, ids in self.protected.items() if len(set(ids)) < len(ids)]
        refuse(
            (self.drop is not None and self.keep is not None)
            and "give drop or keep, not both",
            (self.clusters_by_behavior and not weights)
            and "router_weight and coactivation_weight are both zero",
            (self.method != "score" and (self.reverse or exhaustive))
            and "reverse and search: exhaustive need method: score",
            (exhaustive and not by_loss)
            and "search: exhaustive needs criterion: removal-loss, not reversed",
            (exhaustive and self.budget == "global")
            and "search: exhaustive needs budget: per-layer or sensitivity",
            bool(twice) and f"protected: layer {twice[0]} lists an expert twice",
        )
        return self

    @property
    def clusters_by_behavior(self) -> bool:
        """Whether STUN's Eq. 7 decides."""
        return self.method == "stun" and self.cluster_by == "behavior"


class SlimStage(Strict):
    """Stage 2: zeros in the kept experts and other matrices."""

    method: SlimMethod = "wanda"
    """How the weights to zero are chosen."""
    sparsity: Share | None = None
    """Share of zeros among the kept weights; default: from ``total_sparsity``."""
    pattern: str = "unstructured"
    """``unstructured``, or ``n:m``: keep n of every m neighbors in a row, as in 2:4."""
    allocation: Literal["uniform", "owl"] = "uniform"
    """``owl`` gives layers with many outliers fewer zeros, at the same total."""
    owl_m: float = Field(default=3.0, gt=0.0, le=1e6)
    """An outlier's score exceeds this many times the mean of its layer."""
    owl_lambda: float = Field(default=0.08, ge=0.0, lt=0.5)
    """Maximum distance of a layer's sparsity from the mean."""
    router_weighted: bool = False
    """Weight Wanda's inputs by the router's weight for the expert (MoE-Pruner)."""
    scope: tuple[Part, ...] = ("experts",)
    """What is slimmed. ``mlp``: dense layers and Arctic's residual MLP."""
    exclude: tuple[str, ...] = ()
    """Matrices whose name contains one of these strings stay dense."""

    @model_validator(mode="after")
    def _consistent(self) -> "SlimStage":
        by_wanda = self.method in ("wanda", "wanda-variant")
        repeated = len(set(self.scope)) < len(self.scope)
        refuse(
            (self.is_grouped and self.method == "wanda-variant")
            and "method: wanda-variant needs pattern: unstructured",
            (self.is_grouped and self.sparsity is not None)
            and f"pattern {self.pattern} sets the sparsity; give no other",
            (self.router_weighted and not by_wanda)
            and "router_weighted needs method: wanda or wanda-variant",
            (not self.scope or repeated) and "scope needs at least one part, each once",
            "" in self.exclude and "exclude: an empty string is in every name",
        )
        return self

    @property
    def is_grouped(self) -> bool:
        """Whether the pattern is n:m."""
        return parse_pattern(self.pattern) is not None


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """(n, m) of ``n:m``, None for ``unstructured``."""
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", pattern)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError("pattern is unstructured, or n:m with n < m, such as 2:4")
    return int(match[1]), int(match[2])


class QuantizeStage(Strict):
    """Fewer bits for the kept routed experts, in the formats of compressed-tensors. All
    other tensors keep their dtype."""

    method: QuantMethod = "none"
    """``rtn`` rounds to nearest without data; ``gptq`` and ``awq`` need calibration."""
    weights: Literal["int4", "int8", "fp8"] = "int4"
    """int8 has one scale per row, fp8 one per 128 x 128 block, else per row."""
    group_size: Literal[32, 64, 128] | None = None
    """int4: neighbors that share a scale; default: the largest that fits."""
    zero_point: bool = False
    """int4: asymmetric ranges, with a zero point per group."""
    act_order: bool = False
    """gptq: columns with the largest inputs first."""

    @model_validator(mode="after")
    def _consistent(self) -> "QuantizeStage":
        refuse(
            (self.weights != "int4" and self.method in ("gptq", "awq"))
            and f"weights: {self.weights} needs method: rtn",
            (self.weights == "int8" and self.group_size is not None)
            and "group_size needs weights: int4 or fp8",
            (self.weights == "fp8" and self.group_size not in (None, 128))
            and f"group_size {self.group_size} needs weights: int4; fp8 has 128",
            (self.weights != "int4" and self.zero_point)
            and "zero_point needs weights: int4",
            (self.act_order and self.method != "gptq")
            and "act_order needs method: gptq",
        )
        return self

    @property
    def needs_activations(self) -> bool:
        """Whether it needs calibration activations."""
        return self.method in ("gptq", "awq")


class Calibration(Strict):
    """The calibration text and how much of it is used."""

    source: str | None = None
    """Text or JSONL file, or ``hub:NAME[/CONFIG]``; required where data is needed."""
    samples: int = Field(default=128, ge=1, le=MOST_TOKENS)
    """Number of windows."""
    sequence_length: int = Field(default=2048, ge=2, le=MOST_TOKENS)
    """Tokens per window."""
    seed: Seed = 0
    """Seed for choosing the windows."""
    heldout: int = Field(default=16, ge=1, le=MOST_TOKENS)
    """Held-out windows for judging candidates: ``tune``, ``budget: sensitivity``."""
    heldout_source: str | None = None
    """Text for the held-out windows, e.g. of the served domain; default: ``source``."""


class LayerStage(Strict):
    """Whole MoE sublayers or blocks to remove, by index or by similarity."""

    drop_moe: Indices = ()
    """Layers whose MoE sublayer is removed."""
    drop_blocks: Indices = ()
    """Layers that are removed whole."""
    moe_count: int | None = Field(default=None, ge=0, lt=MOST)
    """Number of MoE sublayers to remove, those that change their input least."""
    block_count: int | None = Field(default=None, ge=0, lt=MOST)
    """Number of blocks to remove, likewise; chosen before MoE sublayers."""
    moe_share: Share | None = None
    """Share of the MoE sublayers to remove, to the nearest, at least one unless 0."""
    block_share: Share | None = None
    """Share of the blocks to remove, to the nearest, at least one unless 0."""
    moe_norm: Literal["drop", "keep"] = "drop"
    """Whether the norm before a dropped MoE is dropped too, in the similarity
    (UNIFIED Eq. 9; Eq. 8 keeps it) and in the output."""
    block_mode: Literal["discrete", "consecutive"] = "discrete"
    """``consecutive`` removes the most similar run of blocks."""
    mtp: Literal["prune", "drop"] = "prune"
    """MTP layers, which predict further tokens: pruned like the others, or removed."""

    @model_validator(mode="after")
    def _one_way(self) -> "LayerStage":
        refuse(
            _several(self.drop_moe, self.moe_count, self.moe_share)
            and "give drop_moe or moe_count or moe_share, not two",
            _several(self.drop_blocks, self.block_count, self.block_share)
            and "give drop_blocks or block_count or block_share, not two",
        )
        return self


def _several(listed: tuple[int, ...], count: int | None, share: float | None) -> bool:
    return sum((bool(listed), count is not None, share is not None)) > 1


class TuneStage(Strict):
    """The candidates of `tune`."""

    experts: tuple[Chooser, ...] = ("total-output", "reap", "routing-score", "stun")
    """Rules for removing experts; the first is also tried with dropped layers."""
    budgets: tuple[Budget, ...] = ("sensitivity", "global", "per-layer")
    """Values of ``experts.budget``."""
    shares: tuple[Part01, ...] = (0, 0.25, 0.5, 0.75, 1)
    """Shares of the sparsity taken by whole experts; zeros take the rest."""
    layers: tuple[Part01, ...] = (0.1, 0.25, 0.5)
    """Shares of the MoE sublayers or blocks removed whole, at least one."""
    slims: tuple[SlimMethod, ...] = ("wanda", "sparsegpt")
    """Methods for zeros: the first for all candidates, the others for finalists."""
    owl: bool = True
    """Whether finalists are also tried with ``allocation: owl``."""
    finalists: int = Field(default=4, ge=1, lt=MOST)
    """Minimum number of finalists."""

    @model_validator(mode="after")
    def _consistent(self) -> "TuneStage":
        lists = (self.experts, self.budgets, self.shares, self.slims)
        refuse(
            any(not values for values in lists)
            and "experts, budgets, shares and slims need at least one entry each",
            ("none" in self.slims) and "slims: none writes no zeros",
        )
        return self


class Recipe(Strict):
    """Everything a run needs to know besides the checkpoint."""

    name: str = "custom"
    """Name, in plans and provenance."""
    description: str = ""
    """One line for `vllm-moe-prune recipes`."""
    total_sparsity: Share | None = None
    """Removed and zeroed parameters over all parameters of ``sparsity_of``."""
    sparsity_of: Literal["experts", "all"] = "experts"
    """Parameters that ``total_sparsity`` counts."""
    experts: ExpertStage = ExpertStage()
    slim: SlimStage = SlimStage()
    quantize: QuantizeStage = QuantizeStage()
    layers: LayerStage = LayerStage()
    routing: Literal["drop", "redirect", "preserve"] = "drop"
    """Router rows of removed experts: deleted, redirected, or preserved (a control)."""
    structured_share: float | None = Field(default=None, ge=0.0, le=1.0)
    """Share of ``total_sparsity`` taken by whole experts; replaces ``experts.drop``."""
    order: Literal["structured-first", "unstructured-first"] = "structured-first"
    """``unstructured-first`` slims before experts are chosen; a control, two cuts."""
    calibration: Calibration = Calibration()
    tune: TuneStage | None = None
    """Search for the best plan of ``total_sparsity``."""

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        total, share = self.total_sparsity, self.structured_share
        experts, slim = self.experts, self.slim
        number = experts.drop is not None or experts.keep is not None
        # OWL moves zeros between layers: n of n:m then differs by layer.
        fixed = slim.is_grouped and slim.allocation == "uniform"
        refuse(
            (total is not None and slim.sparsity is not None)
            and "give total_sparsity or slim.sparsity, not both",
            (total is not None and fixed)
            and f"slim.pattern {slim.pattern} sets the sparsity of every layer; "
            "leave out total_sparsity, or set slim.allocation: owl",
            (share is not None and (total is None or experts.method == "none"))
            and "structured_share needs total_sparsity and experts.method",
            (share is not None and number)
            and "give structured_share or experts.drop or experts.keep, not two",
            (self.routing == "redirect" and experts.method == "score")
            and "routing: redirect needs the clusters of method: stun",
            (self.routing == "preserve" and experts.method == "stun")
            and "routing: preserve needs experts.method: score",
            (self.routing == "preserve" and experts.min_experts == 0)
            and "routing: preserve needs at least one expert per layer",
            (self.quantize.method != "none" and self.asks_zeros)
            and "quantize and zeros do not go together; set slim.method: none",
            (self.quantize.method != "none" and self.tune is not None)
            and "tune does not try out quantized weights; leave out quantize",
            (self.quantize.method != "none" and self.order == "unstructured-first")
            and "order: unstructured-first is about zeros; leave out quantize",
            (self.order == "unstructured-first" and slim.allocation == "owl")
            and "order: unstructured-first needs slim.allocation: uniform",
        )
        return self

    @property
    def asks_zeros(self) -> bool:
        """Whether weights may be zeroed; a total can be met by experts alone."""
        stage = self.slim
        asked = self.total_sparsity is not None or stage.sparsity or stage.is_grouped
        return stage.method != "none" and bool(asked)

    @property
    def needs_activations(self) -> bool:
        """Whether the cut needs calibration activations."""
        by_data = self.slim.method in NEEDS_ACTIVATIONS
        return by_data or self.quantize.needs_activations


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
    said = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in {"missing", "value_error"}:
        return f"{place}: {said}"  # what was got is everything around it
    got = reprlib.repr(problem["input"])
    shown = got if len(got) <= 60 else got[:57] + "..."
    return f"{place}: {said} (got {shown})"
