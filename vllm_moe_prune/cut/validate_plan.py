"""What a cut refuses: plans that its input could not survive as they mean it."""

from typing import Literal

from ..archs.spec import MOE_NORM
from ..checkpoint.expert_tensors import EXPERT
from ..checkpoint.open import Checkpoint, Layer
from ..decide.cut_plan import CutPlan
from ..decide.quantize import form_of
from ..errors import PlanError
from .matrices import channel_block, dense_matrices, head_matrix, updates


def check_possible(checkpoint: Checkpoint, plan: CutPlan) -> None:
    """Refuse a plan that cannot be carried out on a checkpoint.

    Raises:
        PlanError: Nothing would be left to route, rows no longer match experts,
            stored values would have to change that must not, or quantized ones would
            not have the form that the plan asks for.
    """
    if not any(layer.keep for layer in plan.layers):
        raise PlanError(
            f"the plan leaves no layer of {checkpoint.origin.name} with experts; keep "
            "at least one MoE sublayer."
        )
    if plan.refits and (fixed := fixed_form(checkpoint)):
        raise PlanError(
            f"{checkpoint.folder}: the plan refits experts (refit), but these stay "
            f"{fixed}. Plan with experts.refit: none, or start from bf16 weights."
        )
    if checkpoint.blocks is not None:
        _check_fp8(plan)
    if checkpoint.form is not None:
        _check_means(plan, "quantized")
    check_stored(
        checkpoint,
        zeros=plan.is_slimmed,
        quantizes=plan.is_quantized,
        narrows=plan.is_narrowed,
    )
    if plan.is_quantized:
        _check_form(checkpoint, plan)
    for layer in checkpoint.moe_layers:
        _check_unknown(checkpoint, layer, plan)
        _check_width(checkpoint, layer, plan)
    _check_beside(checkpoint, plan)
    # A cut takes rows with their experts; redirected rows have none of their own.
    for layer in checkpoint.layers:
        if layer.redirect not in (None, tuple(range(layer.num_experts))):
            raise PlanError(
                f"{checkpoint.folder}: layer {layer.index}: its router still has rows "
                "of removed experts (routing: redirect), so rows and experts do not "
                "match. Cut the original instead."
            )


def fixed_form(checkpoint: Checkpoint) -> Literal["fp8", "quantized"] | None:
    """How experts are stored whose values a cut must leave as they are."""
    if checkpoint.form is not None:
        return "quantized"
    return "fp8" if checkpoint.blocks is not None else None


def check_stored(
    checkpoint: Checkpoint, *, zeros: bool, quantizes: bool, narrows: bool
) -> None:
    """Refuse what the way in which weights are stored does not allow.

    Args:
        checkpoint: The input.
        zeros: Whether weights will be zeroed.
        quantizes: Whether experts will be quantized.
        narrows: Whether experts will lose channels.

    Raises:
        PlanError: They are quantized already, or packed.
    """
    if checkpoint.form is not None and (zeros or quantizes or narrows):
        raise PlanError(
            f"{checkpoint.folder}: its weights are quantized already, so a cut copies "
            "them. Set slim.method: none, quantize.method: none and narrow.share: 0, "
            "or start from bf16 weights."
        )
    packed = not all(rule.per_expert for rule in checkpoint.layout.experts)
    if quantizes and packed:
        raise PlanError(
            f"{checkpoint.folder}: quantize needs a tensor for each matrix of each "
            f"expert, which layout {checkpoint.layout.name} has not. Save the model "
            "with its experts apart, as the Hub has it."
        )
    if quantizes and checkpoint.blocks is not None:
        raise PlanError(
            f"{checkpoint.folder}: quantize changes weights that are fp8 already. Set "
            "quantize.method: none, or start from bf16 weights."
        )


def _check_form(checkpoint: Checkpoint, plan: CutPlan) -> None:
    """Refuse what a plan that was edited by hand may ask of experts."""
    if plan.is_slimmed:
        raise PlanError("the plan writes zeros and quantizes; only one can be done.")
    form = form_of(plan.quantize)
    for layer in checkpoint.moe_layers:
        width = plan.layers[layer.index].width
        for rule in checkpoint.layout.experts:
            for expert in range(layer.num_experts):
                name = rule.name(layer.index, expert)
                rows, cols = checkpoint.tensors[name].shape
                if width is not None:
                    down = rule.role == "down"
                    rows, cols = (rows, width) if down else (width, cols)
                if why := form.misfit(rows, cols):
                    raise PlanError(f"the plan's quantize: {name}: {why}.")
    scope = plan.quantize.scope
    others = [
        one for layer in checkpoint.layers for one in dense_matrices(checkpoint, layer)
    ]
    if (head := head_matrix(checkpoint)) is not None:
        others.append(head)
    for one in others:
        if one.part in scope and (why := form.misfit(one.rows, one.cols)):
            raise PlanError(f"the plan's quantize: {one.name}: {why}.")


def _check_means(plan: CutPlan, kind: str) -> None:
    for layer_plan in plan.layers:
        if layer_plan.reconstruct and any(
            len(cluster) > 1 for cluster in layer_plan.clusters or ()
        ):
            raise PlanError(
                f"layer {layer_plan.layer}: reconstruct averages experts, which {kind} "
                "weights do not survive exactly. Set experts.reconstruct: never, or "
                "start from bf16 weights."
            )


def _check_unknown(checkpoint: Checkpoint, layer: Layer, plan: CutPlan) -> None:
    """Refuse changes to experts that tensors unknown to the table would not follow."""
    layer_plan, arch = plan.layers[layer.index], checkpoint.arch
    if not layer_plan.keep:
        return
    if extras := checkpoint.extras(layer):
        what = f"{checkpoint.folder}: layer {layer.index}: {extras[0].name(0)!r}"
        if layer_plan.reconstruct and any(
            len(cluster) > 1 for cluster in layer_plan.clusters or ()
        ):
            raise PlanError(
                f"{what} is not known of this family, so experts with it cannot be "
                "averaged. Set experts.reconstruct: never."
            )
        if layer_plan.narrows:
            raise PlanError(
                f"{what} is not known of this family, so experts with it cannot be "
                "narrowed. Set narrow.share: 0, or save the model without it."
            )
        if plan.is_quantized:
            raise PlanError(
                f"{what} is not known of this family, so experts with it cannot be "
                "quantized. Set quantize.method: none, or save the model without it."
            )
    # With the same ids, tensors unknown to the table still mean the same.
    if layer_plan.keep == tuple(range(layer.num_experts)):
        return
    prefix = arch.layer_prefix.format(layer=layer.index)
    shared = (arch.shared.prefix, arch.shared.weigher) if arch.shared else ()
    # Of the MoE sublayer but of no single expert: its norm, shared experts.
    known = tuple(prefix + part for part in (*shared, f"{MOE_NORM}.") if part)
    routed = {rule.name(layer.index) for rule in checkpoint.layout.rules}
    for name in checkpoint.layer_names(layer.index):
        if (
            arch.is_moe_member(name, layer.index)
            and not name.startswith(known)
            and name not in routed
            and not EXPERT.match(name)
        ):
            raise PlanError(
                f"{checkpoint.folder}: {name!r} is not known of this family and may "
                f"name experts, of which layer {layer.index} loses some or whose order "
                "changes. Keep all experts of the layer in their order, or save the "
                "model without it."
            )


def _check_width(checkpoint: Checkpoint, layer: Layer, plan: CutPlan) -> None:
    """Refuse a width that no config could describe, or that breaks FP8 blocks up."""
    width = plan.layers[layer.index].width
    if width is None:
        return
    at = f"layer {layer.index}: width {width}"
    if checkpoint.arch.shared_width is None and layer.shared_width % width:
        raise PlanError(
            f"{at}: its shared experts' {layer.shared_width} channels are no multiple "
            "of it, so no config could describe both. Choose a width that divides them."
        )
    block = channel_block(checkpoint, layer)
    if block > 1 and (width % block or plan.narrow.refit != "none"):
        raise PlanError(
            f"{at}: fp8 experts lose whole blocks of {block} channels and are not "
            f"refitted. Choose a multiple of {block} and narrow.refit: none, or start "
            "from bf16 weights."
        )


def _check_beside(checkpoint: Checkpoint, plan: CutPlan) -> None:
    """Refuse to drop blocks where other names than those of layers may count them."""
    if all(layer.action != "drop-block" for layer in plan.layers):
        return
    for name in checkpoint.layer_names(None):
        if any(part.isdecimal() for part in name.split(".")):
            raise PlanError(
                f"{checkpoint.folder}: {name!r} is not known of this family and may "
                "count layers, of which the plan drops some. Drop no blocks, or save "
                "the model without it."
            )


def _check_fp8(plan: CutPlan) -> None:
    """Refuse what would change FP8 weights other than to zero."""
    _check_means(plan, "fp8")
    if plan.is_slimmed and updates(plan, down=True):
        what = "compensate" if plan.slim != "sparsegpt" else "method sparsegpt"
        raise PlanError(
            f"slim.{what} changes the weights that stay, which fp8 weights do "
            "not survive exactly. Use wanda or magnitude without it, or start from "
            "bf16 weights."
        )
