"""Nearest to the mean, and the ties that floating point must not decide."""

import numpy as np
import pytest

from vllm_moe_prune.decide.representative import nearest_to_mean
from vllm_moe_prune.decide.similarity import Array


def squared_distances(theta_EP: Array) -> Array:
    gaps_EEP = theta_EP[:, None] - theta_EP[None]
    return np.asarray((gaps_EEP**2).sum(-1), dtype=np.float64)


def test_the_middle_one_stays() -> None:
    theta_EP = np.array([[9.0], [0.0], [2.0], [1.0]])
    assert nearest_to_mean(squared_distances(theta_EP), [1, 2, 3]) == 3


def test_a_pair_is_always_a_tie() -> None:
    """Both are exactly half their distance away from the mean."""
    rng = np.random.default_rng(1)
    for _ in range(100):
        sqdist_EE = squared_distances(rng.normal(size=(2, 7)) * 10.0)
        sqdist_EE[1, 0] *= 1.0 + 1e-12  # a Gram matrix is not quite symmetric
        assert nearest_to_mean(sqdist_EE, [0, 1]) == 0
        assert nearest_to_mean(sqdist_EE, [1, 0]) == 0


def test_float_noise_decides_no_tie() -> None:
    # The corners of a square are all equally far from its middle.
    sqdist_EE = squared_distances(np.array([[0, 0], [0, 1], [1, 0], [1, 1.0]]))
    noise_EE = np.random.default_rng(2).normal(size=(4, 4)) * 1e-13
    assert nearest_to_mean(sqdist_EE * (1.0 + noise_EE), [0, 1, 2, 3]) == 0


def test_a_real_difference_decides() -> None:
    theta_EP = np.array([[0.0], [1.0], [0.5 - 1e-4], [0.5]])
    assert nearest_to_mean(squared_distances(theta_EP), [0, 1, 2, 3]) == 3


def test_equal_experts_leave_the_first() -> None:
    assert nearest_to_mean(np.zeros((5, 5)), [4, 2, 3]) == 2


@pytest.mark.parametrize("expert", [0, 2])
def test_a_single_expert_is_its_own_mean(expert: int) -> None:
    assert nearest_to_mean(np.ones((3, 3)), [expert]) == expert
