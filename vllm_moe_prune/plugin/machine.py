"""What of a machine a vLLM server on CPUs is to use: which cores, which libraries.

vLLM binds one thread to each physical core of a NUMA node and leaves one core per rank
to its other processes (``vllm/utils/ompmultiprocessing.py``). On two cores that is half
of the machine. How many cores it leaves is all that is set here: the binding itself,
and with it cpusets and hyperthreads, stays vLLM's.
"""

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ServeError
from ..files.regular import MIB, read_bounded
from .compat import is_cpu_build

AUTO, VLLM = "auto", "vllm"
LIST = re.compile(r"\d+(-\d+)?([,|]\d+(-\d+)?)*")
RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
BIND = "VLLM_CPU_OMP_THREADS_BIND"
OWN = (
    *(BIND, RESERVED, "VLLM_CPU_SIM_MULTI_NUMA", "OMP_NUM_THREADS", "OMP_PLACES"),
    *("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "CPU_VISIBLE_MEMORY_NODES"),
)
"""Variables by which users choose cores themselves; then nothing is set."""
RANKS = (
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"),
    *("--data-parallel-size", "-dp"),
)
ALL_CORES = 5
"""Up to so many cores all compute. A core that the scheduler shares gives about 0.82
of its time to computing (two cores instead of one: 1.65 times the speed), and the
slowest thread sets the pace: n cores at 0.82 beat n - 1 at 1.0 up to n = 5."""
TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
LIBRARY_FOLDERS = (
    *("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"),
    *("/usr/lib64", "/usr/local/lib"),
)


@dataclass(frozen=True)
class Machine:
    """What this process may use."""

    cores: Mapping[int, int]
    """NUMA node -> its physical cores, both of those allowed here."""
    quota: float | None = None
    """Cores' worth of time that the control group grants; None: no limit."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why in a few words."""

    said: str
    environment: dict[str, str] = field(default_factory=dict)


def choose_threads(
    machine: Machine, environment: Mapping[str, str], flags: Sequence[str]
) -> Choice:
    """How many cores vLLM is to leave to its other processes.

    Args:
        machine: What there is.
        environment: Of this process; what the user set there stays.
        flags: For vLLM, which may ask for several ranks.
    """
    set_by_user = [name for name in OWN if name in environment]
    if set_by_user:
        name = set_by_user[0]
        return Choice(f"threads as {name}={environment[name]} says")
    nodes = [node for node, cores in sorted(machine.cores.items()) if cores]
    if not nodes:
        return Choice("threads bound by vLLM, since no core could be read")
    if any(flag.partition("=")[0] in RANKS for flag in flags):
        return Choice("threads of several ranks bound by vLLM")
    # vLLM binds rank n to node n.
    there = machine.cores[nodes[0]]
    usable = there
    if machine.quota is not None:
        usable = max(1, min(there, math.floor(machine.quota)))
    threads = usable if usable <= ALL_CORES else usable - 1
    said = f"{threads} of {there} cores compute"
    if usable < there:
        said += f" (a quota of {machine.quota:g})"
    if len(nodes) > 1:
        said += (
            f"; {len(nodes) - 1} of {len(nodes)} NUMA nodes idle, which "
            f"--tensor-parallel-size {len(nodes)} would use"
        )
    left = there - threads
    # One is what vLLM leaves by itself.
    return Choice(said, {} if left == 1 else {RESERVED: str(left)})


def choose_libraries(
    environment: Mapping[str, str], folders: Sequence[Path] | None = None
) -> Choice:
    """The allocator to load first: tcmalloc, where it is installed.

    The OpenMP runtime is left to vLLM, which loads the one that torch was built with.

    Args:
        environment: Of this process; libraries that the user loads first stay.
        folders: Where to look; None: where Linux has them.
    """
    before = environment.get("LD_PRELOAD", "")
    if "malloc" in before:
        return Choice("allocator as LD_PRELOAD says")
    if folders is None:
        here = Path(sys.prefix, "lib")
        folders = [here, *map(Path, LIBRARY_FOLDERS)]
    found = (folder / name for name in TCMALLOC for folder in folders)
    library = next((path for path in found if path.is_file()), None)
    if library is None:
        return Choice("no tcmalloc installed")
    joined = f"{library}:{before}" if before else str(library)
    return Choice(f"{library.name} loaded first", {"LD_PRELOAD": joined})


def read_machine(root: Path = Path("/")) -> Machine:
    """What this process may use, as Linux tells.

    Args:
        root: Where ``sys`` and ``proc`` are; another folder for tests.
    """
    allowed = _ids(_line(root / "proc/self/status", "Cpus_allowed_list:"))
    memory = _ids(_line(root / "proc/self/status", "Mems_allowed_list:"))
    cores: dict[int, int] = {}
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        node = int(folder.name.removeprefix("node"))
        cpus = _ids(_text(folder / "cpulist")) & allowed
        if node in memory and cpus:
            cores[node] = len({_core(root, cpu) for cpu in cpus})
    if not cores and allowed:
        # No NUMA: one node of all.
        cores[0] = len({_core(root, cpu) for cpu in allowed})
    return Machine(cores, _quota(root))


def _core(root: Path, cpu: int) -> str:
    """What a logical CPU shares with its hyperthreads; itself if that is not told."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):
        if text := _text(topology / name):
            return text
    return str(cpu)


def _quota(root: Path) -> float | None:
    """The least quota of the control groups that this process is in (version 2)."""
    group = _line(root / "proc/self/cgroup", "0::").strip("/")
    top = root / "sys/fs/cgroup"
    found = []
    for folder in (top / group, *(top / group).parents):
        given, _, period = _text(folder / "cpu.max").partition(" ")
        if given.isdigit() and period.isdigit() and int(period):
            found.append(int(given) / int(period))
        if folder == top:
            break
    return min(found, default=None)


def _text(path: Path) -> str:
    """A file of the kernel's; empty if there is none."""
    try:
        return read_bounded(path, MIB).decode("ascii", "replace").strip()
    except OSError:
        return ""


def _line(path: Path, start: str) -> str:
    lines = _text(path).splitlines()
    found = [line.removeprefix(start) for line in lines if line.startswith(start)]
    return found[0].strip() if found else ""


def _ids(text: str) -> set[int]:
    """The numbers of a list such as ``0-2,4``."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            # The kernel's lists are short; a range is bounded all the same.
            found.update(range(int(first), min(int(last or first), 1 << 16) + 1))
    return found


def settings(
    flags: Sequence[str], *, cores: str = AUTO, preload: bool = True
) -> tuple[dict[str, str], str]:
    """Variables for a server on CPUs, and one line that says what was chosen.

    Args:
        flags: For vLLM.
        cores: ``auto``; ``vllm``: as it binds them by itself; else a list of logical
            CPUs as ``VLLM_CPU_OMP_THREADS_BIND`` has it.
        preload: Whether to load an allocator first.

    Returns:
        Nothing and an empty line where vLLM is none for CPUs.

    Raises:
        ServeError: A list that is none.
    """
    if not is_cpu_build():
        return {}, ""
    if cores == AUTO:
        choices = [choose_threads(read_machine(), os.environ, flags)]
    elif cores == VLLM:
        choices = [Choice("threads bound by vLLM")]
    elif LIST.fullmatch(cores):
        choices = [Choice(f"threads on {cores}", {BIND: cores})]
    else:
        raise ServeError(
            f"--cores {cores}: write auto, vllm, or a list of processors such as 0-3."
        )
    if preload:
        choices.append(choose_libraries(os.environ))
    environment: dict[str, str] = {}
    for choice in choices:
        environment |= choice.environment
    return environment, "; ".join(choice.said for choice in choices)
