"""Commands killed, and refused by the disk, at their write events; then resumed.

A sample that is the same on every run; ``make faults`` disturbs every event, and runs
the commands that take long as well.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .cases import CASES
from .disturb import errors, kills, make_everything, make_world, sampled
from .harness import Server, server


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A folder in memory, where there is such a place: flushing costs nothing there."""
    memory = Path("/dev/shm")
    base = memory if memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="moe-prune-faults-", dir=base) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def running(scratch: Path) -> Iterator[Server]:
    with server(scratch) as made:
        make_everything(made, scratch)
        yield made


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc for the shim")
def test_disturbed_commands_resume_to_the_same_bytes_and_leave_nothing_behind(
    running: Server, scratch: Path
) -> None:
    """One test, since the server that runs all commands takes long to start."""
    wrong = []
    for number, case in enumerate(case for case in CASES if not case.slow):
        world = make_world(running, case, scratch)
        assert len(world.events) >= 4, f"{case.name}: hardly anything is written"
        # Each is killed once, every other one fails once, too.
        chosen = sampled(list(kills(world.events)), 1, case.name)
        if number % 2:
            chosen += sampled(list(errors(world.events)), 1, case.name)
        for fault in chosen:
            wrong += [f"{case.name}: {fault}: {one}" for one in world.disturbed(fault)]
    assert wrong == []
