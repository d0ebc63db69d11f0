"""Spoil one file after the other for some time, and see what the commands do.

    python -m tests.fuzz.run --seconds 60 --seed 0

A command may succeed or refuse in one line with status 2; in bounded time and memory.
Everything else is a finding: it is printed with the case, and the status is 1.
"""

import argparse
import faulthandler
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure

from tests.fuzz.command import Ran, run_command
from tests.fuzz.spoil import SPECIAL, SPOILERS, put_special
from tests.fuzz.targets import TARGETS, Target, make_good
from vllm_moe_prune.progress import peak_rss_bytes

CASES_PER_ROUND = 50
MAX_SECONDS = 20.0
"""Of processor time for one command, whatever else the machine does."""
MAX_WAIT_SECONDS = 120.0
"""Of the clock, for commands that wait for something."""
MAX_GROWTH = 512 << 20
"""Bytes by which one command may raise the peak of this process."""
ADDRESS_SPACE = 4 << 30
"""Beyond what is mapped before the first case."""


class Late(BaseException):
    """A command took too long."""


class Found(Exception):
    """A finding, as Hypothesis is to see it."""


@contextmanager
def limited() -> Iterator[list[str]]:
    """Notes what goes beyond the limits of time and memory."""
    beyond: list[str] = []

    def ring(number: int, _: object) -> None:
        busy = number == signal.SIGPROF
        beyond.append(
            f"busy for {MAX_SECONDS} s" if busy else f"waits for {MAX_WAIT_SECONDS} s"
        )
        raise Late

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak_rss_bytes()
    old = {name: signal.signal(name, ring) for name in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, MAX_WAIT_SECONDS)
    # Where even the signal does not get through.
    faulthandler.dump_traceback_later(3 * MAX_WAIT_SECONDS, exit=True)
    try:
        yield beyond
    except Late:
        pass
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for name, handler in old.items():
            signal.signal(name, handler)
        faulthandler.cancel_dump_traceback_later()
        grown = peak_rss_bytes() - before
        if grown > MAX_GROWTH:
            beyond.append(f"{grown >> 20} MiB more memory")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Fuzzer:
    """Good files, cases made from them, and what was found."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good: dict[str, bytes] = {}
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.refused = 0
        self.found: dict[str, str] = {}
        self._changed: set[str] | None = None
        self._mended: set[str] = set()

    def prepare(self) -> None:
        """Make the good files, and see that every command likes them."""
        make_good(self.folder)
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                self.good[path.relative_to(self.folder).as_posix()] = path.read_bytes()
        self._mended = {
            name
            for name in self.good
            if name.endswith("/tensor_hashes.json") or name == "out/config.json"
        }
        for target in TARGETS:
            for command in target.commands:
                self._fresh()
                ran = run_command(command)
                assert ran.status == 0, (command, ran)

    def _fresh(self, names: Iterable[str] | None = None) -> None:
        """Good files again: the named ones, or all; and none that commands made."""
        tops = {name.partition("/")[0] for name in self.good}
        for path in self.folder.iterdir():
            if names is None or path.name not in tops:
                _remove(path)
        for name in self.good if names is None else names:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(path)
            path.write_bytes(self.good[name])

    def case(self, draw: Any, target: Target) -> None:
        """Spoil a file and run a command.

        Raises:
            Found: The command did something else than to succeed or to refuse.
        """
        command = draw(st.sampled_from(target.commands))
        self._fresh(self._changed)
        # What commands that run a model write is all over the place.
        writes = command.startswith(("cut", "measure"))
        self._changed = None if writes else {target.file, *self._mended}
        path = self.folder / target.file
        special = draw(st.sampled_from((None,) * 24 + SPECIAL))
        rotten = draw(st.sampled_from((False,) * 7 + (True,)))
        if special is not None:
            put_special(special, path)
            what = special
        else:
            data = SPOILERS["text" if rotten else target.how](draw, path.read_bytes())
            path.write_bytes(data)
            what = ""
        target.mend(self.folder)
        began = time.perf_counter()
        ran = Ran("late", "", "")
        with limited() as beyond:
            ran = run_command(command)
        self.counts[target.file] += 1
        self.seconds[target.file] += time.perf_counter() - began
        self.refused += ran.status != 0
        faults = [*beyond, *([] if ran.fault is None or beyond else [ran.fault])]
        if faults:
            kept = path.read_bytes() if path.is_file() and not special else b""
            raise Found(f"{'; '.join(faults)}: {command}", target.file, what, kept, ran)

    def round(self, number: int) -> None:
        """Some cases, all of them a function of the number."""
        shares = [target for target in TARGETS for _ in range(target.share)]

        @seed(number)
        @settings(
            max_examples=CASES_PER_ROUND,
            database=None,
            deadline=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            print_blob=False,
            report_multiple_bugs=False,
        )
        @given(st.data(), st.sampled_from(shares))
        def cases(data: Any, target: Target) -> None:
            self.case(data.draw, target)

        try:
            cases()
        except Found as finding:
            self._note(number, finding)
        except FlakyFailure as flaky:  # a fault that a second call no longer shows
            for each in flaky.exceptions:
                if not isinstance(each, Found):
                    raise
                self._note(number, each)

    def _note(self, number: int, finding: Found) -> None:
        said, file, what, kept, ran = finding.args
        lines = ran.stderr.strip().splitlines() or [""]
        key = f"{said}: {lines[-1]}"[:300]
        if key in self.found:
            return
        self.found[key] = file
        shown = what or (kept if len(kept) < 2000 else kept[:2000] + b"...")
        print(f"\nFOUND (round {number}) {said}\n  {file}: {shown!r}")
        print("  " + "\n  ".join(lines[-12:]), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="in all, at least half for cases"
    )
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    shm = Path("/dev/shm")
    place = shm if shm.is_dir() and os.access(shm, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="moe-prune-fuzz-", dir=place) as folder:
        os.chdir(folder)
        began = time.monotonic()
        fuzzer = Fuzzer(Path(folder))
        fuzzer.prepare()
        mapped = int(Path("/proc/self/statm").read_text().split()[0])
        limit = mapped * resource.getpagesize() + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        ready = time.monotonic()
        print(
            f"good files made in {ready - began:.0f} s; seed {asked.seed}", flush=True
        )
        number = asked.seed
        end = max(began + asked.seconds, ready + asked.seconds / 2)
        stopped: list[int] = []
        # Ended early, it still says what it has done.
        signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        while time.monotonic() < end and not stopped:
            fuzzer.round(number)
            number += 1
        os.chdir("/")
    took = time.monotonic() - ready
    total = fuzzer.counts.total()
    for file, count in sorted(fuzzer.counts.items()):
        print(f"{count:8d}  {fuzzer.seconds[file]:7.1f} s  {file}")
    print(
        f"{total} cases in {took:.0f} s, {fuzzer.refused} refused, rounds "
        f"{asked.seed} to {number - 1}, {len(fuzzer.found)} findings"
    )
    return 1 if fuzzer.found else 0


if __name__ == "__main__":
    sys.exit(main())
