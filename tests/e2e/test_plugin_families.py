"""Arctic and DeepSeek in real vLLM engines against the masked original in plain torch.

The original is never changed: the reference bars removed experts from selection, or
runs the representative in their place. What is left between the two is rounding.
E experts, V vocabulary, T tokens.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine import assert_same, served
from tests.family_cases import (
    CASES,
    ENGINE,
    OURS,
    expected,
    make_pruned,
)
from tests.reference import read_json

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.usefixtures("engines_in_this_process"),
]


@pytest.mark.parametrize("name", CASES)
def test_vllm_computes_what_the_masked_original_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pruned, expected_TV = make_pruned(tmp_path, case)
    architecture = case.architecture or OURS[case.family]
    assert read_json(pruned / "config.json")["architectures"] == [architecture]
    assert_same(served(pruned, **ENGINE[case.family]), expected_TV)
    if case.cuts:
        unpruned_TV = expected(tmp_path / "unpruned", replace(case, cuts={}))
        assert (unpruned_TV - expected_TV).abs().max() > 1, "the plan changed nothing"
