"""Real `vllm serve` processes for the demo, asked through the `openai` client."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from openai import OpenAI

START_TIMEOUT_S = 600


class Served:
    """A model behind an address of this machine."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.log = process, log
        self.url = f"http://127.0.0.1:{port}"
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none")

    def wait_until_ready(self) -> None:
        """Wait for /health, or show why the server died."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", trust_env=False).is_success:
                    return
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
                break
        tail = self.log.read_text("utf-8", errors="replace").splitlines()[-15:]
        sys.exit("demo: the server did not start:\n" + "\n".join(tail))

    def weight_bytes(self) -> int:
        """What the server's processes hold of the model, by its own account."""
        answer = httpx.get(f"{self.url}/plugins/moe-prune/load", trust_env=False)
        found: int = answer.raise_for_status().json()["weight_bytes"]
        return found

    def chat(self, question: str) -> str:
        """One greedy chat answer."""
        answer = self.client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question}],
            max_tokens=48,
            temperature=0,
        )
        return answer.choices[0].message.content or ""

    def complete(self, text: str) -> str:
        """One greedy completion."""
        answer = self.client.completions.create(
            model="demo", prompt=text, max_tokens=40, temperature=0
        )
        return answer.choices[0].text

    def decode_rate(self, tokens: int = 128) -> float:
        """Tokens per second of one request with a prompt of one token."""
        began = time.monotonic()
        # Not streamed: a busy server sends several tokens at once.
        answer = self.client.completions.create(
            model="demo",
            prompt="def",
            max_tokens=tokens,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        if answer.usage is None or answer.usage.completion_tokens != tokens:
            sys.exit(f"demo: asked for {tokens} tokens, the server told {answer.usage}")
        return tokens / (time.monotonic() - began)


@contextmanager
def serve(folder: Path, core: int, work: Path) -> Iterator[Served]:
    """`vllm-moe-prune serve` on one core, stopped at the end.

    It starts in the background. A model this small has no use for more threads, and
    those of several servers would wait for each other.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm_moe_prune", "serve", str(folder), "--watch"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    # Eager: compiling would take longer than the few answers asked for here.
    command += ["--served-model-name", "demo", "--max-num-seqs", "16"]
    command += ["--enforce-eager", "--no-enable-log-requests"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "HF_HUB_OFFLINE": "1",
    }
    log = work / f"serve-{folder.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | settings,
            start_new_session=True,
        )
    try:
        yield Served(process, port, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
