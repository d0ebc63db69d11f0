"""Real gateways before real HTTP servers, each in a process of its own."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import TOOL, Process, free_port

STUB = Path(__file__).with_name("stub_backend.py")
CHAT = "/v1/chat/completions"


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


def chat(model: str, **more: Any) -> dict[str, Any]:
    """A request."""
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], **more}


def streamed(model: str, **properties: Any) -> dict[str, Any]:
    """A request for a stream with properties that the stub knows."""
    return chat(model, stream=True, stub=properties)


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
