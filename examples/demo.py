"""The main job from end to end on the demo model: prune, judge, serve, talk.

`make demo` runs it. Every step is the command that a user would type; the two servers
are real `vllm serve` processes, and the questions go through the `openai` client.
"""

import argparse
import json
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

from openai import OpenAI
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "demo-output"
TOOL = [sys.executable, "-m", "vllm_moe_prune"]
START_TIMEOUT_S = 300
PROMPT = "def read_lines(path):\n"
QUESTION = "What is 17 + 25?"

console = Console(soft_wrap=True)


def main() -> None:
    """Run the demo for one family."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="?", default="mixtral")
    parser.add_argument("--recipe", default="stun40")
    options = parser.parse_args()
    # An interrupted demo must not leave servers behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    original = HERE / f"demo-{options.family}"
    if not original.is_dir():
        known = sorted(path.name.removeprefix("demo-") for path in HERE.glob("demo-*/"))
        sys.exit(f"demo: no family {options.family!r}; there are {', '.join(known)}")
    pruned = WORK / f"{options.family}-{options.recipe}"
    WORK.mkdir(exist_ok=True)

    console.rule("1. Prune")
    run(
        "run",
        *(str(original), str(pruned), "--recipe", options.recipe),
        *("--calibration", str(HERE / "calibration.txt")),
        *("--samples", "128", "--sequence-length", "512", "--overwrite"),
    )
    console.rule("2. Verify against the original")
    run("verify", str(pruned), "--source", str(original))

    console.rule("3. Before and after")
    compare(original, pruned)

    console.rule("4. Serve both, and ask")
    ask(original, pruned)


def run(*arguments: str) -> str:
    """Run the tool as a user would, showing the command."""
    shown = " ".join(arguments).replace(f"{HERE.parent}/", "")
    console.print(f"$ vllm-moe-prune {shown}", style="bold", markup=False)
    capture = "--json" in arguments
    done = subprocess.run(
        [*TOOL, *arguments],
        check=True,
        text=True,
        stdout=subprocess.PIPE if capture else None,
    )
    return done.stdout if capture else ""


def compare(original: Path, pruned: Path) -> None:
    """The table: size, experts, sparsity, perplexity per domain."""
    texts = sorted((HERE / "heldout").glob("*.txt"))
    flags = [flag for text in texts for flag in ("--text", str(text))]
    flags += ["--sequence-length", "512", "--json"]
    rows = [
        facts(folder, json.loads(run("eval", str(folder), *flags)))
        for folder in (original, pruned)
    ]
    table = Table("", "original", "pruned", title="Before and after")
    for name, before in rows[0].items():
        table.add_row(name, before, rows[1][name])
    console.print(table)


def facts(
    folder: Path, evaluation: dict[str, list[dict[str, float]]]
) -> dict[str, str]:
    """One column of the table."""
    seen = json.loads(run("inspect", str(folder), "--json"))
    counts = seen["experts_per_layer"]
    found = {
        "safetensors": f"{sum(f.stat().st_size for f in weights(folder)):,} bytes",
        "experts per layer": " ".join(map(str, counts)),
        "experts in all": str(sum(counts)),
        "parameters": f"{seen['parameters']:,}",
    }
    record = folder / "provenance.json"
    done = {"of_experts": 0.0, "of_all_parameters": 0.0}
    if record.is_file():
        done = json.loads(record.read_text("utf-8"))["sparsity_achieved"]
    found["sparsity of experts"] = f"{done['of_experts']:.1%}"
    found["sparsity of all"] = f"{done['of_all_parameters']:.1%}"
    for result in evaluation["results"]:
        name = Path(str(result["source"])).stem
        found[f"perplexity, {name}"] = f"{result['perplexity']:.2f}"
    return found


def weights(folder: Path) -> list[Path]:
    """The weight files of a checkpoint."""
    return sorted(folder.glob("*.safetensors"))


def ask(original: Path, pruned: Path) -> None:
    """Serve both models and put the same questions to them."""
    # Threads of two servers on one core would only wait for each other.
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    with serve(original, cores[:half]) as first, serve(pruned, cores[-half:]) as second:
        clients = {"original": first, "pruned": second}
        for client in clients.values():
            wait_until_ready(client)
        for name, client in clients.items():
            console.print(f"\n[bold]{name}[/bold], completion of {PROMPT!r}:")
            console.print(complete(client), style="green", markup=False)
        for name, client in clients.items():
            console.print(f"\n[bold]{name}[/bold], streamed chat, {QUESTION!r}:")
            for piece in chat(client):
                console.print(piece, style="green", end="", markup=False)
            console.print()
    console.print("\nBoth servers stopped.")


class Server(OpenAI):
    """An OpenAI client that knows the process it talks to."""

    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def serve(folder: Path, cores: list[int]) -> Iterator[Server]:
    """A real ``vllm serve`` through ``vllm-moe-prune serve``, stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"]
    # Eager: compiling would take longer than the few answers asked for here.
    flags += ["--served-model-name", "demo", "--max-num-seqs", "4", "--enforce-eager"]
    console.print(
        f"$ vllm-moe-prune serve {folder.relative_to(HERE.parent)} {' '.join(flags)}",
        style="bold",
        markup=False,
    )
    log = WORK / f"serve-{folder.name}.log"
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    settings["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*TOOL, "serve", str(folder), *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | settings,
            start_new_session=True,
        )
    client = Server(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    client.process, client.log = process, log
    try:
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(server: Server) -> None:
    """Wait for /health, or show why the server died."""
    deadline = time.monotonic() + START_TIMEOUT_S
    url = str(server.base_url).replace("/v1/", "/health")
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    tail = server.log.read_text("utf-8", errors="replace").splitlines()[-15:]
    sys.exit("demo: the server did not start:\n" + "\n".join(tail))


def complete(client: Server) -> str:
    """One greedy completion."""
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=48, temperature=0
    )
    return PROMPT + answer.choices[0].text


def chat(client: Server) -> Iterator[str]:
    """One greedy chat answer, streamed."""
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=48,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            yield chunk.choices[0].delta.content


if __name__ == "__main__":
    main()
