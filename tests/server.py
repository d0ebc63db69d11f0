"""Real servers, each in a process of its own: any, and ``vllm-moe-prune serve``."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

TOOL = [sys.executable, "-m", "vllm_moe_prune"]
START_TIMEOUT_S = 400


class Process:
    """A server that has been started, and its address."""

    def __init__(self, command: list[str], port: int, log: Path, **env: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env=os.environ | env,
                start_new_session=True,
            )

    def wait_for(self, path: str = "/health") -> "Process":
        """Until it answers a path with 200."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(self.url + path).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        pytest.fail(f"{path} never was 200: {self.said()[-4000:]}")

    def said(self) -> str:
        """Everything it has written."""
        return self.log.read_text("utf-8", errors="replace")

    def kill(self) -> None:
        """At once, as the out-of-memory killer does, and what it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[str]:
    """The address of a server of a checkpoint, called ``demo``; eager, for speed."""
    port = free_port()
    command = [*TOOL, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--served-model-name", "demo", *flags]
    log = folder.parent / f"server-{port}.log"
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with running(Process(command, port, log, **env)) as (server,):
        yield f"{server.wait_for().url}/v1"
        # The tool became the server, so the signal reaches vLLM itself.
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(timeout=60)


@contextmanager
def running(*servers: Process) -> Iterator[tuple[Process, ...]]:
    """None of them is left behind."""
    try:
        yield servers
    finally:
        for server in servers:
            server.kill()


def free_port() -> int:
    """A port nobody listens on."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]
