"""Arctic and DeepSeek in real vLLM engines against the masked original in plain torch.

The original is never changed: the reference bars removed experts from selection, or
runs the representative in their place. What is left between the two is rounding.
E experts, V vocabulary, T tokens.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine import Loads, assert_same, served
from tests.family_cases import (
    CASES,
    ENGINE,
    OURS,
    make_original,
    make_plan,
    make_pruned,
    make_reference,
    said_by,
)
from tests.reference import read_json

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.usefixtures("engines_in_this_process"),
]


@pytest.mark.parametrize("name", CASES)
def test_vllm_computes_what_the_masked_original_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pruned, expected_TV, expected_loads = make_pruned(tmp_path, case)
    architecture = case.architecture or OURS[case.family]
    assert read_json(pruned / "config.json")["architectures"] == [architecture]
    loads: Loads = {}
    assert_same(served(pruned, loads, **ENGINE[case.family]), expected_TV)
    assert loads == expected_loads
    if case.cuts:
        unpruned = make_reference(tmp_path / "unpruned", replace(case, cuts={}))
        unpruned_TV = said_by(unpruned)
        assert (unpruned_TV - expected_TV).abs().max() > 1, "the plan changed nothing"


def test_compiled_graphs_compute_the_same(tmp_path: Path) -> None:
    case = CASES["v3-uneven-groups"]
    pruned, expected_TV, _ = make_pruned(tmp_path, case)
    compiled = {**ENGINE[case.family], "enforce_eager": False}
    assert_same(served(pruned, **compiled), expected_TV)


@pytest.mark.parametrize("name", ["arctic-everything", "v3-drops", "qwen3-everything"])
def test_original_is_pruned_while_loading(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    original = make_original(tmp_path / "original", case)
    plan = {"plan": str(make_plan(original, case))}
    found_TV = served(
        original,
        load_format="moe_prune",
        model_loader_extra_config=plan,
        **ENGINE[case.family],
    )
    assert_same(found_TV, said_by(make_reference(tmp_path / "reference", case)))
