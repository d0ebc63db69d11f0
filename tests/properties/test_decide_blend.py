"""Statistics of another mix of sources, and plans that serve the least served best."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_prune.calibrate.stats import (
    MAXIMA,
    PER_SOURCE,
    LayerStats,
    SourceStats,
    Stats,
    together,
)
from vllm_moe_prune.decide.blend import blended, coverage, decide_blended
from vllm_moe_prune.decide.build_plan import make_plan
from vllm_moe_prune.decide.cut_plan import CutPlan
from vllm_moe_prune.errors import PlanError, RecipeError
from vllm_moe_prune.recipes.calibration import parse_blend
from vllm_moe_prune.recipes.schema import parse_recipe

from .test_decide_toy import MODEL, SEEDS, toy_facts, toy_layer

SIZES = (6, 5)
NAMES = ("code", "chat", "maths")
RECIPE = parse_recipe(
    {
        "experts": {"method": "score", "drop": 0.4, "min_experts": 1},
        "slim": {"method": "none"},
    },
    "toy",
)


def toy_sources(rng: np.random.Generator, tokens: dict[str, int]) -> Stats:
    """Statistics of sources with so many tokens each, and their sum."""
    sources = {}
    for name, count in tokens.items():
        layers = {
            at: toy_layer(rng, experts, tokens=count).stats
            for at, experts in enumerate(SIZES)
        }
        own = {
            at: LayerStats(**{key: getattr(layer, key) for key in PER_SOURCE})
            for at, layer in layers.items()
        }
        sources[name] = SourceStats(layers=own)
    return Stats(fingerprint=MODEL.fingerprint, layers=summed(sources), sources=sources)


def summed(sources: dict[str, SourceStats]) -> dict[int, LayerStats]:
    return {
        at: LayerStats(
            **{
                key: together(
                    key, [getattr(one.layers[at], key) for one in sources.values()]
                )
                for key in PER_SOURCE
                if getattr(next(iter(sources.values())).layers[at], key) is not None
            }
        )
        for at in range(len(SIZES))
    }


def decide(stats: Stats | None) -> CutPlan:
    return make_plan(stats, RECIPE, toy_facts(*SIZES), tool_version="")


def close(one: Stats, two: Stats) -> None:
    for at, layer in one.layers.items():
        for item in fields(LayerStats):
            mine, yours = (getattr(side, item.name) for side in (layer, two.layers[at]))
            assert (mine is None) == (yours is None), item.name
            if mine is not None:
                np.testing.assert_allclose(mine, yours, 1e-9, err_msg=item.name)


@settings(max_examples=25)
@given(seed=SEEDS, copies=st.tuples(*[st.integers(0, 3)] * 3).filter(any))
def test_a_blend_is_what_a_text_of_that_mix_would_have_given(
    seed: int, copies: tuple[int, ...]
) -> None:
    """The reference: each source's tokens really taken so many times over."""
    stats = toy_sources(np.random.default_rng(seed), dict.fromkeys(NAMES, 12))
    expected: dict[int, LayerStats] = {}
    for at in stats.layers:
        parts = [
            stats.sources[name].layers[at]
            for name, count in zip(NAMES, copies, strict=True)
            for _ in range(count)
        ]
        values: dict[str, Any] = {}
        for key in PER_SOURCE:
            known = [getattr(part, key) for part in parts]
            if known[0] is not None:
                values[key] = together(key, known)
                # To as many tokens as were measured; a maximum has no number.
                if key not in MAXIMA:
                    values[key] = values[key] * len(NAMES) / len(parts)
        expected[at] = LayerStats(**values)
    shares = {
        name: count / sum(copies) for name, count in zip(NAMES, copies, strict=True)
    }
    close(blended(stats, shares), replace(stats, layers=expected))


@given(seed=SEEDS, tokens=st.tuples(*[st.integers(4, 30)] * 3))
@settings(max_examples=10)
def test_shares_as_measured_change_nothing(seed: int, tokens: tuple[int, ...]) -> None:
    counts = dict(zip(NAMES, tokens, strict=True))
    stats = toy_sources(np.random.default_rng(seed), counts)
    shares = {name: count / sum(tokens) for name, count in counts.items()}
    close(blended(stats, shares), stats)


def test_sensitivities_of_a_blend_are_weighted_means() -> None:
    stats = toy_sources(np.random.default_rng(0), {"code": 8, "chat": 16})
    curves = {"code": [[0, 1.0], [2, 2.0]], "chat": [[0, 3.0], [2, 7.0]]}
    sources = {
        name: SourceStats(
            layers={
                at: replace(layer, sensitivity_P2=np.array(curves[name]))
                for at, layer in source.layers.items()
            }
        )
        for name, source in stats.sources.items()
    }
    found = blended(replace(stats, sources=sources), {"code": 0.25, "chat": 0.75})
    assert found.layers[1].sensitivity_P2 is not None
    assert found.layers[1].sensitivity_P2.tolist() == [[0, 2.5], [2, 5.75]]


def test_blocks_are_blended_by_their_own_tokens() -> None:
    stats = toy_sources(np.random.default_rng(0), {"code": 8, "chat": 16})
    sources = {
        name: replace(
            source, block_cosine_HH=np.full((3, 3), total), block_tokens=np.array(count)
        )
        for (name, source), total, count in zip(
            stats.sources.items(), (2.0, 6.0), (4.0, 8.0), strict=True
        )
    }
    whole = {
        "block_cosine_HH": np.full((3, 3), 8.0),
        "block_tokens": np.array(12.0),
    }
    found = blended(replace(stats, sources=sources, **whole), {"code": 1.0, "chat": 0})
    assert found.block_cosine_HH is not None
    # Half a cosine per token of code, for all twelve tokens.
    np.testing.assert_allclose(found.block_cosine_HH, 6.0)


def test_coverage_is_the_share_of_what_the_kept_experts_gave() -> None:
    stats = toy_sources(np.random.default_rng(3), dict.fromkeys(NAMES, 15))
    plan = decide(stats)
    for name, found in coverage(stats, plan.layers).items():
        shares = []
        for layer in plan.layers:
            norm_E = stats.sources[name].layers[layer.layer].weighted_norm_sum_E
            assert norm_E is not None
            kept = sum(norm_E[expert] for expert in layer.keep)
            shares.append(kept / sum(norm_E))
        assert found == pytest.approx(sum(shares) / len(shares))
    whole = [layer.model_copy(update={"keep": (*range(layer.experts),)})
             for layer in plan.layers]  # fmt: skip
    assert coverage(stats, whole) == dict.fromkeys(NAMES, 1.0)
    assert coverage(replace(stats, sources={}), plan.layers) == {}


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS)
def test_maxmin_serves_the_least_served_source_at_least_as_well(seed: int) -> None:
    rng = np.random.default_rng(seed)
    stats = toy_sources(rng, {"code": 40, "chat": 8, "maths": 20})
    found, shares = decide_blended(stats, "maxmin", decide)
    least = min(coverage(stats, found.layers).values())
    assert sum(shares.values()) == pytest.approx(1.0)
    others: list[Any] = [{name: 1.0} for name in NAMES]
    others += [dict.fromkeys(NAMES, 1.0)]
    for blend in others:
        plan, _ = decide_blended(stats, blend, decide)
        assert least >= min(coverage(stats, plan.layers).values())
    # What it found is the plan of the shares that it tells.
    again, _ = decide_blended(stats, shares, decide)
    assert again.layers == found.layers


def test_maxmin_finds_a_mix_that_no_single_source_shows() -> None:
    """Two sources, one expert of each to be kept: only a mix keeps both."""
    norms = {"code": [10.0, 0.1, 5.0, 0.0], "chat": [0.1, 10.0, 0.0, 5.0]}
    sources = {
        name: SourceStats(
            layers={
                0: LayerStats(
                    tokens=np.array(count), weighted_norm_sum_E=np.array(values) * count
                )
            }
        )
        for (name, values), count in zip(norms.items(), (100.0, 1.0), strict=True)
    }
    layer = LayerStats(
        tokens=np.array(101.0),
        weighted_norm_sum_E=sum(
            (one.layers[0].weighted_norm_sum_E for one in sources.values()),
            np.zeros(4),
        ),
    )
    stats = Stats(fingerprint=MODEL.fingerprint, layers={0: layer}, sources=sources)
    recipe = RECIPE.model_copy(
        update={"experts": RECIPE.experts.model_copy(update={"drop": 0.5})}
    )

    def half(known: Stats | None) -> CutPlan:
        return make_plan(known, recipe, toy_facts(4), tool_version="")

    assert half(stats).layers[0].keep == (0, 2)
    plan, _ = decide_blended(stats, "maxmin", half)
    assert plan.layers[0].keep == (0, 1)


@pytest.mark.parametrize(
    ("blend", "says"),
    [
        ({"prose": 1.0}, "no source prose, but code, chat, maths"),
        ({"code": 0.0}, "at least one weight must not be 0"),
    ],
)
def test_blends_that_cannot_be_are_refused(blend: Any, says: str) -> None:
    stats = toy_sources(np.random.default_rng(0), dict.fromkeys(NAMES, 5))
    with pytest.raises(PlanError, match=says):
        decide_blended(stats, blend, decide)
    for none in (None, replace(stats, sources={})):
        with pytest.raises(PlanError, match="tell no sources apart to blend"):
            decide_blended(none, "maxmin", decide)


def test_a_blend_is_spelled_name_weight() -> None:
    assert parse_blend("maxmin") == "maxmin"
    assert parse_blend("code=0.5, chat=2") == {"code": 0.5, "chat": 2.0}
    for wrong in ("", "code", "code=x", "code=-1", "code=1,code=2", "=1", "code=nan"):
        with pytest.raises(RecipeError, match=r"--blend .*write maxmin"):
            parse_blend(wrong)
    with pytest.raises(RecipeError, match="must not be 0"):
        parse_blend("code=0,chat=0")
