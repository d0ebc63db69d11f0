"""Ranks that are killed, hang, fail or were started otherwise: one line says which."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import several_ranks
from tests.e2e.test_resume import (
    World,
    finish,
    journal_lines,
    partial_of,
    resume,
    world,
)
from tests.ranked import Job, start
from tests.reference import folder_bytes
from tests.tiny import tiny_checkpoint

__all__ = ["world"]
STALL_S = 3


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


@pytest.mark.slow
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


def test_ranks_do_not_outlive_the_machine_with_the_store(
    world: World, tmp_path: Path, out: Path
) -> None:
    # Rank 0 waits for rank 1, whose connection stays.
    job = start(tmp_path, [world.cut_arguments("wanda", out)] * 2)
    disturb(job, out, 1, 4, signal.SIGSTOP)
    del job.store
    assert finish(job.processes[0]) == 2
    (line,) = job.said()
    assert line.startswith("error: torchrun, or its machine, is gone")
    job.processes[1].kill()
    finish(job.processes[1])


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


@pytest.mark.slow
def test_two_ranks_search_and_judge_as_one_process_does(
    world: World, tmp_path: Path
) -> None:
    text = str(world.folder / "text.txt")
    recipe = tmp_path / "recipe.yaml"
    asked = several_ranks.RECIPES["tuned"][1]
    recipe.write_text(json.dumps({"name": "tuned", **asked}))
    search = ["tune", str(world.model), "--recipe", str(recipe), "--calibration", text]
    search += ["--samples", "4", "--sequence-length", "32", "--heldout", "2"]
    judge = ["eval", str(world.model), "--text", text, "--json"]
    judge += ["--max-tokens", "2000", "--sequence-length", "100"]
    found = []
    for ranks in (1, 2):
        plan = tmp_path / f"{ranks}.json"
        job = start(tmp_path, [[*search, "-o", str(plan)]] * ranks)
        assert job.codes() == [0] * ranks, job.said()
        job = start(tmp_path, [judge] * ranks)
        assert job.codes() == [0] * ranks, job.said()
        said = [path.read_text("utf-8") for path in job.errors]
        assert said[1:] == [""] * (ranks - 1)
        found.append((plan.read_bytes(), json.loads(said[0])))
    assert found[0] == found[1]
    assert not list(tmp_path.glob("*.work"))
    timed = [*search, "-o", str(tmp_path / "plan.json"), "--minutes", "1"]
    job = start(tmp_path, [timed] * 2)
    assert job.codes() == [2, 2]
    (line,) = job.said()
    assert line.startswith("error: --minutes goes by each process's own clock")


def test_what_all_refuse_is_said_once(world: World, tmp_path: Path, out: Path) -> None:
    out.mkdir()
    (out / "there").touch()
    job = start(tmp_path, [world.cut_arguments("wanda", out)] * 2)
    assert job.codes() == [2, 2]
    (line,) = job.said()
    assert line.startswith("error: rank 0: ")
    assert "the output folder is not empty" in line
    assert [path.name for path in out.iterdir()] == ["there"]
