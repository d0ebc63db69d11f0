"""How much of the original's score is left, with its standard error; pure functions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a model scored in a task."""

    task: str
    metric: str
    """As lm-eval calls it, e.g. ``acc_norm``, with a filter after a comma."""
    value: float
    """A share of the samples for accuracies: 0 to 1."""
    stderr: float | None
    """Standard error of ``value``; None where lm-eval knows none."""
    samples: int


@dataclass(frozen=True)
class Recovery:
    """A score in per cent of the original's."""

    task: str
    percent: float | None
    """None where the original scored nothing."""
    stderr: float | None
    """In the same unit. As if both models had been asked different questions: of the
    same ones, which is usual, it is less."""


def recovery(score: Score, original: Score) -> Recovery:
    """``score / original`` by the delta method, the two taken as independent."""
    if original.value == 0:
        return Recovery(score.task, None, None)
    ratio = score.value / original.value
    if score.stderr is None or original.stderr is None:
        return Recovery(score.task, 100 * ratio, None)
    # Var(a/b) = (Var a + (a/b)^2 Var b) / b^2 to first order, covariance left out.
    error = math.hypot(score.stderr, ratio * original.stderr) / abs(original.value)
    return Recovery(score.task, 100 * ratio, 100 * error)


def mean(scores: Sequence[Score]) -> Score:
    """The mean over tasks, each counting the same however many samples it has."""
    count = len(scores)
    errors = [score.stderr for score in scores if score.stderr is not None]
    known = len(errors) == count
    return Score(
        task=MEAN,
        metric=MEAN,
        value=math.fsum(score.value for score in scores) / count,
        # Tasks are independent: their variances add, over count squared.
        stderr=math.hypot(*errors) / count if known else None,
        samples=sum(score.samples for score in scores),
    )


def with_mean(scores: Sequence[Score]) -> list[Score]:
    """The scores, and their mean below if they are several."""
    return [*scores, mean(scores)] if len(scores) > 1 else list(scores)


def recoveries(scores: Sequence[Score], original: Sequence[Score]) -> list[Recovery]:
    """Of every task both were asked, in the order of ``scores``, and of the mean.

    The mean's recovery is that of the mean score (as the papers have it), not the mean
    of recoveries, which the task that the original is worst at would rule.
    """
    by_task = {score.task: score for score in original}
    both = [(score, by_task[score.task]) for score in scores if score.task in by_task]
    found = [recovery(score, before) for score, before in both]
    if len(both) > 1:
        ours, theirs = zip(*both, strict=True)
        found.append(recovery(mean(ours), mean(theirs)))
    return found
