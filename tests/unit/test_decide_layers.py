"""Layers and blocks to drop are checked before anything is decided."""

from typing import Any

import pytest

from tests.shapes import Shape
from vllm_moe_prune.decide.layer_drop import fixed_actions
from vllm_moe_prune.errors import RecipeError
from vllm_moe_prune.recipes.schema import LayerStage

LAYERS = [Shape(0, 2, has_moe=False), Shape(), Shape()]


def test_actions_are_listed_by_layer() -> None:
    stage = LayerStage(drop_moe=(2,), drop_blocks=(0,))
    assert fixed_actions(LAYERS, stage) == ["drop-block", "keep", "drop-moe"]
    assert fixed_actions(LAYERS, LayerStage()) == ["keep"] * 3


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"drop_moe": (3,)}, "layers.drop_moe: there is no layer 3; the model has"),
        ({"drop_blocks": (3,)}, "layers.drop_blocks: there is no layer 3"),
        ({"drop_moe": (1, 1)}, "layer 1 is listed more than once"),
        ({"drop_moe": (0,)}, "layer 0 has no MoE sublayer"),
        ({"drop_moe": (1,), "drop_blocks": (1,)}, r"\[1\] are in both"),
        ({"drop_blocks": (0, 1, 2)}, "lists all 3 blocks"),
    ],
)
def test_impossible_lists_are_refused(stage: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        fixed_actions(LAYERS, LayerStage(**stage))
