"""Eq. 7 as a distance, and statistics that do not suffice."""

from dataclasses import replace

import numpy as np
import pytest

from vllm_moe_prune.calibrate.stats import LayerStats
from vllm_moe_prune.decide.similarity import expert_distance
from vllm_moe_prune.errors import PlanError
from vllm_moe_prune.recipes.schema import ExpertStage

ROUTER_ONLY = ExpertStage(coactivation_weight=0.0)
COACTIVATION_ONLY = ExpertStage(router_weight=0.0)
STATS = LayerStats(
    router_sqdist_EE=np.array([[0.0, 9.0], [9.0, 0.0]]),
    router_norm=np.array(6.0),
    coactivation_EE=np.array([[0.0, 5.0], [5.0, 0.0]]),
)


def between(stats: LayerStats, stage: ExpertStage) -> float:
    distance_EE = expert_distance(stats, stage, layer=3)
    assert distance_EE.tolist() == distance_EE.T.tolist()
    assert not np.diag(distance_EE).any()
    return float(distance_EE[0, 1])


def test_router_rows_are_divided_by_the_norm_of_the_whole_router() -> None:
    assert between(STATS, ROUTER_ONLY) == 0.5
    raw = ROUTER_ONLY.model_copy(update={"divide_by_router_norm": False})
    assert between(STATS, raw) == 3.0


def test_coactivation_is_divided_by_the_mean_with_the_zero_diagonal() -> None:
    """As in the official code: the mean of [[0, 5], [5, 0]] is 2.5, not 5."""
    assert between(STATS, COACTIVATION_ONLY) == -2.0


def test_terms_are_weighed_and_added() -> None:
    stage = ExpertStage(router_weight=2.0, coactivation_weight=3.0)
    assert between(STATS, stage) == 2.0 * 0.5 - 3.0 * 2.0


def test_no_coactivation_at_all_leaves_the_router_term() -> None:
    stats = replace(STATS, coactivation_EE=np.zeros((2, 2)))
    assert between(stats, ExpertStage()) == 0.5


def test_router_of_zeros_is_no_division_by_zero() -> None:
    stats = replace(STATS, router_sqdist_EE=np.zeros((2, 2)), router_norm=np.array(0.0))
    assert between(stats, ROUTER_ONLY) == 0.0


def test_rounding_error_below_zero_is_zero() -> None:
    stats = replace(STATS, router_sqdist_EE=np.full((2, 2), -1e-18))
    assert between(stats, ROUTER_ONLY) == 0.0


def test_one_expert_has_no_distances() -> None:
    stats = LayerStats(
        router_sqdist_EE=np.zeros((1, 1)),
        router_norm=np.array(1.0),
        coactivation_EE=np.zeros((1, 1)),
    )
    assert expert_distance(stats, ExpertStage(), layer=0).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("router_sqdist_EE", "layer 3: the statistics lack its router distances. Run"),
        ("router_norm", "layer 3: the statistics lack its router norm. Run"),
        ("coactivation_EE", "measure` with --calibration, or set experts.coactiv"),
    ],
)
def test_missing_statistics_say_what_to_run(missing: str, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        expert_distance(replace(STATS, **{missing: None}), ExpertStage(), layer=3)


def test_statistics_without_a_weight_may_be_missing() -> None:
    assert between(replace(STATS, coactivation_EE=None), ROUTER_ONLY) == 0.5
    stats = LayerStats(coactivation_EE=STATS.coactivation_EE)
    assert between(stats, COACTIVATION_ONLY) == -2.0
    raw = ROUTER_ONLY.model_copy(update={"divide_by_router_norm": False})
    assert between(replace(STATS, router_norm=None), raw) == 3.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["router_sqdist_EE", "router_norm", "coactivation_EE"])
def test_statistics_that_are_not_finite_name_the_layer(name: str, bad: float) -> None:
    stats = replace(STATS, **{name: np.full_like(getattr(STATS, name), bad)})
    with pytest.raises(PlanError, match=r"layer 3: .* NaN or infinity"):
        expert_distance(stats, ExpertStage(), layer=3)
