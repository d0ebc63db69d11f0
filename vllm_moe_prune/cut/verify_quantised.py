"""Quantised matrices against their source: what can be known without the data.

Rounding to nearest is done again and must give the same bytes. GPTQ and AWQ depend on
calibration, so of theirs only that every weight is finite is sure, and that what AWQ
scaled differs from its source by powers of two.
"""

import torch

from ..checkpoint.open import Checkpoint
from ..checkpoint.quantised import QuantisedTensor
from ..checkpoint.reader import read_tensor
from ..decide.plan import CutPlan
from ..decide.quantise import form_of
from ..errors import CheckpointError
from ..kernels.quantised import dequantise, pack
from ..slim.rtn import rtn
from .copy import build_tensor, group_mean, tensor_view
from .slice import OutputTensor


def check_quantised(
    source: Checkpoint, output: Checkpoint, tensor: OutputTensor, plan: CutPlan
) -> None:
    """Check one matrix, of which ``tensor`` holds the values.

    Raises:
        CheckpointError: It is not what the plan leads to.
    """
    name = f"{tensor.name.rpartition('.')[0]}.weight"
    info = output.tensors[name]
    form = form_of(plan.quantise)
    if not isinstance(info, QuantisedTensor):
        raise CheckpointError(f"{info.file}: {name}: is not quantised.")
    found = info.load()
    if plan.quantise.method == "rtn":
        weight = group_mean(source, tensor.groups[0])
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
    if not bool(torch.isfinite(dequantise(found, form, torch.float32)).all()):
        raise CheckpointError(f"{info.file}: {name}: holds NaN or infinity.")


def check_scaled(source: Checkpoint, output: Checkpoint, tensor: OutputTensor) -> None:
    """Check a tensor that AWQ multiplied: column by column, by powers of two.

    Raises:
        CheckpointError: It differs from its source in another way.
    """
    info = output.stored(tensor.name)
    found, expected = read_tensor(info).float(), build_tensor(source, tensor).float()
    ratio = torch.where(expected == 0, torch.nan, found / expected)
    rows = ratio.reshape(-1, ratio.shape[-1])
    column = rows.nanmedian(dim=0).values
    same = torch.isnan(rows) | (rows == column)
    powers = torch.isnan(column) | (torch.frexp(column).mantissa == 0.5)
    kept = (found == 0) == (expected == 0)
    if not bool(same.all() and powers.all() and kept.all()):
        raise CheckpointError(
            f"{info.file}: {tensor.name}: differs from the source other than by powers "
            "of two."
        )
