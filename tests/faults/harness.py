"""Enumerates the write events of a command, disturbs it at each, resumes, compares."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PASS, KILL, TEAR, FAIL_ONCE, FAIL_ON = range(5)
DATA = ("write", "pwrite")
"""Kinds that can be torn: half of the bytes are written, then the process dies."""
TIMES = "run.json"
NUMBER = re.compile(r"[0-9][0-9.e+-]*")


@dataclass(frozen=True)
class Event:
    """One write: its kind, its path, and how many such events came before, plus 1."""

    kind: str
    path: str
    nth: int

    def __str__(self) -> str:
        return f"{self.kind} {self.path} #{self.nth}"


@dataclass(frozen=True)
class Fault:
    """What happens at an event."""

    mode: int = PASS
    event: Event = Event("", "", 0)
    errno: int = 0

    def __str__(self) -> str:
        how = {KILL: "killed before", TEAR: "killed within"}.get(self.mode)
        return f"{how or errno.errorcode[self.errno]} {self.event}"


@dataclass(frozen=True)
class Ran:
    """How a command ended, what it said, and what it wrote."""

    status: int
    said: str
    events: list[Event]


class Server:
    """The process whose children run the commands."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        shim = scratch / "shim.so"
        subprocess.run(
            ["gcc", "-O1", "-shared", "-fPIC", "-o", shim, HERE / "shim.c", "-ldl"],
            check=True,
        )
        settings = {
            "LD_PRELOAD": str(shim),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONHASHSEED": "0",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env=os.environ | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def run(
        self, folder: Path, arguments: Sequence[str], fault: Fault = Fault()
    ) -> Ran:
        """Run a command in a folder, disturbed or not."""
        said, log = self._scratch / "said.txt", self._scratch / "events.txt"
        request = {
            "folder": str(folder),
            "arguments": list(arguments),
            "said": str(said),
            "log": str(log),
            "fault": {
                "mode": fault.mode,
                "errno": fault.errno,
                "kind": fault.event.kind,
                "path": fault.event.path,
                "nth": fault.event.nth,
            },
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status = self._answer()["status"]
        events, seen = [], Counter[tuple[str, str]]()
        for line in log.read_text("utf-8").splitlines():
            kind, path = line.split("\t")
            seen[kind, path] += 1
            events.append(Event(kind, path, seen[kind, path]))
        return Ran(status, said.read_text("utf-8"), events)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def server(scratch: Path) -> Iterator[Server]:
    """A server that is gone afterwards."""
    made = Server(scratch)
    try:
        yield made
    finally:
        made.close()


def contents(folder: Path, times: bool = False) -> dict[str, str]:
    """Everything below a folder by path: folders, hashes of files, where links lead.

    ``run.json`` tells time and memory. Of it only that it is there, or with ``times``
    how much of it: all but the digits of its numbers.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        elif path.name == TIMES:
            found[name] = NUMBER.sub("0", path.read_text("utf-8")) if times else "times"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def difference(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What is left behind, missing or different, in words."""
    return [
        *(f"left behind: {name}" for name in found.keys() - wanted.keys()),
        *(f"missing: {name}" for name in wanted.keys() - found.keys()),
        *(
            f"other bytes: {name}"
            for name in found.keys() & wanted.keys()
            if found[name] != wanted[name]
        ),
    ]


def copied(folder: Path, to: Path) -> Path:
    """A fresh copy of a folder; times of files are kept."""
    if to.exists():
        shutil.rmtree(to)
    shutil.copytree(folder, to, symlinks=True)
    return to
