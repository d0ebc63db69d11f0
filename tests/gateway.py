"""Real gateways before real HTTP servers, each in a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

TOOL = [sys.executable, "-m", "vllm_moe_prune"]
STUB = Path(__file__).with_name("stub_backend.py")
START_TIMEOUT_S = 60
CHAT = "/v1/chat/completions"


class Process:
    """A server that has been started, and its address."""

    def __init__(self, command: list[str], port: int, log: Path, **env: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | env
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
        pytest.fail(f"{path} never was 200: {self.said()[-3000:]}")

    def said(self) -> str:
        """Everything it has written."""
        return self.log.read_text("utf-8")

    def kill(self) -> None:
        """At once, as the out-of-memory killer does."""
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_stub(
    folder: Path, model: str, port: int | None = None, plugin: Path | None = None
) -> Process:
    """A stub backend that serves one model, once it answers."""
    port = port or free_port()
    command = [sys.executable, str(STUB), str(port), model]
    command += [str(plugin)] if plugin else []
    return Process(command, port, folder / f"stub-{model}.log").wait_for()


def start_gateway(
    folder: Path, backends: dict[str, str], ready: bool = True, **variables: object
) -> Process:
    """A gateway; variables are settings, without their prefix."""
    port = free_port()
    command = [*TOOL, "gateway", "--port", str(port)]
    for name, url in backends.items():
        command += ["--backend", f"{name}={url}"]
    env = {f"MOE_PRUNE_{name.upper()}": str(value) for name, value in variables.items()}
    env = {"MOE_PRUNE_POLL_S": "0.2"} | env
    gateway = Process(command, port, folder / f"gateway-{port}.log", **env)
    return gateway.wait_for("/ready" if ready else "/health")


@contextmanager
def running(*servers: Process) -> Iterator[None]:
    """None of them is left behind."""
    try:
        yield
    finally:
        for server in servers:
            server.kill()


def chat(model: str, **more: Any) -> dict[str, Any]:
    """A request."""
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], **more}


def streamed(model: str, **wishes: Any) -> dict[str, Any]:
    """A request for a stream that is as wished."""
    return chat(model, stream=True, stub=wishes)


def until(condition: Callable[[], Any], what: str, timeout_s: float = 60) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"after {timeout_s} s still not: {what}")
        time.sleep(0.02)


def metric(gateway: Process, name: str, **labels: str) -> float:
    """One value of the gateway's metrics; 0 where there is none yet."""
    wanted = {f'{key}="{value}"' for key, value in labels.items()}
    for line in httpx.get(f"{gateway.url}/metrics").text.splitlines():
        found, _, value = line.rpartition(" ")
        if found.partition("{")[0] == name and all(want in found for want in wanted):
            return float(value)
    return 0.0
