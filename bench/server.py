"""Servers that benches start: each in a process group of its own, until they answer."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx

VLLM = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""The environment of vLLM's servers here."""


@contextmanager
def running(
    command: list[str], port: int, quiet: bool = True, **env: str
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The address and the process of a server, from when it is healthy."""
    output = subprocess.DEVNULL if quiet else None
    with subprocess.Popen(
        command,
        env=os.environ | env,
        stdout=output,
        stderr=output,
        start_new_session=True,
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, process)
            yield url, process
        finally:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGTERM)


def _wait_until_healthy(url: str, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"a server ended with status {process.returncode}")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
