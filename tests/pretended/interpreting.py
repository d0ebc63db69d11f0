"""Triton's interpreter, put right: what devices do and it does not.

It multiplies the bit patterns of bf16 (triton #11584), and cuts float32 off where
devices round. Tensors of the pretended device are given to it as those of the CPU.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

from tests.pretended import dispatch

PLAIN_DOT = interpreter.InterpreterBuilder.create_dot
PLAIN_CAST = interpreter.InterpreterBuilder.cast_impl
PLAIN_CALL = interpreter.GridExecutor.__call__


def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    """float32, which holds every bf16."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return PLAIN_DOT(self, widened(a), widened(b), *rest)


def cast_impl(self: Any, source: Any, kind: Any) -> Any:
    if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
        return PLAIN_CAST(self, source, kind)
    rounded = torch.from_numpy(np.array(source.data)).bfloat16()
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return interpreter.TensorHandle(bits, tl.bfloat16)


def call(self: Any, *args: Any, **kwargs: Any) -> None:
    device = dispatch.ACTIVE
    if device is None:
        return PLAIN_CALL(self, *args, **kwargs)
    device.launches[self.fn.__name__] += 1
    device.lines[dispatch.line()] += 1
    args = dispatch.mapped(dispatch.inner, args)
    kwargs = {key: dispatch.inner(value) for key, value in kwargs.items()}
    with _disable_current_modes():
        PLAIN_CALL(self, *args, **kwargs)
    dispatch.capture(PLAIN_CALL, (self, *args), kwargs)


def install() -> None:
    """For this process."""
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.cast_impl = cast_impl
    interpreter.GridExecutor.__call__ = call
