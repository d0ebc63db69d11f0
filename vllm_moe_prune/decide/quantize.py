"""How a recipe's quantizing turns out for one checkpoint."""

from ..errors import RecipeError
from ..kernels.quantized import BLOCK, GROUP_SIZES, Bits, Form
from ..recipes.schema import QuantizeStage
from .facts import ModelFacts

SIZES: dict[Bits, tuple[int | None, ...]] = {
    "int4": GROUP_SIZES,
    "int8": (None,),
    "fp8": (BLOCK, None),
}
"""What is tried where a recipe names no size, the best first; None: whole rows."""


def form_of(stage: QuantizeStage) -> Form:
    """How matrices are quantized by a stage whose method is not none."""
    return Form(stage.weights, stage.group_size, stage.zero_point, stage.act_order)


def said_of(stage: QuantizeStage) -> str:
    """How a stage quantizes, and what, as a person says it."""
    form = form_of(stage).words
    if stage.scope == ("experts",):
        return form
    return f"{form} ({', '.join(stage.scope)})"


def resolved_form(stage: QuantizeStage, facts: ModelFacts) -> QuantizeStage:
    """The stage with a group size: int4 needs one, fp8 has one where blocks fit.

    Raises:
        RecipeError: Matrices in scope do not have such a form; names the first.
    """
    if stage.method == "none":
        return stage
    sizes = (stage.group_size,) if stage.group_size else SIZES[stage.weights]
    tried = [stage.model_copy(update={"group_size": size}) for size in sizes]
    problems = [(found, _misfit(found, facts)) for found in tried]
    for found, problem in problems:
        if problem is None:
            return found
    wish = "Choose quantize.method: rtn and quantize.weights: int8."
    if stage.group_size:
        wish = f"Leave out quantize.group_size. If that does not help: {wish}"
    raise RecipeError(f"quantize.weights {stage.weights}: {problems[-1][1]}. {wish}")


def _misfit(stage: QuantizeStage, facts: ModelFacts) -> str | None:
    """The first matrix in scope that does not have the form, and why."""
    form = form_of(stage)
    for at, layer in enumerate(facts.layers):
        for matrix in (
            *(layer.expert_matrices if layer.has_moe else ()),
            *layer.others,
        ):
            why = form.misfit(matrix.rows, matrix.cols)
            if matrix.part in stage.scope and why:
                return f"layer {at}: {matrix.name or 'an expert matrix'}: {why}"
    if (head := facts.head) is not None and "head" in stage.scope:
        why = form.misfit(head.rows, head.cols)
        return f"{head.name}: {why}" if why else None
    return None
