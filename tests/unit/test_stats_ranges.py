"""Statistics with numbers that no measurement gives are refused where they are read."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.calibrate.stats_file import MODEL_ARRAYS, load_stats, save_stats
from vllm_moe_prune.calibrate.stats_ranges import RANGES
from vllm_moe_prune.errors import PlanError

E = 3
GOOD = LayerStats(
    router_sqdist_EE=np.ones((E, E)) - np.eye(E),
    router_norm=np.array(2.0),
    router_row_norm_E=np.ones(E),
    weight_sqdist_EE=np.ones((E, E)) - np.eye(E),
    weight_powers_E5=np.array([[4.0, -1.0, 2.0, -0.5, 3.0]] * E),
    tokens=np.array(10.0),
    routed_E=np.array([4.0, 6.0, 10.0]),
    coactivation_EE=np.ones((E, E)) - np.eye(E),
    score_full_sum_E=np.ones(E),
    score_selected_sum_E=np.ones(E),
    weighted_norm_sum_E=np.ones(E),
    weighted_sqnorm_sum_E=np.ones(E),
    activation_norm_sum_E=np.ones(E),
    activation_sqnorm_sum_E=np.ones(E),
    activation_max_E=np.ones(E),
    contribution_gram_EE=np.ones((E, E)),
    output_sqdist_EE=np.ones((E, E)) - np.eye(E),
    output_sqnorm_E=np.ones(E),
    output_sum_ED=-np.ones((E, 5)),
    moe_cosine_sum=np.array(-9.5),
    moe_only_cosine_sum=np.array(9.5),
    owl_outliers_E=np.array([0.0, 2.0, 3.0]),
    owl_m=np.array(3.0),
    sensitivity_P2=np.array([[0.0, 3.5], [1.0, 4.0]]),
)
BLOCKS = {"block_cosine_HH": np.ones((2, 2)), "block_tokens": np.array(7.0)}


def stats(layer: LayerStats = GOOD, **whole: Any) -> Stats:
    return Stats(fingerprint="f", layers={0: layer}, **(BLOCKS | whole))


def refused(found: Stats, path: Path) -> str:
    save_stats(found, path)
    with pytest.raises(PlanError) as raised:
        load_stats(path)
    said = str(raised.value)
    assert said.startswith(f"{path}: damaged statistics file: ")
    assert said.endswith("Make it again with `vllm-moe-prune measure`.")
    return said


def test_every_quantity_has_a_range() -> None:
    assert {item.name for item in fields(LayerStats)} | {*MODEL_ARRAYS} == {*RANGES}
    assert all(getattr(GOOD, item.name) is not None for item in fields(LayerStats))


def test_good_numbers_are_read_as_they_were_written(tmp_path: Path) -> None:
    save_stats(stats(), tmp_path / "stats")
    found = load_stats(tmp_path / "stats")
    for item in fields(LayerStats):
        assert np.array_equal(
            getattr(found.layers[0], item.name), getattr(GOOD, item.name)
        )
    assert np.array_equal(found.block_cosine_HH, BLOCKS["block_cosine_HH"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, -1e300])
@pytest.mark.parametrize("name", sorted(RANGES))
def test_numbers_that_cannot_be_are_refused(
    name: str, value: float, tmp_path: Path
) -> None:
    whole = name in MODEL_ARRAYS
    array = np.array(BLOCKS[name] if whole else getattr(GOOD, name))
    array[(0,) * array.ndim] = value
    found = stats(**{name: array}) if whole else stats(replace(GOOD, **{name: array}))
    assert f"{name} contains" in refused(found, tmp_path / "stats")


@pytest.mark.parametrize(
    "name", sorted(name for name, allowed in RANGES.items() if allowed.least == 0)
)
def test_what_cannot_be_negative_is_not(name: str, tmp_path: Path) -> None:
    whole = name in MODEL_ARRAYS
    array = np.array(BLOCKS[name] if whole else getattr(GOOD, name))
    array[(0,) * array.ndim] = -1.0
    found = stats(**{name: array}) if whole else stats(replace(GOOD, **{name: array}))
    assert f"{name} contains -1" in refused(found, tmp_path / "stats")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"routed_E": np.array([1.5, 0, 0])}, "routed_E contains 1.5"),
        ({"routed_E": np.array([11.0, 0, 0])}, "contains 11 for 10 tokens"),
        ({"moe_cosine_sum": np.array(-11.0)}, "contains 11 for 10 tokens"),
        ({"router_sqdist_EE": np.triu(np.ones((E, E)), 1)}, "is not symmetric"),
        ({"coactivation_EE": np.triu(np.ones((E, E)), 1)}, "is not symmetric"),
        ({"weight_powers_E5": -np.ones((E, 5))}, "an even power below zero"),
        ({"routed_E": np.ones(E + 1)}, "the layer has"),
        ({"routed_E": np.ones((E, E))}, "the layer has"),
        ({"owl_m": np.ones(1)}, "owl_m has shape [1]"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    assert says in refused(stats(replace(GOOD, **change)), tmp_path / "stats")


def test_similarity_of_blocks_is_of_its_tokens(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    assert "exceeds its 7 tokens" in refused(
        stats(block_cosine_HH=np.full((2, 2), 7.1)), path
    )
    assert "block_tokens" in refused(stats(block_tokens=None), path)
    assert "shape [2, 3]" in refused(stats(block_cosine_HH=np.ones((2, 3))), path)


def test_a_layer_too_large_to_be_one_is_refused_unread(tmp_path: Path) -> None:
    wide = LayerStats(routed_E=np.zeros(1 << 14))
    assert "has shape [16384]" in refused(stats(wide), tmp_path / "stats")
