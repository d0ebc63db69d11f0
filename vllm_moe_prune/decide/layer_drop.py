"""Which sublayers and blocks leave whole: as listed, or those that do the least.

A MoE sublayer or a block that hardly turns its input (cosine near 1) is redundant.
All similarities are of the intact model, so any number of drops reads one measurement.
"""

from collections.abc import Iterable, Sequence

from ..calibrate.stats import Stats
from ..errors import PlanError, RecipeError
from ..recipes.schema import LayerStage, Recipe
from .cut_plan import Action, LayerShape
from .similarity import Array, measured

MEASURE_LAYERS = "Run `vllm-moe-prune measure` with this recipe and --calibration."


def decide_layers(
    stats: Stats | None, layers: Sequence[LayerShape], recipe: Recipe
) -> list[Action]:
    """What happens to each layer as a whole.

    Blocks are chosen first; then MoE sublayers of the blocks that stay. Layers with
    protected experts are chosen for neither.

    Raises:
        RecipeError: If a listed index, or the number asked for, cannot be dropped.
        PlanError: If a similarity was not measured.
    """
    stage = recipe.layers
    actions = fixed_actions(layers, stage)
    protected = {layer for layer, ids in recipe.experts.protected.items() if ids}
    decoders = [at for at, shape in enumerate(layers) if not shape.mtp]
    blocks = number_of(stage.block_count, stage.block_share, len(decoders))
    if blocks:
        free = [layer for layer in decoders if layer not in protected]
        # One block stays at least, protected or not.
        _check_count("block_count", blocks, len(free), len(decoders) - 1)
        for layer in choose_blocks(stats, stage, blocks, free):
            actions[layer] = "drop-block"
    sublayers = sum(layers[at].has_moe for at in decoders)
    moe = number_of(stage.moe_count, stage.moe_share, sublayers)
    if moe:
        free = [
            layer
            for layer, shape in enumerate(layers)
            if shape.has_moe
            and not shape.mtp
            and actions[layer] == "keep"
            and layer not in protected
        ]
        _check_count("moe_count", moe, len(free), len(layers))
        for layer in rank_moe(stats, stage, free)[:moe]:
            actions[layer] = _moe_action(stage)
    return actions


def chooses_layers(stage: LayerStage) -> bool:
    """Whether statistics decide which layers are dropped."""
    blocks = stage.block_count or stage.block_share
    return bool(blocks or stage.moe_count or stage.moe_share)


def number_of(count: int | None, share: float | None, total: int) -> int:
    """How many are asked for, outright or as a part of all there are."""
    if share is None:
        return count or 0
    # A share above 0 asks for something, however few layers there are.
    return max(1, round(share * total)) if share else 0


def rank_moe(
    stats: Stats | None, stage: LayerStage, layers: Iterable[int]
) -> list[int]:
    """MoE sublayers, the most redundant first; ties to the lower layer.

    With the norm (Eq. 9) the cosine is between the residual stream before and after;
    without it (Eq. 8) between the normed input and the MoE's output.
    """
    name = "moe_cosine_sum" if stage.moe_norm == "drop" else "moe_only_cosine_sum"
    known = {} if stats is None else stats.layers

    def cosine(layer: int) -> float:
        found = known.get(layer)
        tokens, total = (
            measured(
                None if found is None else getattr(found, field),
                field,
                MEASURE_LAYERS,
                layer=layer,
            )
            for field in ("tokens", name)
        )
        return float(total) / float(tokens)

    return sorted(layers, key=lambda layer: (-cosine(layer), layer))


def rank_blocks(stats: Stats | None, layers: Iterable[int]) -> list[int]:
    """Blocks by the cosine of their input and output, the most redundant first."""
    cosine_HH = _hidden_cosines(stats)
    # Row i enters block i. All sums are of the same tokens, so no mean is needed.
    return sorted(layers, key=lambda layer: (-cosine_HH[layer, layer + 1], layer))


def choose_blocks(
    stats: Stats | None, stage: LayerStage, count: int, layers: Sequence[int]
) -> list[int]:
    """The blocks to drop: the most redundant ones, or the most redundant run."""
    if stage.block_mode == "discrete":
        return sorted(rank_blocks(stats, layers)[:count])
    cosine_HH = _hidden_cosines(stats)
    free = set(layers)
    runs = [
        range(first, first + count)
        for first in sorted(free)
        if free.issuperset(range(first, first + count))
    ]
    if not runs:
        raise RecipeError(
            f"layers.block_count: no {count} consecutive blocks are free of protected "
            "experts. Protect fewer, or set layers.block_mode: discrete."
        )
    # From what enters the first block of the run to what leaves its last.
    best = min(runs, key=lambda run: (-cosine_HH[run[0], run[0] + count], run[0]))
    return list(best)


def fixed_actions(layers: Sequence[LayerShape], stage: LayerStage) -> list[Action]:
    """What the recipe alone says of each layer: those it lists, and MTP layers.

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
    for layer in (*stage.drop_moe, *stage.drop_blocks):
        if layers[layer].mtp:
            raise RecipeError(
                f"layers: layer {layer} predicts further tokens (MTP) and is not "
                "dropped by its number. Set layers.mtp: drop."
            )
    for layer in stage.drop_moe:
        if not layers[layer].has_moe:
            raise RecipeError(
                f"layers.drop_moe: layer {layer} has no MoE sublayer. "
                "List it in layers.drop_blocks to remove the whole block."
            )
    # None is listed twice and none is MTP, so counting is enough.
    if len(stage.drop_blocks) == sum(not shape.mtp for shape in layers):
        raise RecipeError(
            f"layers.drop_blocks: lists all {len(layers)} blocks. Keep at least one."
        )
    actions: list[Action] = ["keep"] * len(layers)
    for layer in stage.drop_moe:
        actions[layer] = _moe_action(stage)
    for layer in stage.drop_blocks:
        actions[layer] = "drop-block"
    for layer, shape in enumerate(layers):
        if shape.mtp and stage.mtp == "drop":
            actions[layer] = "drop-block"
    return actions


def _moe_action(stage: LayerStage) -> Action:
    return "drop-moe" if stage.moe_norm == "drop" else "drop-moe-keep-norm"


def _hidden_cosines(stats: Stats | None) -> Array:
    cosine_HH = None if stats is None else stats.block_cosine_HH
    if cosine_HH is None:
        raise PlanError(
            f"the statistics lack the similarity of blocks. {MEASURE_LAYERS}"
        )
    return cosine_HH


def _check_count(name: str, count: int, candidates: int, most: int) -> None:
    room = min(candidates, most)
    if count > room:
        raise RecipeError(
            f"layers.{name}: asks for {count}, but only {room} can go. "
            f"Lower layers.{name}."
        )


def _check_indices(where: str, indices: tuple[int, ...], count: int) -> None:
    for index in indices:
        if not 0 <= index < count:
            raise RecipeError(
                f"{where}: there is no layer {index}; "
                f"the model has layers 0 to {count - 1}."
            )
        if indices.count(index) > 1:
            raise RecipeError(f"{where}: layer {index} is listed more than once.")
