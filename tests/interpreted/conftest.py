"""Tests of Triton kernels on CPU tensors, in a process of their own.

Triton decides when it is imported whether it interprets: tests/unit/test_triton.py runs
this folder with TRITON_INTERPRET=1; elsewhere nothing here is collected.
"""

import os

import numpy as np
from hypothesis import Phase, settings

# Examples are small already, and the interpreter is slow: shrinking takes minutes.
settings.register_profile(
    "interpreted",
    settings.get_profile("repeatable"),
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile("interpreted")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    # The interpreter multiplies the bit patterns of bf16 (triton #11584): it is given
    # float32, which holds every bf16. And it cuts float32 off where devices round.
    plain_dot = interpreter.InterpreterBuilder.create_dot
    plain_cast = interpreter.InterpreterBuilder.cast_impl

    def widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):  # type: ignore[no-untyped-def]
        return plain_dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, source, kind):  # type: ignore[no-untyped-def]
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return plain_cast(self, source, kind)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16()
        bits = rounded.view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.InterpreterBuilder.cast_impl = cast_impl
