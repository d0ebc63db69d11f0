"""A real ``vllm serve``, started through ``vllm-moe-prune serve``."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

TOOL = [sys.executable, "-m", "vllm_moe_prune"]
START_TIMEOUT_S = 400


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[str]:
    """The address of a server of a checkpoint, called ``demo``; eager, for speed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [*TOOL, "serve", str(folder), "--host", "127.0.0.1", "--port", port]
    command += ["--enforce-eager", "--served-model-name", "demo", *flags]
    log = folder.parent / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        _wait_until_ready(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
        # The tool became the server, so the signal reaches vLLM itself.
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def _wait_until_ready(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no server: {log.read_text('utf-8', errors='replace')[-4000:]}")
