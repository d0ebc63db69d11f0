"""The ``quantization_config`` of the output, in the words of compressed-tensors."""

import re
from typing import Any

from ..checkpoint.module_names import PATTERN
from ..checkpoint.open import Checkpoint
from ..decide.cut_plan import CutPlan
from ..decide.quantize import form_of
from .matrices import quantized_head
from .slice import output_tensors


def quantization_config(checkpoint: Checkpoint, plan: CutPlan) -> dict[str, Any]:
    """The block of a checkpoint that the plan quantizes, all in one form."""
    from compressed_tensors.quantization import QuantizationConfig

    form = form_of(plan.quantize)
    # To vLLM a head is no Linear: only its name names it.
    head = quantized_head(checkpoint, plan)
    named = [] if head is None else [head.removesuffix(".weight")]
    block = QuantizationConfig.model_validate(
        {
            "config_groups": {
                "group_0": {
                    # All linear layers but those under ignore.
                    "targets": ["Linear", *named],
                    "weights": form.args,
                    "input_activations": form.inputs,
                    "format": form.format,
                }
            },
            "format": form.format,
            "quantization_status": "compressed",
            "ignore": unquantized(checkpoint, plan),
        }
    )
    found: dict[str, Any] = block.model_dump(mode="json")
    return found


def unquantized(checkpoint: Checkpoint, plan: CutPlan) -> list[str]:
    """Names of all modules that stay as they are, of layers as one pattern each."""
    start, _, _ = checkpoint.arch.layer_prefix.partition("{layer}")
    names = []
    for tensor in output_tensors(checkpoint, plan):
        base, _, part = tensor.name.rpartition(".")
        matrix = part == "weight" and len(tensor.shape) == 2
        # Routers are Linear too: listed, they stay dense.
        if not matrix or tensor.made == "quantized" or _is_embedding(base):
            continue
        layer, _, inner = base.removeprefix(start).partition(".")
        if base.startswith(start) and layer.isdecimal():
            # One pattern for all layers, instead of a name in each.
            name = f"{PATTERN}{re.escape(start)}\\d+\\.{re.escape(inner)}$"
            names.append(name)
        else:
            names.append(base)
    return list(dict.fromkeys(names))


def _is_embedding(base: str) -> bool:
    return base.endswith("embed_tokens")
