"""Quantized matrices against their source: what can be known without the data.

Rounding to nearest is done again and must give the same bytes. GPTQ and AWQ depend on
calibration, so of theirs only that every weight is finite is sure, and that what AWQ
scaled differs from its source by powers of two.
"""

import torch

from ..checkpoint.open import Checkpoint
from ..checkpoint.quantized_tensors import QuantizedTensor
from ..checkpoint.reader import read_tensor
from ..decide.cut_plan import CutPlan
from ..decide.quantize import form_of
from ..errors import CheckpointError
from ..kernels.quantized import dequantize, pack
from ..slim.rtn import rtn
from .copy import build_tensor, group_mean, tensor_view
from .slice import OutputTensor


def is_refitted(tensor: OutputTensor, plan: CutPlan) -> bool:
    """Whether it may hold down projections that were fitted to the text."""
    if tensor.refitted:
        return True
    if tensor.layer is None or tensor.role != "down" or plan.narrow.refit == "none":
        return False
    return plan.layers[tensor.layer].narrows


def check_quantized(
    source: Checkpoint,
    output: Checkpoint,
    tensor: OutputTensor,
    plan: CutPlan,
    kept_K: torch.Tensor | None,
) -> None:
    """Check one matrix, of which ``tensor`` holds the values.

    Args:
        source: The input.
        output: What was written.
        tensor: The first part of the matrix.
        plan: What was done.
        kept_K: The channels that its expert kept; None: all.

    Raises:
        CheckpointError: It is not what the plan leads to.
    """
    name = f"{tensor.name.rpartition('.')[0]}.weight"
    info = output.tensors[name]
    form = form_of(plan.quantize)
    if not isinstance(info, QuantizedTensor):
        raise CheckpointError(f"{info.file}: {name}: is not quantized.")
    found = info.load()
    # The head belongs to no layer.
    rounded = plan.quantize.method == "rtn" or tensor.layer is None
    if rounded and not is_refitted(tensor, plan):
        weight = group_mean(source, tensor.groups[0])
        if kept_K is not None:
            weight = weight.index_select(int(tensor.role == "down"), kept_K)
        expected = pack(rtn(weight, form), form)
        wrong = [
            part
            for part, stored in pack(found, form).items()
            if tensor_view(stored) != tensor_view(expected[part])
        ]
        if wrong:
            raise CheckpointError(
                f"{info.file}: {name}: {wrong[0]} is not what rounding gives."
            )
    if not bool(torch.isfinite(dequantize(found, form, torch.float32)).all()):
        raise CheckpointError(f"{info.file}: {name}: holds NaN or infinity.")


def check_scaled(source: Checkpoint, output: Checkpoint, tensor: OutputTensor) -> None:
    """Check a tensor that AWQ multiplied: column by column, by powers of two.

    Raises:
        CheckpointError: It differs from its source in another way.
    """
    info = output.stored(tensor.name)
    found, dense = read_tensor(info), build_tensor(source, tensor)
    ratio = (found.float() / dense.float()).reshape(-1, found.shape[-1])
    # Zeros tell nothing; a column of them may have any scale.
    column = ratio.masked_fill(ratio == 0, torch.nan).nanmedian(dim=0).values
    # Norms are divided by AWQ's scale, what reads them is multiplied.
    scale = torch.exp2(column.log2().round()).nan_to_num(nan=1.0)
    if not torch.equal((dense.float() * scale).to(found.dtype), found):
        raise CheckpointError(
            f"{info.file}: {tensor.name}: differs from the source other than by powers "
            "of two."
        )
