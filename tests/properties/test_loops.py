"""Loops are found where one was planted, and nowhere else."""

import random

from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_prune.judge.loops import (
    LEAST_ROUNDS,
    LEAST_TOKENS,
    Cycle,
    common_prefix,
    repetition,
    suffix_cycle,
)

few = st.lists(st.integers(0, 2), max_size=60)


def naive_cycle(tokens: list[int]) -> Cycle | None:
    """The definition, word by word."""
    for period in range(1, len(tokens) + 1):
        length = period
        while length < len(tokens):
            if tokens[-1 - length] != tokens[-1 - length + period]:
                break
            length += 1
        if length >= max(LEAST_ROUNDS * period, LEAST_TOKENS):
            return Cycle(period, length)
    return None


@given(few)
def test_a_cycle_is_what_its_definition_says(tokens: list[int]) -> None:
    assert suffix_cycle(tokens) == naive_cycle(tokens)


@given(
    before=st.lists(st.integers(0, 999), max_size=40),
    # Different tokens: their period is that of the round, none shorter.
    round_=st.lists(st.integers(1000, 9999), min_size=1, max_size=30, unique=True),
    rounds=st.integers(LEAST_ROUNDS, 8),
    midway=st.integers(0, 29),
)
def test_a_planted_cycle_is_found(
    before: list[int], round_: list[int], rounds: int, midway: int
) -> None:
    rest = round_[: midway % len(round_)]
    tokens = [*before, *round_ * rounds, *rest]
    whole = len(round_) * rounds + len(rest)
    found = suffix_cycle(tokens)
    if whole < LEAST_TOKENS:
        assert found is None
    else:
        assert found == Cycle(len(round_), whole)
        # One other token behind it, and the answer no longer ends in a cycle.
        assert suffix_cycle([*tokens, 10_000]) is None


@given(st.integers(0, 10_000), st.integers(1, 400))
def test_random_text_neither_loops_nor_repeats(seed: int, length: int) -> None:
    draw = random.Random(seed)
    tokens = [draw.randrange(30_000) for _ in range(length)]
    assert suffix_cycle(tokens) is None
    assert repetition(tokens) == 0


@given(few)
def test_repetition_counts_ngrams_that_were_there_before(tokens: list[int]) -> None:
    grams = [tuple(tokens[at : at + 4]) for at in range(len(tokens) - 3)]
    again = sum(gram in grams[:at] for at, gram in enumerate(grams))
    expected = again / len(grams) if grams else 0.0
    assert abs(repetition(tokens) - expected) < 1e-12


@given(few, few)
def test_a_common_prefix_is_as_long_as_it_is_common(a: list[int], b: list[int]) -> None:
    length = common_prefix(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]


def test_long_answers_take_linear_time() -> None:
    """A quadratic search would take minutes."""
    tokens = [0] * 200_000 + [1] + [0] * 100_000
    assert suffix_cycle(tokens) == Cycle(1, 100_000)
    assert suffix_cycle([*tokens, 2]) is None
