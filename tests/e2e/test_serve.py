"""The main job as a user does it: prune the demo model, serve it, talk to it.

A real ``vllm serve`` (bf16; eager, since compiling takes minutes on two cores), started
through ``vllm-moe-prune serve``, and the real ``openai`` client.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_moe_prune.checkpoint.source import open_checkpoint

pytestmark = pytest.mark.vllm
EXAMPLES = Path(__file__).parents[2] / "examples"
TOOL = [sys.executable, "-m", "vllm_moe_prune"]
START_TIMEOUT_S = 400


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "stun40"
    text = ["--calibration", str(EXAMPLES / "calibration.txt")]
    few = ["--samples", "8", "--sequence-length", "256"]
    command = [*TOOL, "run", str(EXAMPLES / "demo-mixtral"), str(out), *text, *few]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="module")
def address(pruned: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256"]
    flags += ["--enforce-eager"]
    log = pruned.parent / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*TOOL, "serve", str(pruned), *flags, "--served-model-name", "demo"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
        # The tool became the server, so the signal reaches vLLM itself.
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def wait_until_ready(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no server: {log.read_text('utf-8', errors='replace')[-4000:]}")


def test_the_demo_model_comes_out_uneven(pruned: Path) -> None:
    checkpoint = open_checkpoint(pruned)
    assert checkpoint.config["architectures"] == ["MoePruneMixtralForCausalLM"]
    assert sum(layer.num_experts for layer in checkpoint.layers) == 51


def test_a_pruned_model_answers_completions_and_streamed_chat(address: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=address, api_key="none")
    assert [model.id for model in client.models.list()] == ["demo"]
    # One token: short prompts are what kills stock vLLM on CPUs with AMX.
    for prompt in ("a", "def read_lines(path):\n"):
        answer = client.completions.create(
            model="demo", prompt=prompt, max_tokens=8, temperature=0
        )
        assert answer.choices[0].text
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello!"}],
        max_tokens=8,
        temperature=0,
        stream=True,
    )
    pieces = [
        chunk.choices[0].delta.content
        for chunk in stream
        if chunk.choices and chunk.choices[0].delta.content
    ]
    assert "".join(pieces)
