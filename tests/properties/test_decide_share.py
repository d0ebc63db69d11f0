"""``structured_share: auto``: the least sum of two measured costs, against them all."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.decide.build_plan import resolved
from vllm_moe_prune.decide.cut_plan import ModelId
from vllm_moe_prune.decide.facts import LayerFacts, ModelFacts
from vllm_moe_prune.decide.required_stats import needed_statistics
from vllm_moe_prune.decide.sensitivity import rule
from vllm_moe_prune.decide.share import SHARES, ZEROS, chosen_share
from vllm_moe_prune.errors import PlanError, RecipeError
from vllm_moe_prune.recipes.schema import Recipe, parse_recipe

EXPERTS = 8


def recipe(total: float = 0.5, slim: str = "sparsegpt", **more: Any) -> Recipe:
    experts = {"method": "score", "criterion": "random", "budget": "sensitivity"}
    data = {"total_sparsity": total, "structured_share": "auto", "experts": experts}
    return parse_recipe({**data, "slim": {"method": slim}, **more}, "test")


def model(layers: int) -> ModelFacts:
    layer = LayerFacts(
        num_experts=EXPERTS,
        top_k=2,
        has_moe=True,
        parameters=EXPERTS * 3 * 64,
        moe_parameters=EXPERTS * 3 * 64,
        expert_shapes=((8, 8),) * 3,
    )
    name = ModelId(model_type="mixtral", fingerprint="x", source="x")
    return ModelFacts(name, (layer,) * layers, layers * EXPERTS * 3 * 64)


def measured(asked: Recipe, curves: list[list[float]], zeros: list[float]) -> Stats:
    """Statistics with a point at every count."""
    layers = {
        at: LayerStats(sensitivity_P2=np.array(list(enumerate(curve))))
        for at, curve in enumerate(curves)
    }
    known = {"rule": rule(asked), "zeros": zeros}
    return Stats(fingerprint="x", layers=layers, calibration={}, sensitivity=known)


def naive(
    total: float, curves: list[list[float]], zeros: list[float], factor: float
) -> dict[float, float]:
    """The cost of every share, all splits tried."""
    costs = {}
    count = len(curves) * EXPERTS
    for share in SHARES:
        removed = math.floor(share * total * count + 0.5 + 1e-9)
        best = least_split(curves, removed)
        if best is None:
            continue
        rest = max(0.0, total - removed / count) / (1 - removed / count)
        logs = np.log(np.maximum.accumulate(np.maximum(zeros, 1e-6)))
        if rest <= ZEROS[0]:
            slope = (logs[1] - logs[0]) / (ZEROS[1] - ZEROS[0])
            by_zeros = math.exp(logs[0] + slope * (rest - ZEROS[0]))
        else:
            by_zeros = math.exp(np.interp(rest, ZEROS, logs))
        costs[share] = best + (by_zeros * factor if rest else 0.0)
    return costs


def least_split(curves: list[list[float]], removed: int) -> float | None:
    """The least sum of losses over all ways to take so many from the layers."""
    first, *others = curves
    if not others:
        inside = removed < len(first)
        return first[removed] - first[0] if inside else None
    found = [
        first[count] - first[0] + rest
        for count in range(min(removed, len(first) - 1) + 1)
        if (rest := least_split(others, removed - count)) is not None
    ]
    return min(found, default=None)


COST = st.floats(0.0, 0.4)
# As many points as can leave a layer of 8 with top-2.
CURVE = st.lists(COST, min_size=7, max_size=7)


@given(
    curves=st.lists(CURVE, min_size=1, max_size=3),
    zeros=st.lists(COST, min_size=4, max_size=4),
    total=st.sampled_from([0.4, 0.5, 0.65, 0.75]),
    slim=st.sampled_from(["wanda", "sparsegpt"]),
)
def test_the_share_has_the_least_cost(
    curves: list[list[float]], zeros: list[float], total: float, slim: str
) -> None:
    asked = recipe(total, slim)
    stats = measured(asked, curves, zeros)
    share = chosen_share(asked, model(len(curves)), stats)
    costs = naive(total, curves, zeros, 1 / 3 if slim == "sparsegpt" else 1.0)
    # Splits are counted in units of 1e-9.
    assert costs[share] == pytest.approx(min(costs.values()), abs=1e-7)


def test_cheap_experts_leave_first_and_dear_ones_stay() -> None:
    zeros = [0.01, 0.05, 0.2, 0.8]
    for curve, expected in (
        ([0.0] * 7, 0.875),
        ([0.0, 1, 2, 3, 4, 5, 6], 0.0),
    ):
        stats = measured(recipe(0.75), [curve] * 2, zeros)
        assert chosen_share(recipe(0.75), model(2), stats) == expected
        complete = resolved(recipe(0.75), model(2), stats)
        assert complete.experts.drop == pytest.approx(expected * 0.75)


@pytest.mark.parametrize("zeros", [None, [], [0.1], [0.1, 0.2, 0.3, math.nan], "x"])
def test_zeros_that_were_not_measured_are_asked_for(zeros: Any) -> None:
    stats = measured(recipe(), [[0.0] * 7], zeros)
    with pytest.raises(PlanError, match="lack the cost of zeros"):
        chosen_share(recipe(), model(1), stats)
    assert {"zeros", "sensitivity_P2"} <= needed_statistics(recipe())


@pytest.mark.parametrize(
    "data",
    [
        {"slim": {"method": "none"}},
        {"slim": {"method": "wanda", "scope": ["experts", "attention"]}},
        {"sparsity_of": "all"},
    ],
)
def test_auto_needs_zeros_in_experts_alone(data: dict[str, Any]) -> None:
    asked = recipe().model_dump()
    with pytest.raises(RecipeError, match="structured_share: auto needs"):
        parse_recipe({**asked, **data}, "test")
