"""Which cores a server on CPUs uses, on machines that are pretended as folders."""

import importlib.metadata
import os
from pathlib import Path

import pytest

from tests.tiny import tiny_checkpoint
from vllm_moe_prune.errors import ServeError
from vllm_moe_prune.plugin import launch
from vllm_moe_prune.plugin.machine import (
    ALL_CORES,
    OWN,
    RESERVED,
    Machine,
    choose_libraries,
    choose_threads,
    read_machine,
    settings,
)


def pretend(
    root: Path,
    nodes: list[int],
    *,
    threads: int = 1,
    allowed: str | None = None,
    memory: str | None = None,
    quota: str | None = None,
) -> Path:
    """A machine with so many physical cores on each node.

    Args:
        root: Its folder.
        nodes: Cores of each.
        threads: Hyperthreads of a core; the second ones are numbered after all firsts.
        allowed: Logical CPUs of the cpuset; None: all.
        memory: Nodes of the cpuset.
        quota: ``cpu.max`` of the control group ``/pod/box``.
    """
    total, first = sum(nodes), 0
    for node, cores in enumerate(nodes):
        own = [
            cpu + total * t
            for t in range(threads)
            for cpu in range(first, first + cores)
        ]
        folder = root / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(",".join(map(str, own)) + "\n")
        first += cores
    for cpu in range(total * threads):
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        mates = [cpu % total + total * t for t in range(threads)]
        (folder / "core_cpus_list").write_text(",".join(map(str, mates)) + "\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/status").write_text(
        f"Name:\tx\nCpus_allowed_list:\t{allowed or f'0-{total * threads - 1}'}\n"
        f"Mems_allowed_list:\t{memory or f'0-{len(nodes) - 1}'}\n"
    )
    (root / "proc/self/cgroup").write_text("0::/pod/box\n")
    box = root / "sys/fs/cgroup/pod/box"
    box.mkdir(parents=True)
    (root / "sys/fs/cgroup/pod/cpu.max").write_text("max 100000\n")
    (box / "cpu.max").write_text(f"{quota or 'max'} 100000\n")
    return root


@pytest.mark.parametrize(
    ("nodes", "options", "reserved", "says"),
    [
        ([1], {}, "0", "1 of 1 cores compute"),
        ([2], {}, "0", "2 of 2 cores compute"),
        ([4], {}, "0", "4 of 4 cores compute"),
        # From here on one core of its own for the scheduler costs less than sharing.
        ([8], {}, None, "7 of 8 cores compute"),
        ([64], {}, None, "63 of 64 cores compute"),
        # Hyperthreads are no cores.
        ([2], {"threads": 2}, "0", "2 of 2 cores compute"),
        ([8], {"threads": 2}, None, "7 of 8 cores compute"),
        # Two nodes: rank 0 is bound to the first.
        ([32, 32], {}, None, "1 of 2 NUMA nodes idle, which --tensor-parallel-size 2"),
        # A cpuset that leaves four cores of one node, or only the second node.
        ([64], {"allowed": "8-11"}, "0", "4 of 4 cores compute"),
        ([4, 4], {"allowed": "4-7", "memory": "1"}, "0", "4 of 4 cores compute"),
        ([8], {"threads": 2, "allowed": "0,8"}, "0", "1 of 1 cores compute"),
        # A quota is no cpuset: threads beyond it would stop all others.
        ([64], {"quota": "400000"}, "60", "4 of 64 cores compute (a quota of 4)"),
        ([64], {"quota": "1650000"}, "49", "15 of 64 cores compute (a quota of 16.5)"),
        ([2], {"quota": "50000"}, "1", "1 of 2 cores compute (a quota of 0.5)"),
        ([4], {"quota": "800000"}, "0", "4 of 4 cores compute"),
    ],
)
def test_cores_are_used_by_what_is_there(
    tmp_path: Path,
    nodes: list[int],
    options: dict[str, str],
    reserved: str | None,
    says: str,
) -> None:
    machine = read_machine(pretend(tmp_path, nodes, **options))  # type: ignore[arg-type]
    choice = choose_threads(machine, {}, [])
    # One core left is what vLLM does by itself.
    expected = {} if reserved in (None, "1") else {RESERVED: reserved}
    assert choice.environment == expected
    assert says in choice.said
    assert (machine.quota is None) == ("quota" not in options)


def test_without_any_topology_the_allowed_processors_are_cores(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Cpus_allowed_list:\t0-3\n")
    assert read_machine(tmp_path) == Machine({0: 4})
    assert read_machine(tmp_path / "nowhere") == Machine({})
    choice = choose_threads(Machine({}), {}, [])
    assert choice.environment == {}
    assert "no core could be read" in choice.said


@pytest.mark.parametrize("name", OWN)
def test_what_the_user_set_stays(name: str) -> None:
    choice = choose_threads(Machine({0: 2}), {name: "0-1"}, [])
    assert choice.environment == {}
    assert f"{name}=0-1" in choice.said


@pytest.mark.parametrize("flag", ["-tp", "--tensor-parallel-size=2", "-dp", "-pp"])
def test_ranks_are_bound_by_vllm(flag: str) -> None:
    choice = choose_threads(Machine({0: 2, 1: 2}), {}, [flag, "2"])
    assert choice.environment == {}
    assert "ranks" in choice.said


def test_the_bound_is_where_sharing_a_core_stops_to_pay() -> None:
    """Two cores instead of one gave 1.65 times the speed; see the comment there."""
    shared = 1.65 / 2
    gains = [cores * shared > cores - 1 for cores in range(1, 65)]
    assert gains == [cores <= ALL_CORES for cores in range(1, 65)]


def test_the_allocator_is_loaded_first_where_it_is_installed(tmp_path: Path) -> None:
    assert choose_libraries({}, [tmp_path]).environment == {}
    library = tmp_path / "libtcmalloc_minimal.so.4"
    library.touch()
    assert choose_libraries({}, [tmp_path]).environment == {"LD_PRELOAD": str(library)}
    joined = choose_libraries({"LD_PRELOAD": "/x/libiomp5.so"}, [tmp_path])
    assert joined.environment == {"LD_PRELOAD": f"{library}:/x/libiomp5.so"}
    for own in ("/x/libjemalloc.so", "/x/libtcmalloc.so"):
        assert choose_libraries({"LD_PRELOAD": own}, [tmp_path]).environment == {}


@pytest.fixture
def cpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vLLM for CPUs is installed, and the user has set nothing."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.32.0+cpu")
    for name in (*OWN, "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("cpu_build")
def test_flags_say_otherwise() -> None:
    assert settings([], cores="vllm", preload=False) == ({}, "threads bound by vLLM")
    found, said = settings([], cores="0-1|4,6-7", preload=False)
    assert found == {"VLLM_CPU_OMP_THREADS_BIND": "0-1|4,6-7"}
    assert said == "threads on 0-1|4,6-7"
    assert "tcmalloc" not in settings([], preload=False)[1]
    assert "tcmalloc" in settings([])[1]
    for wrong in ("all", "0-", "1;2", ""):
        with pytest.raises(ServeError, match="write auto, vllm, or a list"):
            settings([], cores=wrong)


@pytest.mark.usefixtures("cpu_build")
def test_the_settings_are_of_this_machine() -> None:
    machine = read_machine()
    found, said = settings([], preload=False)
    assert found == choose_threads(machine, {}, []).environment
    assert said == choose_threads(machine, {}, []).said
    allowed = len(os.sched_getaffinity(0))
    assert 0 < sum(machine.cores.values()) <= allowed


@pytest.mark.parametrize("version", ["0.33.0", None])
def test_on_gpus_nothing_is_chosen(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", tell)
    assert settings([], cores="0-3") == ({}, "")


def test_variables_stand_before_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path / "ckpt", layers=1)
    monkeypatch.setattr(launch, "find_vllm", lambda: "/bin/vllm")
    chosen = {RESERVED: "0", "LD_PRELOAD": "/x.so"}
    plain = launch.serve_command(str(folder), extra=["--port", "1"])
    command = launch.serve_command(
        str(folder), extra=["--port", "1"], environment=chosen
    )
    assert command[0].endswith("/env")
    assert command[1:] == ["LD_PRELOAD=/x.so", f"{RESERVED}=0", *plain]
    watched = launch.serve_command(str(folder), watch=True, environment=chosen)
    assert [word.partition("=")[0] for word in watched[1:4]] == [
        "LD_PRELOAD",
        RESERVED,
        "VLLM_PLUGINS",
    ]
