"""Ranks of one command, forked from a server that has the imports done, into what
torchrun sets up: its store and its variables."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch.distributed import TCPStore

from tests.e2e.test_resume import SERVER, command_line, finish


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
