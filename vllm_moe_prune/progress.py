"""Progress reports of long stages, once per layer or 64 MiB."""

import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .files.regular import read_bounded

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage has come."""

    stage: str
    layer: int
    """Layers finished."""
    layers: int
    """0: it does not go by layers."""
    bytes_done: int
    bytes_total: int
    counted: Literal["bytes", "steps"] = "bytes"
    """What ``bytes_done`` and ``bytes_total`` count; steps are of training."""
    note: str = ""
    """Shown behind the numbers, such as the best loss so far."""


Report = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """The report of a caller that does not watch."""


def peak_rss_bytes() -> int:
    """Of this process; ``ru_maxrss`` starts at what its parent had when it forked."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in read_bounded(status, MIB).decode().splitlines():
            if line.startswith("VmHWM:"):
                # The kernel says kB and means KiB.
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gib(size_bytes: float) -> str:
    """Bytes with a unit that suits them."""
    name, unit = unit_of(size_bytes)
    return f"{size_bytes / unit:.2f} {name}"


def unit_of(size_bytes: float) -> tuple[str, int]:
    """GiB or MiB, and how many bytes that is."""
    return ("GiB", GIB) if size_bytes >= 0.1 * GIB else ("MiB", MIB)
