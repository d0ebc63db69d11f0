"""Which shipped recipes fit a memory or a speed, told from headers alone.

Which experts and layers go takes statistics; how many go, and so sizes, does not. So
each recipe is planned with anyone in their place.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .. import __version__
from ..checkpoint.block_fp8 import SUFFIX
from ..checkpoint.config_values import positive
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.writer import TensorSpec, tensor_bytes
from ..cut.predict import bitmasks, facts_of, with_prediction
from ..cut.slice import OutputTensor, output_tensors
from ..decide.build_plan import make_plan
from ..decide.cut_plan import CutPlan
from ..decide.facts import ModelFacts
from ..decide.layer_drop import number_of
from ..errors import PlanError, RecipeError
from ..progress import gib
from ..recipes.schema import ExpertStage, LayerStage, Recipe
from ..stages.plan import least_that_fits

CONTEXT = 2048
"""Tokens of the one sequence for which FLOPs are counted, as UNIFIED counts them."""


@dataclass(frozen=True)
class Costs:
    """What a model takes, as far as headers tell."""

    weight_bytes: int
    flops: int
    """Of one forward over ``CONTEXT`` tokens: two per weight in use and token, and
    attention between all pairs of tokens. Zeros count like other weights."""
    decode_bytes: int
    """Weights read for one more token at batch 1: what bounds decoding. The cache of
    keys and values is not in it."""


@dataclass(frozen=True)
class Choice:
    """A recipe, and what it makes of the checkpoint."""

    recipe: Recipe
    costs: Costs

    def faster(self, original: Costs) -> float:
        """How many times fewer bytes are read for a token."""
        return original.decode_bytes / self.costs.decode_bytes


@dataclass(frozen=True)
class Recommended:
    """What meets a wish, the largest first, and why the others were not looked at."""

    original: Costs
    choices: tuple[Choice, ...]
    left_out: dict[str, str]


def recommend(
    checkpoint: Checkpoint,
    recipes: Sequence[Recipe],
    memory: int | None,
    speed: float | None,
) -> Recommended:
    """The recipes under which weights fit, or decoding reads so much less.

    Args:
        checkpoint: Opened; nothing but its headers is looked at.
        recipes: To choose from.
        memory: Bytes that the weights may take; None: any.
        speed: How many times less is to be read for a token; None: any.

    Raises:
        RecipeError: None does, with the one that comes nearest.
    """
    facts = facts_of(checkpoint, "")
    original = costs_as_is(checkpoint)
    choices, left_out = [], {}
    for recipe in recipes:
        if recipe.tune is not None:
            left_out[recipe.name] = "searches for its plan"
            continue
        try:
            plan = sized_plan(checkpoint, facts, recipe)
            choices.append(Choice(recipe, costs_of(checkpoint, plan)))
        except (RecipeError, PlanError) as error:
            left_out[recipe.name] = str(error)
    meeting = [
        choice
        for choice in choices
        if (memory is None or choice.costs.weight_bytes <= memory)
        and (speed is None or choice.faster(original) >= speed)
    ]
    if not meeting:
        raise RecipeError(_nearest(checkpoint, original, choices))
    meeting.sort(key=lambda one: (-one.costs.weight_bytes, one.recipe.name))
    return Recommended(original, tuple(meeting), left_out)


def _nearest(checkpoint: Checkpoint, original: Costs, choices: Sequence[Choice]) -> str:
    if not choices:
        return f"{checkpoint.folder}: no shipped recipe can be followed here."
    least = min(choices, key=lambda one: one.costs.weight_bytes)
    fastest = max(choices, key=lambda one: one.faster(original))
    return (
        f"{checkpoint.folder}: no shipped recipe meets that. The smallest is "
        f"{least.recipe.name} with {gib(least.costs.weight_bytes)}, and "
        f"{fastest.recipe.name} reads {fastest.faster(original):.2f} times less for a "
        "token. Ask for less, or write a recipe of your own."
    )


def untouched(facts: ModelFacts) -> CutPlan:
    """The plan that changes nothing."""
    nothing = {"experts": {"method": "none"}, "slim": {"method": "none"}}
    recipe = Recipe.model_validate(nothing)
    return make_plan(None, recipe, facts, tool_version=__version__)


def plan_of_anyone(facts: ModelFacts, recipe: Recipe) -> CutPlan:
    """A plan of the recipe's sizes: random experts, the last of its layers."""
    stage = recipe.experts
    experts = ExpertStage(
        method="none" if stage.method == "none" else "score",
        criterion="random",
        drop=stage.drop,
        keep=stage.keep,
        # Where they go makes no difference to sizes, all experts being equally large.
        budget="per-layer",
        min_experts=stage.min_experts,
        groups=stage.groups,
        max_removed=stage.max_removed,
        protected=stage.protected,
    )
    # How zeros are spread takes statistics and changes no size.
    slim = recipe.slim.model_copy(update={"allocation": "uniform"})
    if recipe.slim.is_grouped:
        slim = slim.model_copy(update={"sparsity": None})
    # Experts and zeros of a total are about as large, whichever share they have.
    share = 0.25 if recipe.structured_share == "auto" else recipe.structured_share
    same = {
        "structured_share": share,
        "experts": experts,
        "slim": slim,
        "layers": _last_layers(facts, recipe.layers),
        "routing": _sized_routing(recipe),
        "order": "structured-first",
    }
    asked = recipe.model_copy(update=same)
    return make_plan(None, asked, facts, tool_version=__version__)


def _sized_routing(recipe: Recipe) -> str:
    """A routing with the same sizes that needs no statistics."""
    like = {"redirect": "drop", "mean": "preserve"}
    return like.get(recipe.routing, recipe.routing)


def sized_plan(checkpoint: Checkpoint, facts: ModelFacts, recipe: Recipe) -> CutPlan:
    """The same at the least total that ``max_bytes`` of the recipe allows, if any.

    Raises:
        RecipeError: No total fits.
    """
    if recipe.max_bytes is None:
        return plan_of_anyone(facts, recipe)

    def planned(sized: Recipe) -> CutPlan:
        decided = plan_of_anyone(facts, sized)
        return with_prediction(checkpoint, decided, facts=facts)

    return least_that_fits(planned, recipe, recipe.max_bytes)


def _last_layers(facts: ModelFacts, stage: LayerStage) -> LayerStage:
    """As many layers as asked for, listed: the last that have experts."""
    decoders = [at for at, layer in enumerate(facts.layers) if not layer.mtp]
    moe = [at for at in decoders if facts.layers[at].has_moe]
    blocks, dropped = stage.drop_blocks, stage.drop_moe
    if count := number_of(stage.block_count, stage.block_share, len(decoders)):
        blocks = tuple(decoders[-count:])
    if count := number_of(stage.moe_count, stage.moe_share, len(moe)):
        dropped = tuple([at for at in moe if at not in blocks][-count:])
    return LayerStage(
        drop_moe=dropped, drop_blocks=blocks, moe_norm=stage.moe_norm, mtp=stage.mtp
    )


def costs_as_is(checkpoint: Checkpoint) -> Costs:
    """What a checkpoint takes as it stands, pruned or not.

    Raises:
        PlanError: It routes by redirect: what an expert is used for is not in headers.
    """
    return costs_of(checkpoint, untouched(facts_of(checkpoint, "")))


def costs_of(checkpoint: Checkpoint, plan: CutPlan) -> Costs:
    """What the model that a plan makes takes.

    Raises:
        PlanError: The plan cannot be carried out.
    """
    tensors = output_tensors(checkpoint, plan)
    layers = {layer.index: layer for layer in checkpoint.layers}
    experts = {
        name
        for layer in checkpoint.moe_layers
        for name in checkpoint.expert_names(layer)
    }
    total = flops = decode = 0
    packed = bitmasks(checkpoint, plan, tensors)
    for tensor in tensors:
        parts: Sequence[TensorSpec] = packed.get(tensor.name) or [tensor]
        size = sum(tensor_bytes(part) for part in parts)
        total += size
        layer = None if tensor.layer is None else layers[tensor.layer]
        if layer is not None and layer.mtp:
            continue  # predicts further tokens; nobody serves it
        source = tensor.groups[0][0].source
        is_scale = checkpoint.is_scale(source)
        used, of_all = 1, 1
        if tensor.name == checkpoint.arch.embedding:
            # One row of the table is read for a token.
            used, of_all = 1, tensor.shape[0]
        elif layer is not None and (
            tensor.is_expert or source.removesuffix(SUFFIX) in experts
        ):
            of_all = len(plan.layers[layer.index].keep)
            # At batch 1 a token reads no more than its top-k of the experts left.
            used = min(layer.top_k, of_all)
        decode += size * used // of_all
        # Scales are read with their weights, but are no product of their own.
        if _multiplies(checkpoint, tensor) and not is_scale:
            flops += 2 * CONTEXT * tensor.parameters * used // of_all
    # Tied: stored once, but as the head all of the table is read and multiplied.
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    if tied and checkpoint.arch.head not in checkpoint.tensors:
        table = checkpoint.tensors[checkpoint.arch.embedding]
        decode += table.nbytes
        flops += 2 * CONTEXT * table.numel
    left = [
        layer
        for layer in checkpoint.decoder_layers
        if plan.layers[layer.index].action != "drop-block"
    ]
    return Costs(total, flops + attention_flops(checkpoint, left), decode)


def _multiplies(checkpoint: Checkpoint, tensor: OutputTensor) -> bool:
    """Whether a tensor is multiplied with every token it sees."""
    quantized = tensor.stands_for is not None
    matrix = quantized or len(tensor.shape) >= 2
    return matrix and tensor.name != checkpoint.arch.embedding


def attention_flops(
    checkpoint: Checkpoint, layers: Iterable[Layer], context: int = CONTEXT
) -> int:
    """FLOPs of scores and mixing, all tokens with all, causal or not."""
    config = checkpoint.config

    def size(key: str) -> int:
        return positive(config, key, checkpoint.folder / "config.json")

    heads = size("num_attention_heads")
    if config.get("kv_lora_rank"):
        keys = size("qk_nope_head_dim") + size("qk_rope_head_dim")
        values = size("v_head_dim")
    else:
        keys = values = (
            size("head_dim")
            if config.get("head_dim")
            else size(checkpoint.arch.config.hidden) // heads
        )
    return 2 * context**2 * heads * (keys + values) * sum(1 for _ in layers)


def parse_speed(text: str) -> float:
    """The number in ``2x`` or ``1.5``.

    Raises:
        RecipeError: It is none above 0.
    """
    try:
        speed = float(text.strip().lower().removesuffix("x"))
    except ValueError:
        speed = math.nan
    if not (math.isfinite(speed) and speed > 0):
        raise RecipeError(f"{text!r} is not a speed; write e.g. 2x or 1.5x.")
    return speed
