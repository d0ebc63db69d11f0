"""Disturb a command at its write events, resume it, and say what came of it."""

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from errno import EIO, ENOSPC
from pathlib import Path

from .cases import MADE, Case, make_inputs
from .harness import (
    DATA,
    FAIL_ON,
    FAIL_ONCE,
    KILL,
    TEAR,
    Event,
    Fault,
    Ran,
    Server,
    contents,
    copied,
    difference,
)

SPACE = ("open", "write", "pwrite", "truncate", "mkdir", "rename", "fsync", "link")
"""Kinds that a full disk refuses; it still lets things be removed."""


@dataclass
class World:
    """A case, its folder before the command, and what it leaves undisturbed."""

    case: Case
    server: Server
    before: Path
    folder: Path
    wanted: dict[str, str] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    resumed: dict[tuple[tuple[str, str], ...], list[str]] = field(default_factory=dict)
    """What resuming came to, by what was in the folder: each state is resumed once."""

    def undisturbed(self) -> None:
        copied(self.before, self.folder)
        ran = self.server.run(self.folder, self.case.arguments)
        assert ran.status == 0, ran.said
        self.events = ran.events
        self.wanted = contents(self.folder)

    def disturbed(self, fault: Fault) -> list[str]:
        """What is wrong after a fault and after resuming; empty: nothing.

        A command that a fault did not stop has to be right at once.
        """
        copied(self.before, self.folder)
        ran = self.server.run(self.folder, self.case.arguments, fault)
        found = [] if ran.status == 0 else self._stopped(ran, fault)
        state = tuple(contents(self.folder, times=True).items())
        if state not in self.resumed:
            self.resumed[state] = self._resume()
        return found + self.resumed[state]

    def _resume(self) -> list[str]:
        """What is wrong after resuming."""
        resumed = self.server.run(self.folder, self.case.resuming)
        if resumed.status != 0:
            return [f"resuming exits {resumed.status}: {resumed.said[-400:]}"]
        return difference(contents(self.folder), self.wanted)

    def _stopped(self, ran: Ran, fault: Fault) -> list[str]:
        """What is wrong with how it ended."""
        found = []
        if fault.mode in (KILL, TEAR):
            if ran.status != -9:
                found.append(f"exit status {ran.status}: {ran.said[-400:]}")
        else:
            lines = ran.said.strip().splitlines()
            if ran.status != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
                found.append(f"error: exits {ran.status}: {ran.said[-600:]}")
        return found


def kills(events: Sequence[Event]) -> Iterator[Fault]:
    """A kill before every event, and within every one that writes data."""
    for event in events:
        yield Fault(KILL, event)
        if event.kind in DATA:
            yield Fault(TEAR, event)


def errors(events: Sequence[Event]) -> Iterator[Fault]:
    """A disk that is full from an event on, and one input/output error at each."""
    for event in events:
        yield Fault(FAIL_ONCE, event, EIO)
        if event.kind in SPACE:
            yield Fault(FAIL_ON, event, ENOSPC)


def sampled(faults: Sequence[Fault], count: int, seed: str) -> list[Fault]:
    """Some of many, evenly spread; which ones is told by the seed."""
    if count >= len(faults):
        return list(faults)
    start = random.Random(seed).random()
    step = len(faults) / count
    return [faults[int((at + start) * step)] for at in range(count)]


def make_world(server: Server, case: Case, scratch: Path) -> World:
    """A case in a folder of its own beside ``inputs``, run once undisturbed."""
    before = scratch / "before"
    if before.exists():
        shutil.rmtree(before)
    before.mkdir()
    if case.earlier:
        shutil.copytree(scratch / "inputs" / "pruned", before / case.output)
    world = World(case, server, before, scratch / "work")
    world.undisturbed()
    return world


def make_everything(server: Server, scratch: Path) -> None:
    """What cases read: a model, statistics, and outputs in both storages."""
    make_inputs(scratch / "inputs")
    folder = scratch / "making"
    folder.mkdir()
    for command in MADE:
        ran = server.run(folder, command.split())
        assert ran.status == 0, ran.said
