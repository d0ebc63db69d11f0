"""Servers that run while something is asked of them, each in a process group."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx

from ..checkpoint.tokenizer import TRUST
from ..errors import ServeError
from ..files.regular import MIB, read_bounded
from ..plugin.launch import serve_command
from ..plugin.machine import settings

# Seconds between SIGTERM and SIGKILL.
STOP_S = 30.0
OURS = ("--host", "--port", "--served-model-name")


@dataclass(frozen=True)
class Server:
    """A vLLM server that answers."""

    url: str
    """Without a path, e.g. ``http://127.0.0.1:8000``."""
    model: str
    """What requests call the model."""
    group: int
    """The process group of all its processes."""


@contextmanager
def served(
    source: str,
    revision: str | None,
    flags: Sequence[str],
    *,
    trust_code: bool = False,
    allow_links: bool = False,
) -> Iterator[Server]:
    """``vllm serve`` of a checkpoint on a free port of this machine.

    Args:
        source: A pruned or an original checkpoint: folder or Hub id.
        revision: Revision of a Hub id.
        flags: Handed to vLLM as they are.
        trust_code: Whether code in the checkpoint may tokenize.
        allow_links: Follow links that lead out of a local folder.

    Raises:
        MoePruneError: The checkpoint cannot be served, or the server ended; with the
            last error it wrote.
    """
    check_flags(flags)
    port, model = free_port(), "judged"
    own = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", model]
    if trust_code and TRUST not in flags:
        own.append(TRUST)
    environment, _ = settings(flags)
    command = serve_command(
        source,
        revision,
        None,
        [*own, *flags],
        allow_links=allow_links,
        environment=environment,
    )
    # A file, since a pipe that nobody reads would block the server once it is full.
    with tempfile.TemporaryFile("w+b") as log:
        try:
            with running(command, port, log) as (url, process):
                yield Server(url, model, process.pid)
        except ServerEnded as error:
            raise ServeError(f"{source}: {error} {_last_error(log)}") from error


def check_flags(flags: Sequence[str]) -> None:
    """Refuse flags for vLLM that ``served`` sets itself.

    Raises:
        ServeError: Naming the flag.
    """
    for flag in flags:
        if flag.partition("=")[0] in OURS:
            raise ServeError(f"{flag}: this command chooses it. Leave it out.")


class ServerEnded(ServeError):
    """A server ended before it answered."""


@contextmanager
def running(
    command: Sequence[str], port: int, output: IO[bytes] | int | None, **env: str
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The address and the process of a server, from when it is healthy.

    Args:
        command: Starts it.
        port: Where it will listen on 127.0.0.1, with a path ``/health``.
        output: Where its stdout and stderr go, as ``subprocess`` has it.
        env: Variables added to those of this process.

    Raises:
        ServerEnded: It ended by itself.
    """
    with (
        _ending_on_sigterm(),
        subprocess.Popen(
            command,
            env=os.environ | env,
            stdout=output,
            stderr=output,
            # Its own process group, for killpg to reach the engine's processes too.
            start_new_session=True,
        ) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, process)
            yield url, process
        finally:
            _stop(process)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """A SIGTERM unwinds like Ctrl-C: a server has a session of its own and would stay.

    Signals reach the main thread only; in another one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # 128 + number is the status that shells give a process ended by a signal.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_until_healthy(url: str, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        try:
            # Never through a proxy: it is this machine.
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass  # nobody listens there yet
        time.sleep(0.2)
    raise ServerEnded(f"its server ended with status {process.returncode}.")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """The server, and whatever of its group does not end with it."""
    with suppress(ProcessLookupError):  # it ended by itself
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):  # then it is killed
        process.wait(STOP_S)
    with suppress(ProcessLookupError):
        # Workers may outlive the leader; the group keeps its number meanwhile.
        os.killpg(process.pid, signal.SIGKILL)


def _last_error(log: IO[bytes]) -> str:
    """The first error that a failing server wrote; those after it are its echoes."""
    log.seek(0)
    lines = log.read().decode("utf-8", "replace").splitlines()
    for line in lines:
        # vLLM's lines are `LEVEL DATE [FILE:LINE] MESSAGE`.
        found = line.rpartition("] ")[2].strip()
        name, colon, _ = found.partition(": ")
        if colon and name.split(".")[-1].endswith(("Error", "Exception", "error")):
            return f"It said: {found[:400]}"
    return "It said: " + " ".join(lines[-3:])[-400:] if lines else "It said nothing."


def peak_memory(group: int) -> int:
    """The most bytes that the largest process of a group ever held in memory.

    That process is the engine's worker: it has the weights and the cache of keys and
    values. Of tensor parallel servers it is one worker of several.
    """
    return max(_of_group(group, "VmHWM:"), default=0)


def resident(group: int) -> int:
    """Bytes that all processes of a group hold now, shared ones counted each time."""
    return sum(_of_group(group, "VmRSS:"))


def _of_group(group: int, line: str) -> Iterator[int]:
    """A size in bytes from the status of each process of a group."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # proc(5): the command, which may hold `)`; behind it state, ppid, pgrp.
            if int(_proc(stat).rpartition(")")[2].split()[2]) != group:
                continue
            status = _proc(stat.parent / "status").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        # One that has ended and waits for its parent has no memory any more.
        yield from (
            int(row.split()[1]) * 1024 for row in status if row.startswith(line)
        )


def _proc(path: Path) -> str:
    return read_bounded(path, MIB).decode("utf-8", "replace")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        # Port 0: the kernel picks one. Another process could take it before vLLM.
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
