"""Repetition in answers: pure functions of token ids, defined in docs/methods.md."""

from collections.abc import Sequence
from dataclasses import dataclass

NGRAM = 4
"""Tokens of an n-gram whose return counts as repetition."""
LEAST_ROUNDS, LEAST_TOKENS = 3, 12
"""A loop goes round at least so often, and takes at least so many tokens."""


@dataclass(frozen=True)
class Cycle:
    """What an answer says over and over at its end."""

    period: int
    """Tokens of one round, the shortest there is."""
    tokens: int
    """Tokens at the end that are such rounds, the first perhaps begun midway."""


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams that stood in the answer before: 1 - distinct / all.

    Source: Welleck et al. 2019, "Neural Text Generation with Unlikelihood Training",
    seq-rep-n. 0 for an answer shorter than n + 1 tokens.
    """
    count = len(tokens) - n + 1
    if count < 2:
        return 0.0
    distinct = {tuple(tokens[at : at + n]) for at in range(count)}
    return 1.0 - len(distinct) / count


def suffix_cycle(tokens: Sequence[int]) -> Cycle | None:
    """The cycle in which an answer ends, if it ends in one.

    It has the smallest period p such that each of the last max(3 p, 12) tokens but the
    first p equals the one p before it. Linear time.
    """
    backwards = tokens[::-1]
    matches = _matches(backwards)
    for period in range(1, len(tokens) // LEAST_ROUNDS + 1):
        # So many tokens at the end agree with those one period before them.
        length = period + matches[period]
        if length >= max(LEAST_ROUNDS * period, LEAST_TOKENS):
            return Cycle(period, length)
    return None


def _matches(items: Sequence[int]) -> list[int]:
    """For each place, how many items from there on are those at the start (Z-array)."""
    found = [len(items)] + [0] * (len(items) - 1)
    left = right = 0
    for at in range(1, len(items)):
        # Inside the rightmost match, what the start matched is known already.
        same = min(right - at, found[at - left]) if at < right else 0
        while at + same < len(items) and items[same] == items[at + same]:
            same += 1
        found[at] = same
        if at + same > right:
            left, right = at, at + same
    return found


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens two answers begin with alike."""
    pairs = zip(ours, theirs, strict=False)
    return next(
        (at for at, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs))
    )
