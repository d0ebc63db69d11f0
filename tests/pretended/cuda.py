"""A CUDA device that is not there: tensors that say cuda:0 and hold values on the CPU.

Operations compute. Mixing devices fails as it does on CUDA. What makes the host wait is
counted by the line of ours that did it, and fails while a graph is captured. What runs
is what a CPU computes: this shows where work is done and what waits, never how fast.

    with PretendedCuda() as device:
        cut(checkpoint, plan, out, RunOptions(device="cuda"))
    device.waits  # Counter of "file:line what"
"""

import collections
import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretended import dispatch
from tests.pretended.replaced import Graph, of_cuda, of_torch

HERE = Path(__file__).parent


@functools.cache
def install_guard() -> None:
    """Compile and load the guard, once for all processes."""
    text = (HERE / "guard.cpp").read_bytes()
    digest = hashlib.sha256(text + torch.__version__.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"pretended-cuda-{os.getuid()}-{digest}.so"
    if not library.exists():
        root = Path(torch.__file__).parent
        made = library.with_suffix(f".{os.getpid()}")
        how = ["-O0", "-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}"]
        command = ["g++", *how, HERE / "guard.cpp", f"-L{root / 'lib'}", "-lc10"]
        subprocess.run([*command, "-o", made], check=True)
        made.replace(library)
    ctypes.CDLL(str(library))


class PretendedCuda(TorchDispatchMode):
    """While it is entered, there is a CUDA device."""

    def __enter__(self) -> "PretendedCuda":
        install_guard()
        self.capturing: Graph | None = None
        self.waits: collections.Counter[str] = collections.Counter()
        self.copies: collections.Counter[str] = collections.Counter()
        self.overlapped: collections.Counter[str] = collections.Counter()
        self.launches: collections.Counter[str] = collections.Counter()
        self.lines: collections.Counter[str] = collections.Counter()
        self._stack = contextlib.ExitStack()
        for owner, name, value in (*of_torch(), *of_cuda(self)):
            self._stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        dispatch.ACTIVE = self
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        dispatch.ACTIVE = None
        self._stack.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch.run(func, args, kwargs or {})
