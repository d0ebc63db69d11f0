"""What the user asks for: a recipe, written as YAML or built from flags.

A recipe names no tensor and no layer count; ``decide`` turns it, together with the
statistics of one checkpoint, into a plan that does.
"""

from typing import Literal

from pydantic import Field, ValidationError, model_validator

from ..errors import RecipeError
from .calibration import Calibration
from .expert_stage import Budget, Chooser, Criterion, ExpertStage
from .narrow_stage import NarrowStage
from .numbers import MOST, Fraction, Indices, Size
from .slim_stage import (
    NEEDS_ACTIVATIONS,
    Part,
    QuantizeStage,
    QuantMethod,
    QuantPart,
    SlimMethod,
    SlimStage,
    parse_pattern,
)
from .strict import Share, Strict, first_problem, refuse

__all__ = [
    "NEEDS_ACTIVATIONS",
    "Budget",
    "Calibration",
    "Chooser",
    "Criterion",
    "ExpertStage",
    "LayerStage",
    "NarrowStage",
    "Part",
    "QuantMethod",
    "QuantPart",
    "QuantizeStage",
    "Recipe",
    "SlimMethod",
    "SlimStage",
    "Spelling",
    "Strict",
    "TuneStage",
    "first_problem",
    "parse_pattern",
    "parse_recipe",
    "refuse",
]


Spelling = Literal["moe-prune", "stock-vllm"]


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
    shares: tuple[Fraction, ...] = (0, 0.25, 0.5, 0.75, 1)
    """Shares of the sparsity taken by whole experts; zeros take the rest."""
    layers: tuple[Fraction, ...] = (0.1, 0.25, 0.5)
    """Shares of the MoE sublayers or blocks removed whole, at least one."""
    slims: tuple[SlimMethod, ...] = ("wanda", "sparsegpt")
    """Methods for zeros: the first for all candidates, the others for finalists."""
    owl: bool = True
    """Whether finalists are also tried with ``allocation: owl``."""
    narrow: tuple[Fraction, ...] = (0.25, 0.5, 1)
    """Shares of the sparsity taken by narrowing, tried with finalists; the rest by
    zeros, or by whole experts as the best of them has it."""
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
    max_bytes: Size | None = None
    """Maximum size of the output's weight files, such as 24GiB; replaces
    ``total_sparsity`` by the least that fits."""
    storage: Literal["dense", "bitmask"] = "dense"
    """How expert weights are stored; ``bitmask`` stores no zeros, which makes files and
    servers on CPUs smaller and faster, and needs the plugin."""
    experts: ExpertStage = ExpertStage()
    slim: SlimStage = SlimStage()
    quantize: QuantizeStage = QuantizeStage()
    narrow: NarrowStage = NarrowStage()
    layers: LayerStage = LayerStage()
    routing: Literal["drop", "redirect", "preserve", "mean"] = "drop"
    """Router rows of removed experts: deleted, redirected, or preserved, leading
    nowhere or to the mean of the expert's outputs."""
    spelling: Spelling = "moe-prune"
    """How layers that differ are written: for the plugin, or for ``stock-vllm`` from
    0.33 on, without it."""
    structured_share: Fraction | Literal["auto"] | None = None
    """Share of ``total_sparsity`` taken by whole experts; replaces ``experts.drop``.
    ``auto`` chooses it by the measured costs of experts and zeros."""
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
            (total is not None and self.max_bytes is not None)
            and "give total_sparsity or max_bytes, not both",
            (self.size_asked and fixed)
            and f"slim.pattern {slim.pattern} sets the sparsity of every layer; "
            "leave out total_sparsity, or set slim.allocation: owl",
            (share is not None and (not self.size_asked or experts.method == "none"))
            and "structured_share needs total_sparsity and experts.method",
            (share == "auto" and not (self.asks_zeros and slim.scope == ("experts",)))
            and "structured_share: auto needs zeros in experts alone",
            (share == "auto" and self.sparsity_of == "all")
            and "structured_share: auto needs sparsity_of: experts",
            (share is not None and number)
            and "give structured_share or experts.drop or experts.keep, not two",
            (self.routing == "redirect" and experts.method == "score")
            and "routing: redirect needs the clusters of method: stun",
            (self.keeps_rows and experts.method == "stun")
            and f"routing: {self.routing} needs experts.method: score",
            (self.keeps_rows and experts.min_experts == 0)
            and f"routing: {self.routing} needs at least one expert per layer",
            (self.routing == "mean" and self.spelling != "stock-vllm")
            and "routing: mean needs spelling: stock-vllm",
            (self.routing == "mean" and experts.refit != "none")
            and "routing: mean and experts.refit both make up for removed experts; "
            "leave one out",
            *self._problems_of_spelling(),
            (self.quantize.method != "none" and self.asks_zeros)
            and "quantize and zeros do not go together; set slim.method: none",
            (self.quantize.method != "none" and self.storage != "dense")
            and "quantized experts have no zeros to leave out; set storage: dense",
            (self.quantize.method != "none" and self.tune is not None)
            and "tune does not try out quantized weights; leave out quantize",
            (self.quantize.method != "none" and self.order == "unstructured-first")
            and "order: unstructured-first is about zeros; leave out quantize",
            (
                self.narrow.of_total is not None
                and (not self.size_asked or self.narrow.share > 0)
            )
            and "narrow.of_total needs total_sparsity, and replaces narrow.share",
            (self.narrow.is_asked and self.order == "unstructured-first")
            and "order: unstructured-first cannot narrow experts; leave out narrow",
            (self.order == "unstructured-first" and slim.allocation == "owl")
            and "order: unstructured-first needs slim.allocation: uniform",
        )
        return self

    def _problems_of_spelling(self) -> list[str | Literal[False]]:
        """What expert substitution in vLLM has no way to say."""
        if self.spelling != "stock-vllm":
            return []
        layers, at = self.layers, "spelling: stock-vllm"
        drops = bool(layers.drop_moe or layers.moe_count or layers.moe_share)
        return [
            (self.routing == "redirect") and f"{at} has no redirects",
            (self.experts.min_experts == 0) and f"{at} needs an expert in each layer",
            drops and f"{at} cannot drop MoE sublayers, only blocks",
            (self.quantize.method != "none") and f"{at} cannot quantize experts",
            (self.storage != "dense") and f"{at} needs storage: dense",
            self.narrow.is_asked and f"{at} cannot narrow experts",
            (self.tune is not None) and f"{at}: tune searches plans for the plugin",
            (self.order != "structured-first") and f"{at} is one cut; leave out order",
        ]

    @property
    def keeps_rows(self) -> bool:
        """Whether router rows of removed experts stay and nobody serves them."""
        return self.routing in ("preserve", "mean")

    @property
    def size_asked(self) -> bool:
        """Whether a size of the whole is given, which stages then share."""
        return self.total_sparsity is not None or self.max_bytes is not None

    @property
    def asks_zeros(self) -> bool:
        """Whether weights may be zeroed; a total can be met by experts alone."""
        stage = self.slim
        asked = self.size_asked or stage.sparsity or stage.is_grouped
        return stage.method != "none" and bool(asked)

    @property
    def needs_activations(self) -> bool:
        """Whether the cut needs calibration activations."""
        return (
            self.slim.method in NEEDS_ACTIVATIONS
            or self.quantize.needs_activations
            or self.narrow.is_asked
            or self.experts.refit != "none"
        )


def parse_recipe(data: object, where: str) -> Recipe:
    """Validate recipe data; pydantic's report becomes one line."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"recipe {where}: {first_problem(error)}") from error
