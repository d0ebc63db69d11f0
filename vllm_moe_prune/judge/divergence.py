"""How far two models' next tokens are apart, from the likeliest few that servers tell.

Pure functions. A server tells the log-probabilities (nats) of its likeliest tokens, not
of all: the rest is one class of its own. Merging classes never raises a KL divergence
(data processing inequality), so what is found here is a lower bound.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Likeliest = Mapping[int, float]
"""Token id -> log-probability of some tokens, the likeliest among them."""
ROUNDING = 1e-6
"""What float32 leaves uncertain in a sum of probabilities."""


@dataclass(frozen=True)
class Agreement:
    """How a model continues as the original did, along the original's own answers."""

    tokens: int
    """Compared: those of the original's greedy answers."""
    agreement: float
    """Share of them that the model, too, would have chosen there."""
    prefix: float
    """Mean share of the original's answer that the model's own begins with."""
    kl: float
    """Mean KL(original || model) per token in nats, at least."""


def kl_at_least(original: Likeliest, model: Likeliest) -> float:
    """A lower bound of KL(original || model) at one token, in nats.

    Exact where both tell all tokens; never above the exact one but for rounding.
    """
    shared = original.keys() & model.keys()
    p_rest = max(0.0, 1.0 - math.fsum(math.exp(original[one]) for one in shared))
    q_rest = max(0.0, 1.0 - math.fsum(math.exp(model[one]) for one in shared))
    terms = [math.exp(original[one]) * (original[one] - model[one]) for one in shared]
    if p_rest > ROUNDING:
        # Not below rounding: a rest of nothing may be a sum that came out too large.
        terms.append(p_rest * math.log(p_rest / max(q_rest, ROUNDING)))
    return max(0.0, math.fsum(terms))


def chooses(model: Likeliest, token: int) -> bool:
    """Whether a token is a model's likeliest; ties count."""
    return token in model and model[token] >= max(model.values())


def compare_steps(
    answer: Sequence[int], original: Sequence[Likeliest], model: Sequence[Likeliest]
) -> tuple[int, float]:
    """Over one answer: tokens that the model would have chosen too, and summed KL."""
    same = sum(chooses(q, token) for token, q in zip(answer, model, strict=True))
    divergence = math.fsum(
        kl_at_least(p, q) for p, q in zip(original, model, strict=True)
    )
    return same, divergence
