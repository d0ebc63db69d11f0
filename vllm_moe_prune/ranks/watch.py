"""Whether the other ranks are there and get on, by what each says in torchrun's store.

Every rank beats once a second. One that ended no longer does, and one that hangs moves
on neither from exchange to exchange nor with its processor time. Of all that notice,
the first to claim it speaks.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

from torch.distributed import DistError
from torch.distributed.distributed_c10d import PrefixStore, Store

from ..errors import RanksError
from .group import LostConnection

BEAT_S = 1.0
# Without a beat for so long, after a connection broke, a rank is gone.
GONE_S = 4.0
# Of starting all processes, which read Python's packages from one disk perhaps.
JOIN = timedelta(minutes=10)
STALL_VARIABLE = "MOE_PRUNE_RANK_TIMEOUT"
STALL_S = 600.0
RESUME = "What is finished is kept: start again with --resume."
STORE_GONE = f"torchrun, or its machine, is gone where rank 0 was started. {RESUME}"


@dataclass
class _Seen:
    """What is known of one rank, with the times of this one's clock."""

    said: str = ""
    waits: bool = False
    moved: str = ""
    beat_at: float = 0.0
    moved_at: float = 0.0


class Watch:
    """One rank's view of all."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """Nothing is watched before ``meet``."""
        self._store = PrefixStore("moe-prune", store)
        self._rank, self._size = rank, size
        self._stall_s = float(os.environ.get(STALL_VARIABLE, STALL_S))
        self._beats = self._moves = 0
        self._waits = self._ending = self._terminated = False
        self._stop = threading.Event()
        self._seen = [_Seen() for _ in range(size)]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def meet(self) -> None:
        """Wait until all ranks are there, and begin to watch.

        Raises:
            RanksError: One did not come.
        """
        self._tell()
        keys = [str(rank) for rank in range(self._size)]
        try:
            self._store.wait(keys, JOIN)
        except DistError as error:
            missing = [key for key in keys if not self._store.check([key])]
            raise RanksError(
                f"rank {', '.join(missing)} did not come within "
                f"{JOIN.total_seconds() / 60:.0f} minutes."
            ) from error
        signal.signal(signal.SIGTERM, self._on_term)
        self._thread.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this rank may wait for others for as long as these get on."""
        self._waits = True
        try:
            yield
        finally:
            self._moves += 1
            self._waits = False

    def close(self) -> None:
        """All went well: watch no longer."""
        self._stop.set()
        self._thread.join()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def explain(self, error: BaseException) -> BaseException:
        """What to raise instead of an error, so that one rank says what it was.

        From here on torchrun, which ends the others once one has ended, is not heard.
        """
        self._ending = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        lost = self._terminated or isinstance(error, LostConnection)
        found = self._cause() if lost else error
        if found is not None and self._speaks():
            return found
        return SystemExit(error.code if isinstance(error, SystemExit) else 2)

    def _cause(self) -> BaseException | None:
        """Who is gone; None where another rank has said it, or none is."""
        try:
            before = self._beats_of_all()
            until = time.monotonic() + GONE_S
            while time.monotonic() < until:
                if self._store.check(["speaks"]):
                    return None
                time.sleep(0.1)
            after = self._beats_of_all()
        except DistError:
            return RanksError(STORE_GONE)
        gone = [rank for rank in range(self._size) if before[rank] == after[rank]]
        if gone:
            several = "ranks" if len(gone) > 1 else "rank"
            return RanksError(
                f"{several} {', '.join(map(str, gone))} ended without a word: killed, "
                f"out of memory perhaps, or its machine is gone. {RESUME}"
            )
        if self._terminated:
            return None
        return RanksError(
            f"rank {self._rank} lost the connection to another one, though all are "
            f"running: see to the network. {RESUME}"
        )

    def _speaks(self) -> bool:
        """Whether this rank is the first to say what happened."""
        try:
            return self._store.add("speaks", 1) == 1
        except DistError:
            return True

    def _beats_of_all(self) -> list[str]:
        keys = [str(rank) for rank in range(self._size)]
        return [said.decode().split()[0] for said in self._store.multi_get(keys)]

    def _on_term(self, signum: int, frame: FrameType | None) -> None:
        if not self._ending:
            self._terminated = True
            sys.exit(128 + signum)

    def _run(self) -> None:
        try:
            while not self._stop.wait(BEAT_S):
                self._tell()
                if self._waits and not self._ending and (line := self._stuck()):
                    self._end(line)
        except DistError:
            # Exchanges may not fail: a machine that vanished closes no connection.
            if not self._ending and not self._stop.is_set():
                self._end(STORE_GONE)

    def _tell(self) -> None:
        self._beats += 1
        # Two seconds of processor time: the beats alone take longer than any time-out.
        work = int(time.process_time() / 2)
        state = "waits" if self._waits else "works"
        self._store.set(str(self._rank), f"{self._beats} {state} {self._moves} {work}")

    def _stuck(self) -> str | None:
        """Who has not got on for too long, seen from a rank that waits."""
        now = time.monotonic()
        found = self._store.multi_get([str(rank) for rank in range(self._size)])
        for seen, data in zip(self._seen, found, strict=True):
            said = data.decode()
            _, state, moved = said.split(maxsplit=2)
            if said != seen.said:
                seen.said, seen.beat_at = said, now
            if (moved, state == "waits") != (seen.moved, seen.waits):
                seen.moved, seen.waits, seen.moved_at = moved, state == "waits", now
        for rank, seen in enumerate(self._seen):
            since = seen.beat_at if seen.waits else seen.moved_at
            if now - since > self._stall_s:
                return (
                    f"rank {rank} has not got on for {self._stall_s:.0f} s: it hangs, "
                    f"or what it reads does. {RESUME} ({STALL_VARIABLE}=SECONDS "
                    "waits longer.)"
                )
        if all(now - seen.moved_at > self._stall_s for seen in self._seen):
            return f"all ranks wait for each other: a fault of this tool. {RESUME}"
        return None

    def _end(self, line: str) -> None:
        """End this process from outside its main thread, which waits in an exchange."""
        self._ending = True
        if self._speaks():
            sys.stderr.write(f"error: {line}\n")
            sys.stderr.flush()
        # Like a kill, after which runs continue; nothing can be raised over there.
        os._exit(2)
