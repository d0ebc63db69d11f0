"""Trim-only and slim-only beside both: whose part of a speed-up is whose.

UNIFIED compares quantized models under fused kernels with unquantized ones under none;
most of its factor is the kernels'. Same runtime, four rows, tells them apart.
"""

from typing import Literal

from ..checkpoint.open import Checkpoint
from ..decide.cut_plan import CutPlan
from ..recipes.schema import QuantizeStage

Role = Literal["baseline", "trim-only", "slim-only", "both"]
ROLES: tuple[Role, ...] = ("baseline", "trim-only", "slim-only", "both")


def role_of(checkpoint: Checkpoint, original: Checkpoint, plan: CutPlan | None) -> Role:
    """What was done to a checkpoint: fewer experts or layers, smaller weights, both.

    Args:
        checkpoint: Pruned.
        original: What it was pruned from.
        plan: The plan it carries, if any; zeros that are stored show nowhere else.
    """
    # A dropped block makes the list shorter, so it counts as trimmed too.
    trimmed = _experts(checkpoint) != _experts(original)
    slimmed = (
        (plan is not None and (plan.is_slimmed or plan.is_quantized))
        or checkpoint.form != original.form
        or checkpoint.storage != original.storage
    )
    if trimmed and slimmed:
        return "both"
    if trimmed:
        return "trim-only"
    return "slim-only" if slimmed else "baseline"


def _experts(checkpoint: Checkpoint) -> list[int]:
    return [layer.num_experts for layer in checkpoint.decoder_layers]


def trimming_of(plan: CutPlan) -> CutPlan:
    """The plan without its zeros and its quantization."""
    layers = [layer.model_copy(update={"sparsity": 0.0}) for layer in plan.layers]
    return _with(plan, slim="none", quantize=QuantizeStage(), layers=tuple(layers))


def slimming_of(plan: CutPlan) -> CutPlan:
    """The plan's zeros and quantization alone: every expert and every layer stays.

    A layer that the plan takes away is slimmed like the mean of those that stay.
    """
    stay = [layer.sparsity for layer in plan.layers if layer.keep]
    mean = sum(stay) / len(stay)
    layers = [
        layer.model_copy(
            update={
                "action": "keep",
                "keep": tuple(range(layer.experts)),
                "clusters": None,
                "unserved": (),
                "reconstruct": False,
                "merge_weights": None,
                "refit": False,
                # Dense layers have no experts, and zeros of their own.
                "sparsity": layer.sparsity if layer.action == "keep" else mean,
            }
        )
        for layer in plan.layers
    ]
    return _with(plan, routing="drop", layers=tuple(layers))


def _with(plan: CutPlan, **update: object) -> CutPlan:
    # What was predicted is true of the original plan only.
    return plan.model_copy(update={**update, "predicted": None})
