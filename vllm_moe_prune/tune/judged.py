"""Candidates with what they lose, and how much is known of that.

Data only; the search is in ``search``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..cut.losses import Loss
from ..cut.slim_expert import kind_of
from ..decide.cut_plan import CutPlan
from .sizes import Size

FIRST = 0.25
"""Share of the tokens on which all are ranked first; the better half on all."""
ESTIMATED, RANKED, REFINED, FINAL = range(4)
"""How far a candidate came: ranked on some tokens, on all, with its zeros in other
ways, and judged as it would be cut."""


@dataclass(frozen=True)
class Judged:
    """A candidate, its plan, and what the plan's model loses."""

    name: str
    plan: CutPlan
    loss: Loss
    step: int

    @property
    def final(self) -> bool:
        """Whether it was calibrated and judged as it would be cut."""
        return self.step == FINAL

    @property
    def file_bytes(self) -> int:
        """Size of the output."""
        return self.plan.predicted.file_bytes if self.plan.predicted else 0

    @property
    def rank(self) -> tuple[int, float, int, str]:
        """Sorts the best first; losses of other steps do not compare."""
        # Ties by size, then name: a repeated search ranks alike.
        return -self.step, self.loss.mean, self.file_bytes, self.name


@dataclass(frozen=True)
class Tuned:
    """What a search found for one size."""

    size: Size
    intact: Judged
    judged: tuple[Judged, ...]
    """Best first; those that were only ranked behind all others."""
    left_out: tuple[tuple[str, str], ...]
    """Candidates that cannot reach the size, and why."""
    complete: bool = True
    """Whether the search came to its end, and not to that of its time."""

    @property
    def best(self) -> Judged:
        """The winner."""
        return self.judged[0]


@dataclass
class Found:
    """What a search knows so far of one size."""

    size: Size
    judged: dict[str, Judged] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def best(self, step: int) -> list[Judged]:
        """Those that came as far as ``step``, best first."""
        far = [one for one in self.judged.values() if one.step >= step]
        return sorted(far, key=lambda one: one.rank)


def better_half(count: int, finalists: int) -> int:
    """How many candidates are ranked on all tokens."""
    return max(2 * finalists, (count + 1) // 2)


def distinct(judged: Iterable[Judged]) -> list[Judged]:
    """Without those that do to the model what one before them does."""
    found: dict[str, Judged] = {}
    for one in judged:
        plan = one.plan
        said = [layer.model_dump_json() for layer in plan.layers]
        how = (plan.routing, *kind_of(plan))
        found.setdefault(repr((how, said)), one)
    return list(found.values())
