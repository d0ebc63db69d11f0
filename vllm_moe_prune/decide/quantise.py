"""How a recipe's quantising turns out for one checkpoint."""

from ..errors import RecipeError
from ..kernels.quantised import BLOCK, GROUP_SIZES, Form
from ..recipe import QuantiseStage
from .facts import ModelFacts


def form_of(stage: QuantiseStage) -> Form:
    """How matrices are quantised by a stage whose method is not none."""
    if stage.weights != "int4":
        return Form(stage.weights, BLOCK if stage.weights == "fp8" else None)
    return Form("int4", stage.group_size, stage.zero_point, stage.act_order)


def resolved_form(stage: QuantiseStage, facts: ModelFacts) -> QuantiseStage:
    """The stage with a group size, where it needs one.

    Raises:
        RecipeError: The experts' matrices do not have such a form; names the first.
    """
    if stage.method == "none":
        return stage
    sizes = [stage.group_size] if stage.group_size else GROUP_SIZES
    tried = [stage.model_copy(update={"group_size": size}) for size in sizes]
    problems = [(found, _misfit(form_of(found), facts)) for found in tried]
    for found, problem in problems:
        if problem is None:
            return found if stage.weights == "int4" else stage
    wish = "Choose quantise.weights: int8."
    if stage.weights == "int4" and stage.group_size:
        wish = "Leave out quantise.group_size, or choose quantise.weights: int8."
    raise RecipeError(f"quantise.weights {stage.weights}: {problems[-1][1]}. {wish}")


def _misfit(form: Form, facts: ModelFacts) -> str | None:
    for at, layer in enumerate(facts.layers):
        for matrix in layer.expert_matrices if layer.has_moe else ():
            if why := form.misfit(matrix.rows, matrix.cols):
                return f"layer {at}: {matrix.name or 'an expert matrix'}: {why}"
    return None
