"""What a recipe says about narrowing experts."""

from typing import Literal

from pydantic import Field

from .numbers import Fraction
from .strict import Share, Strict


class NarrowStage(Strict):
    """Fewer channels in the kept routed experts: as many in every expert of a layer, so
    that every server reads them. Shared experts and dense layers stay as they are."""

    share: Share = 0.0
    """Share of each expert's channels (its intermediate size) to remove, at least."""
    of_total: Fraction | None = None
    """Share of ``total_sparsity`` taken by narrowing; replaces ``share``."""
    multiple: Literal[32, 64, 128] = 32
    """Widths are multiples of this; FP8 experts lose whole blocks besides. GPU kernels
    for 4-bit experts want 64 or 128, per tensor-parallel process."""
    refit: Literal["ridge", "none"] = "ridge"
    """``ridge`` fits the columns that stay to what the whole expert gave. Experts that
    stay FP8 are not refitted."""
    ridge: float = Field(default=0.03, gt=0.0, le=1e6)
    """Its penalty, relative to the mean of the activations' squares."""

    @property
    def is_asked(self) -> bool:
        """Whether channels are to leave."""
        return self.share > 0 or bool(self.of_total)
