"""The ``quantization_config`` of a quantized input, where layers get other numbers."""

import copy
import re
from collections.abc import Sequence
from typing import Any

from ..checkpoint.open import Checkpoint
from ..checkpoint.quantized_tensors import CONFIG_KEY
from ..decide.cut_plan import CutPlan
from ..errors import PlanError

PATTERN = "re:"
"""What names that are regular expressions begin with."""
ANY_NUMBER = re.compile(r"\[0-9\]|\\d")
NUMBERED = re.compile(r"layers\\?\.[^.\\]*\d")
"""Of a pattern without those: it tells layers apart by their numbers."""


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
    groups = block.get("config_groups", {})
    for name, group in groups.items():
        if isinstance(group, list):  # a scheme of the library's by name, and targets
            groups[name] = _renamed(checkpoint, group, new)
        else:
            group["targets"] = _renamed(checkpoint, group["targets"], new)
    return block


def _renamed(
    checkpoint: Checkpoint, names: Sequence[str], new: dict[int, int]
) -> list[str]:
    found = []
    for name in names:
        if name.startswith(PATTERN) and NUMBERED.search(ANY_NUMBER.sub("", name)):
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
