"""Ranks that are killed, hang, fail or were started otherwise: one line says which.

Ranks are forked from a server that has the imports done, into what torchrun sets up:
its store and its variables.
"""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from tests.e2e.test_resume import (
    SERVER,
    World,
    command_line,
    finish,
    journal_lines,
    partial_of,
    resume,
    world,
)
from tests.reference import folder_bytes
from tests.tiny import tiny_checkpoint

__all__ = ["world"]
STALL_S = 3


def as_rank(
    variables: dict[str, str],
    arguments: list[str],
    errors: Path,
    file_limit: int | None,
) -> None:
    os.environ |= variables
    command_line(arguments, errors, file_limit)


@dataclass
class Job:
    """Ranks of one command."""

    store: TCPStore
    processes: list[BaseProcess]
    errors: list[Path]

    def codes(self) -> list[int]:
        return [finish(process) for process in self.processes]

    def said(self) -> list[str]:
        """What all ranks wrote, without progress."""
        lines = "".join(path.read_text("utf-8") for path in self.errors).splitlines()
        return [line for line in lines if line.startswith(("error", "interrupted"))]


def start(
    folder: Path,
    arguments: Sequence[list[str]],
    file_limits: dict[int, int] | None = None,
    stall_s: int = 60,
) -> Job:
    """Each rank with arguments of its own."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))
    size = len(arguments)
    job = Job(store, [], [folder / f"rank-{rank}.txt" for rank in range(size)])
    for rank, own in enumerate(arguments):
        variables = {
            **{"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)},
            **{"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            **{"MOE_PRUNE_RANK_TIMEOUT": str(stall_s), "OMP_NUM_THREADS": "1"},
        }
        limit = (file_limits or {}).get(rank)
        process = SERVER.Process(
            target=as_rank, args=(variables, own, job.errors[rank], limit)
        )
        process.start()
        job.processes.append(process)
    return job


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def disturb(job: Job, out: Path, rank: int, lines: int, how: signal.Signals) -> None:
    """Send a signal to a rank once the journal has so many lines."""
    process = job.processes[rank]
    assert process.pid is not None
    while process.exitcode is None and journal_lines(out) < lines:
        time.sleep(0.002)
    os.kill(process.pid, how)


@pytest.mark.parametrize(("rank", "lines", "then"), [(1, 6, 2), (0, 12, 0)])
def test_killed_ranks_are_named_and_any_number_goes_on(
    world: World, tmp_path: Path, out: Path, rank: int, lines: int, then: int
) -> None:
    arguments = world.cut_arguments("wanda", out)
    job = start(tmp_path, [arguments] * 3)
    disturb(job, out, rank, lines, signal.SIGKILL)
    codes = job.codes()
    assert codes.pop(rank) == -signal.SIGKILL
    assert codes == [2, 2]
    (line,) = job.said()
    assert line.startswith(f"error: rank {rank} ended without a word")
    assert not out.exists()
    if then == 0:
        resume(world, "wanda", out)
        return
    job = start(tmp_path, [[*arguments, "--resume"]] * then)
    assert job.codes() == [0] * then, job.said()
    assert folder_bytes(out) == folder_bytes(world.finished("wanda"))
    assert not partial_of(out).exists()


def test_a_rank_that_hangs_ends_the_job(
    world: World, tmp_path: Path, out: Path
) -> None:
    job = start(tmp_path, [world.cut_arguments("wanda", out)] * 3, stall_s=STALL_S)
    disturb(job, out, 2, 6, signal.SIGSTOP)
    assert [finish(process) for process in job.processes[:2]] == [2, 2]
    (line,) = job.said()
    assert line.startswith(f"error: rank 2 has not got on for {STALL_S} s")
    job.processes[2].kill()
    finish(job.processes[2])


def others(world: World, tmp_path: Path) -> Iterator[tuple[list[str], str]]:
    """What rank 1 is started with instead, and what is said of it."""
    out = tmp_path / "out"
    model = tiny_checkpoint(tmp_path / "other", layers=6, experts=6, seed=1)
    arguments = world.cut_arguments("wanda", out)
    other = [*arguments[:1], str(model), *arguments[2:]]
    yield other, "rank 1: "  # the plan is not of this checkpoint
    elsewhere = tmp_path / "elsewhere" / "out"
    elsewhere.parent.mkdir()
    other = world.cut_arguments("wanda", elsewhere)
    yield other, "rank 1 does not see what rank 0 wrote into "


def test_a_rank_that_fails_or_differs_is_named(
    world: World, tmp_path: Path, out: Path
) -> None:
    arguments = world.cut_arguments("wanda", out)
    for other, said in others(world, tmp_path):
        job = start(tmp_path, [arguments, other])
        assert job.codes() == [2, 2]
        (line,) = job.said()
        assert line.startswith(f"error: {said}"), line
        assert not out.exists()
    assert not list((tmp_path / "elsewhere").iterdir())
    # As a full disk is found: rank 1 alone cannot write on.
    job = start(tmp_path, [arguments] * 2, {1: 50_000})
    assert job.codes() == [2, 2]
    (line,) = job.said()
    assert line.startswith("error: rank 1: ")
    assert "cannot be written: File too large" in line


def test_what_all_refuse_is_said_once(world: World, tmp_path: Path, out: Path) -> None:
    out.mkdir()
    (out / "there").touch()
    job = start(tmp_path, [world.cut_arguments("wanda", out)] * 2)
    assert job.codes() == [2, 2]
    (line,) = job.said()
    assert line.startswith("error: rank 0: ")
    assert "the output folder is not empty" in line
    assert [path.name for path in out.iterdir()] == ["there"]
