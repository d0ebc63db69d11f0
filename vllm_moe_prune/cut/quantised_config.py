"""The ``quantization_config`` of the output, in the words of compressed-tensors."""

import copy
import re
from collections.abc import Sequence
from typing import Any

from ..checkpoint.open import Checkpoint
from ..checkpoint.quantised import CONFIG_KEY
from ..decide.plan import CutPlan
from ..decide.quantise import form_of
from ..errors import PlanError
from .slice import output_tensors

PATTERN = "re:"
"""What names that are regular expressions begin with."""


def quantization_config(checkpoint: Checkpoint, plan: CutPlan) -> dict[str, Any]:
    """The block of a checkpoint whose experts the plan quantises, all in one form."""
    from compressed_tensors.quantization import QuantizationConfig

    form = form_of(plan.quantise)
    block = QuantizationConfig.model_validate(
        {
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": form.args,
                    "input_activations": form.inputs,
                    "format": form.format,
                }
            },
            "format": form.format,
            "quantization_status": "compressed",
            "ignore": unquantised(checkpoint, plan),
        }
    )
    found: dict[str, Any] = block.model_dump(mode="json")
    return found


def unquantised(checkpoint: Checkpoint, plan: CutPlan) -> list[str]:
    """Names of all modules that stay as they are, of layers as one pattern each."""
    start, _, _ = checkpoint.arch.layer_prefix.partition("{layer}")
    names = []
    for tensor in output_tensors(checkpoint, plan):
        base, _, part = tensor.name.rpartition(".")
        matrix = part == "weight" and len(tensor.shape) == 2
        if not matrix or tensor.made == "quantised" or _is_embedding(base):
            continue
        layer, _, inner = base.removeprefix(start).partition(".")
        if base.startswith(start) and layer.isdecimal():
            name = f"{PATTERN}{re.escape(start)}\\d+\\.{re.escape(inner)}$"
            names.append(name)
        else:
            names.append(base)
    return list(dict.fromkeys(names))


def _is_embedding(base: str) -> bool:
    return base.endswith("embed_tokens")


def renumbered(checkpoint: Checkpoint, plan: CutPlan) -> dict[str, Any]:
    """The input's block with the numbers that its layers have in the output.

    Raises:
        PlanError: A pattern may mean a number of a layer, and numbers change.
    """
    block: dict[str, Any] = copy.deepcopy(checkpoint.config[CONFIG_KEY])
    left = [layer.layer for layer in plan.layers if layer.action != "drop-block"]
    new = {old: at for at, old in enumerate(left)}
    if len(left) == len(plan.layers):
        return block
    for key in ("ignore", "modules_to_not_convert"):
        if block.get(key):
            block[key] = _renamed(checkpoint, block[key], new)
    for group in block.get("config_groups", {}).values():
        group["targets"] = _renamed(checkpoint, group["targets"], new)
    return block


def _renamed(
    checkpoint: Checkpoint, names: Sequence[str], new: dict[int, int]
) -> list[str]:
    found = []
    for name in names:
        if name.startswith(PATTERN) and re.search(r"layers\\?\.[^\\]*\d", name):
            raise PlanError(
                f"{checkpoint.folder}: {CONFIG_KEY}: {name!r} names layers by number, "
                "which dropped blocks change. Write it without a pattern."
            )
        layer = checkpoint.arch.layer_of(name)
        if layer is None:
            found.append(name)
        elif layer in new:
            prefix = checkpoint.arch.layer_prefix
            inner = name.removeprefix(prefix.format(layer=layer))
            found.append(prefix.format(layer=new[layer]) + inner)
    return found
