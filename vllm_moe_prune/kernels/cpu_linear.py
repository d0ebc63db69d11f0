"""One linear layer of integers, by the compiled CPU kernel.

T tokens, K inputs, N outputs; blocks as ``int_blocks`` has them, of one expert.
"""

import ctypes

import torch
from torch import Tensor

from .blocks import BLOCK, PAIR, STEP, round_up
from .cpu_library import (
    EXACT,
    INT4,
    INT8,
    TYPES,
    all_dots,
    level,
    library,
    runs_integers,
)
from .int_blocks import IntBlocks

POINTERS = ("x", "values", "scales", "zeros", "out")
NUMBERS = ("tokens", "inputs", "outputs", "group", "scale_type", "threads")


class _LinearStruct(ctypes.Structure):
    """``MoePruneLinear`` of ``cpu/linear.cpp``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        *((name, ctypes.c_int32) for name in ("type", "storage", "level", "dots")),
    )


def runs_linear() -> bool:
    """Whether the kernel is the way to run linear layers of integers here."""
    # A library compiled before there were such layers lacks the function.
    return runs_integers() and hasattr(library(), "moe_prune_linear")


def linear(
    x_TK: Tensor,
    w: IntBlocks,
    outputs: int,
    *,
    dots: int = EXACT,
    at_level: int | None = None,
    threads: int = 0,
) -> Tensor:
    """Tokens [T, K] times a matrix, [T, N] in their dtype. Needs ``runs_linear()``.

    Args:
        x_TK: bf16, fp16 or float32.
        w: Blocks of one matrix.
        outputs: N.
        dots: What multiplies tokens that are rounded to int8, as ``int_blocks.rounded``
            says; one of ``all_dots()``, and groups must be multiples of 32.
        at_level: Run on older instructions than the processor has; None: the best.
        threads: 0: as many as PyTorch uses.
    """
    found = library()
    assert found is not None
    x_TK = x_TK.contiguous()
    tokens, inputs = x_TK.shape
    # Pointers go to C++ from here: every shape it computes with is checked first.
    blocks, padded = 2 * -(-outputs // PAIR), round_up(inputs, STEP)
    groups = w.scales_EBGO.shape[2]
    assert w.bits in {4, 8}
    assert w.values_EBWO.shape == (1, blocks, padded * w.bits // 32, BLOCK)
    assert w.values_EBWO.dtype == torch.int32
    assert padded % groups == 0
    assert w.group % 2 == 0
    assert w.zeros_EBGO is None or w.zeros_EBGO.dtype == torch.int8
    for part in (w.scales_EBGO, w.zeros_EBGO):
        assert part is None or part.shape == (1, blocks, groups, BLOCK)
    if dots != EXACT:
        assert dots in all_dots()
        assert w.group % STEP == 0
    out_TN = x_TK.new_empty(tokens, outputs)
    parts = (x_TK, w.values_EBWO, w.scales_EBGO, w.zeros_EBGO, out_TN)
    assert all(part is None or part.is_contiguous() for part in parts)
    addresses = [None if part is None else part.data_ptr() for part in parts]
    numbers = (tokens, inputs, outputs, w.group, TYPES[w.scales_EBGO.dtype], threads)
    used = level() if at_level is None else min(at_level, level())
    storage = INT4 if w.bits == 4 else INT8
    how = (TYPES[x_TK.dtype], storage, used, dots)
    found.moe_prune_linear(ctypes.byref(_LinearStruct(*addresses, *numbers, *how)))
    return out_TN
