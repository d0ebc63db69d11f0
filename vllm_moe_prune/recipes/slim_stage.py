"""The parts of a recipe about the weights that stay: zeros, and fewer bits."""

import re
from typing import Literal

from pydantic import Field, model_validator

from .strict import Share, Strict, refuse

SlimMethod = Literal["wanda", "wanda-variant", "magnitude", "sparsegpt", "none"]
# magnitude looks at weights only.
NEEDS_ACTIVATIONS = ("wanda", "wanda-variant", "sparsegpt")
QuantMethod = Literal["rtn", "gptq", "awq", "none"]
Part = Literal["experts", "attention", "shared", "mlp"]
"""What can be slimmed: routed experts; attention; shared experts; other MLPs, that is
dense layers and Arctic's residual MLP. The router is none of them."""
QuantPart = Literal[Part, "head"]
"""What can be quantized: the same, and the output head. vLLM's models build routers
without quantization."""


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
    compensate: bool = False
    """Down projections are slimmed last, on what slimmed gates and ups feed them, and
    make up for what is lost there; not where weights stay FP8."""
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
            (self.compensate and self.method == "magnitude")
            and f"compensate needs method: {', '.join(NEEDS_ACTIVATIONS)}",
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
    """Fewer bits for the kept routed experts and perhaps other matrices, in the formats
    of compressed-tensors. All other tensors keep their dtype."""

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
    scope: tuple[QuantPart, ...] = ("experts",)
    """What is quantized, all in one form. ``mlp``: dense layers and Arctic's residual
    MLP; ``head``: the output head, which is always rounded to nearest."""

    @model_validator(mode="after")
    def _consistent(self) -> "QuantizeStage":
        repeated = len(set(self.scope)) < len(self.scope)
        refuse(
            ("experts" not in self.scope or repeated)
            and "scope needs experts, and each part once",
            (len(self.scope) > 1 and self.method == "awq")
            and "method: awq scales experts alone; for more in scope use gptq or rtn",
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
