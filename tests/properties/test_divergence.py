"""The lower bound of a KL divergence, against the whole distributions. V tokens."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_prune.judge.divergence import chooses, compare_steps, kl_at_least


def likeliest(log_V: np.ndarray, count: int, also: int = 0) -> dict[int, float]:
    """What a server tells: the likeliest tokens, and one more."""
    top = {*np.argsort(-log_V)[:count].tolist(), also}
    return {token: float(log_V[token]) for token in top}


def two(seed: int, vocabulary: int, apart: float) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    logits_V = 3 * draw.standard_normal(vocabulary)
    other_V = logits_V + apart * draw.standard_normal(vocabulary)
    return tuple(x - np.logaddexp.reduce(x) for x in (logits_V, other_V))  # type: ignore[return-value]


@given(st.integers(0, 10_000), st.integers(2, 200), st.floats(0, 4), st.integers(1, 40))
def test_it_is_never_above_the_exact_divergence(
    seed: int, vocabulary: int, apart: float, count: int
) -> None:
    p_V, q_V = two(seed, vocabulary, apart)
    exact = float((np.exp(p_V) * (p_V - q_V)).sum())
    found = kl_at_least(likeliest(p_V, count), likeliest(q_V, count, also=1))
    assert 0 <= found <= exact + 1e-5
    if count >= vocabulary:
        assert found == pytest.approx(exact, abs=1e-5)


@given(st.integers(0, 10_000))
def test_twenty_tokens_tell_a_good_part_of_it(seed: int) -> None:
    """Otherwise the bound would be worth little; the twenty hold about 0.8 here."""
    p_V, q_V = two(seed, 200, 0.5)
    exact = float((np.exp(p_V) * (p_V - q_V)).sum())
    assert kl_at_least(likeliest(p_V, 20), likeliest(q_V, 20)) > 0.3 * exact


def test_equal_models_do_not_diverge() -> None:
    p_V, _ = two(0, 50, 0)
    assert kl_at_least(likeliest(p_V, 20), likeliest(p_V, 20)) == 0


def test_tokens_that_nothing_is_known_of_count_as_one() -> None:
    half = math.log(0.5)
    assert kl_at_least({1: half}, {2: half}) == 0
    found = kl_at_least({1: half}, {1: math.log(0.25)})
    assert found == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))


def test_ties_are_choices_too() -> None:
    model = {5: -1.0, 7: -1.0, 9: -2.0}
    assert [chooses(model, token) for token in (5, 7, 9, 11)] == [
        True,
        True,
        False,
        False,
    ]
    same, divergence = compare_steps((5, 9), [model, model], [model, model])
    assert (same, divergence) == (1, 0.0)
