"""Which sublayers and blocks leave whole, as the recipe lists them by index."""

from collections.abc import Sequence
from typing import Literal

from ..errors import RecipeError
from ..recipe import LayerStage
from .plan import LayerShape

Action = Literal["keep", "drop-moe", "drop-block"]


def layer_actions(layers: Sequence[LayerShape], stage: LayerStage) -> list[Action]:
    """What happens to each layer as a whole.

    Raises:
        RecipeError: Naming the first index that cannot be dropped as asked.
    """
    _check_indices("layers.drop_moe", stage.drop_moe, len(layers))
    _check_indices("layers.drop_blocks", stage.drop_blocks, len(layers))
    both = sorted(set(stage.drop_moe) & set(stage.drop_blocks))
    if both:
        raise RecipeError(
            f"layers: {both} are in both drop_moe and drop_blocks. A dropped block "
            "takes its MoE with it: list them in drop_blocks only."
        )
    for layer in stage.drop_moe:
        if not layers[layer].has_moe:
            raise RecipeError(
                f"layers.drop_moe: layer {layer} has no MoE sublayer. "
                "List it in layers.drop_blocks to remove the whole block."
            )
    if len(stage.drop_blocks) == len(layers):
        raise RecipeError(
            f"layers.drop_blocks: lists all {len(layers)} blocks. Keep at least one."
        )
    actions: list[Action] = ["keep"] * len(layers)
    for layer in stage.drop_moe:
        actions[layer] = "drop-moe"
    for layer in stage.drop_blocks:
        actions[layer] = "drop-block"
    return actions


def _check_indices(where: str, indices: tuple[int, ...], count: int) -> None:
    for index in indices:
        if not 0 <= index < count:
            raise RecipeError(
                f"{where}: there is no layer {index}; "
                f"the model has layers 0 to {count - 1}."
            )
        if indices.count(index) > 1:
            raise RecipeError(f"{where}: layer {index} is listed more than once.")
