"""Servers that are started for a while, by real processes: none is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_moe_prune.errors import EvaluationError
from vllm_moe_prune.judge.server import (
    ServerEnded,
    free_port,
    peak_memory,
    resident,
    running,
)
from vllm_moe_prune.judge.tasks import find_endpoint

STUB = Path(__file__).parents[1] / "stub_backend.py"
# Starts the server, says its process group, and waits to be ended.
HOLDER = """\
import subprocess, sys, time
from vllm_moe_prune.judge.server import running
command = [sys.executable, sys.argv[1], sys.argv[2], "m"]
with running(command, int(sys.argv[2]), subprocess.DEVNULL) as (_, process):
    print(process.pid, flush=True)
    time.sleep(100)
"""


def is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_runs_as_long_as_it_is_needed() -> None:
    port = free_port()
    command = [sys.executable, str(STUB), str(port), "m"]
    with running(command, port, subprocess.DEVNULL) as (url, process):
        assert is_there(process.pid)
        assert 0 < resident(process.pid) <= peak_memory(process.pid) + 4096
        # It does not say how long its prompts may be, as a server of vLLM does.
        with pytest.raises(EvaluationError, match=r"max_model_len.*ask a vLLM server"):
            find_endpoint(url, None)
    assert not is_there(process.pid)


def test_proxies_are_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    port = free_port()
    command = [sys.executable, str(STUB), str(port), "m"]
    with running(command, port, subprocess.DEVNULL) as (url, _):
        with pytest.raises(EvaluationError, match="max_model_len"):  # it answers
            find_endpoint(url, None)
        monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:9")
        with pytest.raises(EvaluationError, match="no server answers"):
            find_endpoint("http://192.0.2.1:9", None)


@pytest.mark.slow
def test_no_server_survives_what_started_it() -> None:
    command = [sys.executable, "-c", HOLDER, str(STUB), str(free_port())]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as holder:
        assert holder.stdout is not None
        group = int(holder.stdout.readline())
        assert is_there(group)
        holder.terminate()
        assert holder.wait(60) == 128 + signal.SIGTERM
    assert not is_there(group)


def test_a_server_that_ends_is_an_error() -> None:
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    with (
        pytest.raises(ServerEnded, match="ended with status 7"),
        running(command, free_port(), subprocess.DEVNULL),
    ):
        pytest.fail("it must not be healthy")
