"""Layer Drop and Block Drop equal their metrics, computed from hidden states."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.decide.experts import decide_experts
from vllm_moe_prune.decide.layer_drop import decide_layers
from vllm_moe_prune.recipes.schema import ExpertStage, LayerStage, Recipe

from .test_decide_toy import SEEDS, cosine, hidden_cosines, toy_facts, toy_stats


def random_hidden(seed: int, blocks: int) -> np.ndarray:
    steps = np.random.default_rng(seed).normal(size=(blocks + 1, 6, 4))
    return steps.cumsum(0)


def block_stats(hidden_HTD: np.ndarray) -> Stats:
    return Stats(
        fingerprint="f",
        layers={},
        block_cosine_HH=hidden_cosines(hidden_HTD),
        block_tokens=np.array(float(hidden_HTD.shape[1])),
    )


@settings(max_examples=40)
@given(seed=SEEDS, blocks=st.integers(2, 7), data=st.data())
def test_discrete_block_drop_takes_the_most_similar_blocks(
    seed: int, blocks: int, data: st.DataObject
) -> None:
    count = data.draw(st.integers(1, blocks - 1))
    hidden_HTD = random_hidden(seed, blocks)
    recipe = Recipe(layers=LayerStage(block_count=count))
    actions = decide_layers(
        block_stats(hidden_HTD), toy_facts(*[4] * blocks).layers, recipe
    )
    similarity = [
        np.mean(list(map(cosine, hidden_HTD[at], hidden_HTD[at + 1])))
        for at in range(blocks)
    ]
    expected = sorted(range(blocks), key=lambda at: (-similarity[at], at))[:count]
    dropped = [at for at, action in enumerate(actions) if action == "drop-block"]
    assert dropped == sorted(expected)


@settings(max_examples=40)
@given(seed=SEEDS, blocks=st.integers(2, 7), data=st.data())
def test_consecutive_block_drop_compares_start_and_end_of_the_run(
    seed: int, blocks: int, data: st.DataObject
) -> None:
    """The gap is the number of blocks, not one more."""
    count = data.draw(st.integers(1, blocks - 1))
    hidden_HTD = random_hidden(seed, blocks)
    stage = LayerStage(block_count=count, block_mode="consecutive")
    actions = decide_layers(
        block_stats(hidden_HTD),
        toy_facts(*[4] * blocks).layers,
        Recipe(layers=stage),
    )
    similarity = [
        np.mean(list(map(cosine, hidden_HTD[at], hidden_HTD[at + count])))
        for at in range(blocks - count + 1)
    ]
    first = max(range(len(similarity)), key=lambda at: (similarity[at], -at))
    dropped = [at for at, action in enumerate(actions) if action == "drop-block"]
    assert dropped == [*range(first, first + count)]


@settings(max_examples=40)
@given(
    cosines=st.lists(st.integers(-3, 3), min_size=2, max_size=7),
    norm=st.sampled_from(["drop", "keep"]),
    data=st.data(),
)
def test_layer_drop_takes_the_most_similar_sublayers_ties_by_index(
    cosines: list[int], norm: str, data: st.DataObject
) -> None:
    """Layer 0 is dense; Eq. 9 leaves without the norm, Eq. 8 leaves the norm."""
    count = data.draw(st.integers(1, len(cosines) - 1))
    name = "moe_cosine_sum" if norm == "drop" else "moe_only_cosine_sum"
    layers = {
        at: LayerStats(**{name: np.array(float(value)), "tokens": np.array(4.0)})
        for at, value in enumerate(cosines, start=1)
    }
    stage = LayerStage.model_validate({"moe_count": count, "moe_norm": norm})
    facts = toy_facts(0, *[4] * len(cosines))
    actions = decide_layers(
        Stats(fingerprint="f", layers=layers), facts.layers, Recipe(layers=stage)
    )
    ranked = sorted(range(len(cosines)), key=lambda at: (-cosines[at], at))
    expected = {at + 1 for at in ranked[:count]}
    action = "drop-moe" if norm == "drop" else "drop-moe-keep-norm"
    assert {at for at, found in enumerate(actions) if found == action} == expected
    assert all(actions[at] == "keep" for at in {*range(len(actions))} - expected)


@settings(max_examples=30)
@given(seed=SEEDS, data=st.data())
def test_blocks_go_first_and_protected_layers_never(
    seed: int, data: st.DataObject
) -> None:
    counts = (4, 4, 0, 4, 4, 4)
    facts = toy_facts(*counts)
    stats = toy_stats(np.random.default_rng(seed), *counts)
    layer = data.draw(st.sampled_from([0, 1, 3]))
    stage = LayerStage(block_count=2, moe_count=1)
    recipe = Recipe(experts=ExpertStage(protected={layer: (1,)}), layers=stage)
    actions = decide_layers(stats, facts.layers, recipe)
    assert actions[layer] == "keep"
    assert actions.count("drop-block") == 2
    assert actions.count("drop-moe") == 1
    assert actions[2] != "drop-moe", "it has no MoE"


@settings(max_examples=20)
@given(seed=SEEDS)
def test_one_measurement_serves_every_count(seed: int) -> None:
    counts = (5, 0, 6, 5, 5)
    facts = toy_facts(*counts)
    stats = toy_stats(np.random.default_rng(seed), *counts)
    dropped = []
    for moe in range(4):
        actions = decide_layers(
            stats, facts.layers, Recipe(layers=LayerStage(moe_count=moe))
        )
        dropped.append({at for at, one in enumerate(actions) if one == "drop-moe"})
    assert [len(found) for found in dropped] == [0, 1, 2, 3]
    assert all(less < more for less, more in pairwise(dropped))
    gone = []
    for blocks in range(5):
        actions = decide_layers(
            stats, facts.layers, Recipe(layers=LayerStage(block_count=blocks))
        )
        gone.append({at for at, one in enumerate(actions) if one == "drop-block"})
    assert [len(found) for found in gone] == [0, 1, 2, 3, 4]
    assert all(less < more for less, more in pairwise(gone))
    kept = []
    for drop in (0.0, 0.2, 0.4):
        stage = ExpertStage(method="score", criterion="frequency", drop=drop)
        plans, _ = decide_experts(stats, facts.layers, Recipe(experts=stage))
        kept.append([plan.keep for plan in plans])
        assert sum(map(len, kept[-1])) == 21 - round(drop * 21)
    for before, after in pairwise(kept):
        for more, less in zip(before, after, strict=True):
            assert set(more) >= set(less)
