"""Triton kernels compiled for devices that are not here, and what they take there."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


class Used(NamedTuple):
    """By one thread; shared memory by a block, in bytes."""

    registers: int
    spilled: int
    shared: int


def compiled(
    kernel: Any,
    capability: int,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    tmp_path: Path,
    **options: int,
) -> Used:
    """Resources of a kernel on a device of some compute capability, such as 90.

    Args:
        kernel: Jitted.
        capability: .
        types: Of its arguments, as Triton spells them; pointers and sizes are taken to
            divide by 16, as all of ours do that matter.
        constants: Its constexprs.
        tmp_path: For the binary.
        options: num_warps and num_stages.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in types.items()
            if kind.startswith("*")
        },
    )
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options=options)
    path = tmp_path / "kernel.cubin"
    path.write_bytes(made.asm["cubin"])
    said = subprocess.run(
        [TOOL, "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    match = USAGE.search(said)
    assert match is not None, said
    registers, stack, local = map(int, match.groups())
    return Used(registers, stack + local, made.metadata.shared)
