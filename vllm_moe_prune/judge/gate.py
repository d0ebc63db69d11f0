"""Conditions on what was measured, for pipelines: ``--fail-if "loops>0.02"``."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import EvaluationError
from .generation import habits
from .quality import Quality
from .recovery import recoveries

OfAnswers = Literal["loops", "repetition", "ended", "length"]
OfBoth = Literal["agreement", "prefix", "kl"]
Name = Literal[OfAnswers, OfBoth, "perplexity", "perplexity_ratio", "recovery"]
"""What conditions may be on. Of answers greedy and sampled ones count, each by itself;
of texts and tasks every one. ``recovery`` is in per cent, shares are 0 to 1."""
CONDITION = re.compile(r"\s*([A-Za-z_]+)\s*(<=|>=|<|>)\s*([^\s<>=]+)\s*")
COMPARED: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """A reason to fail."""

    name: Name
    sign: str
    bound: float
    text: str
    """As it was written."""


@dataclass(frozen=True)
class Failure:
    """A condition that was met."""

    model: str
    condition: str
    value: float
    where: str
    """Of which answers, text or task."""


def parse_conditions(texts: Iterable[str]) -> tuple[Condition, ...]:
    """Read ``loops>0.02``, several perhaps, parted by commas.

    Raises:
        EvaluationError: One is none, or of an unknown name.
    """
    return tuple(_condition(part.strip()) for text in texts for part in text.split(","))


def _condition(text: str) -> Condition:
    found = CONDITION.fullmatch(text)
    known = get_args(Name)
    if found is not None and found[1] not in known:
        raise EvaluationError(
            f"--fail-if {text!r}: {found[1]!r} is nothing that is measured. Names: "
            f"{', '.join(known)}."
        )
    try:
        bound = float(found[3]) if found is not None else math.nan
    except ValueError:
        bound = math.nan
    if found is None or not math.isfinite(bound):
        raise EvaluationError(
            f"--fail-if {text!r}: write NAME, one of < <= > >=, and a number, as in "
            "'loops>0.02'."
        )
    name: Name = next(one for one in known if one == found[1])
    return Condition(name, found[2], bound, text)


def check_measured(
    conditions: Iterable[Condition],
    *,
    answers: bool,
    texts: bool,
    tasks: bool,
    original: bool,
) -> None:
    """Refuse conditions on what will not be measured, before anything is.

    Raises:
        EvaluationError: Naming the flag that is missing.
    """
    for one in conditions:
        needs = []
        if one.name in (*get_args(OfAnswers), *get_args(OfBoth)) and not answers:
            needs.append("--generate")
        if one.name in ("perplexity", "perplexity_ratio") and not texts:
            needs.append("--text")
        if one.name == "recovery" and not tasks:
            needs.append("--tasks")
        of_original = (*get_args(OfBoth), "perplexity_ratio", "recovery")
        if one.name in of_original and not original:
            needs.append("--against")
        if needs:
            raise EvaluationError(
                f"--fail-if {one.text!r}: {one.name} is not measured without "
                f"{' and '.join(needs)}."
            )


def failures(
    conditions: Sequence[Condition], quality: Quality, original: Quality | None
) -> list[Failure]:
    """The conditions that a model meets, with what was measured."""
    return [
        Failure(quality.model, one.text, value, where)
        for one in conditions
        for where, value in _values(one.name, quality, original)
        # What is no number has failed whatever was asked of it.
        if math.isnan(value) or COMPARED[one.sign](value, one.bound)
    ]


def _values(
    name: Name, quality: Quality, original: Quality | None
) -> Iterator[tuple[str, float]]:
    """Each value of that name, and what it is of."""
    found = quality.generated
    if name in get_args(OfAnswers) and found is not None:
        for kind in ("greedy", "sampled"):
            yield f"{kind} answers", getattr(habits(getattr(found, kind)), name)
    if name in get_args(OfBoth) and found is not None and found.against is not None:
        yield "the original's greedy answers", getattr(found.against, name)
    if name == "perplexity":
        for text in quality.texts:
            yield text.source, text.perplexity
    if original is None:
        return
    if name == "perplexity_ratio":
        before = {text.source: text.perplexity for text in original.texts}
        for text in quality.texts:
            if text.source in before:
                yield text.source, text.perplexity / before[text.source]
    if name == "recovery":
        for one in recoveries(quality.scores, original.scores):
            if one.percent is not None:
                yield one.task, one.percent
