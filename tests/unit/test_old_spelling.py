"""Recipes and plans of earlier versions are still read."""

import logging
from pathlib import Path

import pytest

from vllm_moe_prune.errors import RecipeError
from vllm_moe_prune.recipes.loading import load_recipe

OLD = """\
experts: {method: stun, cluster_by: behaviour, drop: 0.25}
quantise: {method: rtn}
"""


def test_an_old_recipe_means_what_it_meant_and_a_log_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(OLD)
    with caplog.at_level(logging.WARNING):
        recipe = load_recipe(str(path))
    assert recipe.quantize.method == "rtn"
    assert recipe.experts.cluster_by == "behavior"
    assert "quantise is now spelled quantize" in caplog.text


def test_both_spellings_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.yaml"
    path.write_text(f"{OLD}quantize: {{method: rtn}}")
    with pytest.raises(RecipeError, match="quantise"):
        load_recipe(str(path))
