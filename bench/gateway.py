"""What does the gateway cost, and what can it hold?

    python bench/gateway.py [--quick] [--only NAME ...] [--json FILE] [--nginx]
    python bench/gateway.py [--quick] --vllm FOLDER [--json FILE] [--nginx]

The stub of the tests, a real HTTP server in a process of its own, is used directly and
through a real `moe-prune-gateway`, in turns, so that both see the same machine:

  latency     one request after the other, of an answer that is there at once
  paced       64 streams at a time, each token 20 ms after the one before it: as a GPU
  saturated   64 streams at a time, as fast as everything can: there, on few cores, the
              gateway can only take time that the stub would need
  bytes       10 000 streams of random lengths, compared byte for byte
  held        1000 streams at one time, for as long as it takes to see memory settle

or with --vllm one request after the other and 64 streams at a time of a real server.
With --nginx the first three, and those, also through an unbuffered nginx: what any
process between the two costs here, written in C.
Figures are added to those that a JSON file already has. Claims: at most 2 ms at the
median of one request at a time, all bytes equal, 1000 streams at one time without an
error or growing memory. Throughput is reported, without a bound.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import aiohttp
from server import VLLM

from vllm_moe_prune.judge.server import free_port, running

STUB = Path(__file__).resolve().parents[1] / "tests" / "stub_backend.py"
CHAT = "/v1/chat/completions"
Note = Callable[[str, dict[str, Any]], None]
Server = tuple[str, "subprocess.Popen[bytes] | None"]
Ways = dict[str, Server]
"""``direct``, ``gateway`` and perhaps ``nginx``: address, process in between."""
NGINX = """
daemon off; worker_processes auto; error_log stderr; pid {folder}/pid;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder};
  fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream backend {{ server {backend}; keepalive 128; }}
  server {{
    listen 127.0.0.1:{port};
    keepalive_requests 1000000;
    location / {{
      proxy_pass http://backend; proxy_http_version 1.1; proxy_buffering off;
      proxy_set_header Connection ""; proxy_read_timeout 600s;
    }}
  }}
}}
"""
NAMES = ["latency", "paced", "saturated", "bytes", "held"]
STREAMS = 64
KEEP_ALIVE_S = 3  # uvicorn closes idle connections after 5
ROUNDS = 5
VLLM_ROUNDS = 24  # of a few seconds, as other people's work comes and goes


def main() -> None:
    """Run the chosen measurements, print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--vllm", type=Path, help="a checkpoint to serve for real")
    parser.add_argument("--nginx", action="store_true", help="compare with nginx")
    options = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    share = 10 if options.quick else 1

    def note(name: str, found: dict[str, Any]) -> None:
        show(name, found)
        if options.json:
            figures: dict[str, Any] = {}
            if options.json.is_file():
                figures = json.loads(options.json.read_text("utf-8"))
            figures[name] = found
            options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")

    backend = vllm(options.vllm) if options.vllm else stub()
    with contextlib.ExitStack() as servers:
        direct = servers.enter_context(backend)
        ways: Ways = {"direct": (direct, None)}
        ways["gateway"] = servers.enter_context(gateway(direct))
        if options.nginx:
            ways["nginx"] = servers.enter_context(nginx(direct))
        if options.vllm:
            asyncio.run(measure_vllm(ways, share, note))
        else:
            asyncio.run(measure(ways, share, options.only, note))


# --- servers ----------------------------------------------------------------


@contextlib.contextmanager
def stub() -> Iterator[str]:
    """The stub backend of the tests."""
    port = free_port()
    command = [sys.executable, str(STUB), str(port), "m"]
    with running(command, port, DEVNULL) as (url, _):
        yield url


@contextlib.contextmanager
def gateway(backend: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A gateway as users run it. Two backends, so that it has to read the model."""
    port = free_port()
    command = [sys.executable, "-m", "moe_prune_gateway", "--port", str(port)]
    command += ["--backend", f"one={backend}", "--backend", f"two={backend}"]
    command += ["--max-concurrent", "4096"]
    with running(command, port, DEVNULL) as found:
        yield found


@contextlib.contextmanager
def nginx(backend: str) -> Iterator[Server]:
    """Debian's nginx as a proxy that sends on what has come at once."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        address = backend.removeprefix("http://")
        text = NGINX.format(folder=folder, backend=address, port=port)
        config = Path(folder) / "nginx.conf"
        config.write_text(text, "utf-8")
        command = ["nginx", "-c", str(config)]
        with running(command, port, DEVNULL) as found:
            yield found


@contextlib.contextmanager
def vllm(folder: Path) -> Iterator[str]:
    """A real vLLM server of a checkpoint."""
    port = free_port()
    command = [sys.executable, "-m", "vllm_moe_prune", "serve", str(folder)]
    command += ["--port", str(port), "--served-model-name", "m", "--enforce-eager"]
    command += ["--max-num-seqs", str(STREAMS)]
    with running(command, port, DEVNULL, **VLLM) as (url, _):
        yield url


def cpu_us(process: "subprocess.Popen[bytes]") -> float:
    """Processor time that a process and its children have taken, in microseconds."""
    total, parents = 0.0, [process.pid]
    for pid in parents:
        total += int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1000
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        parents += map(int, children)
    return total


def resident_mib(process: "subprocess.Popen[bytes]") -> float:
    """Memory of a process."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# --- measurements -----------------------------------------------------------


async def measure(
    ways: Ways,
    share: int,
    only: list[str],
    note: Note,
) -> None:
    """Everything on the stub."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        fetch = Client(session)
        paced, fast = request(events=50, gap_s=0.02), request(events=100)
        jobs = {
            "latency": lambda: latency(fetch, ways, request(), 1000 // share),
            "paced": lambda: throughput(fetch, ways, paced, 256 // share, 50),
            "saturated": lambda: throughput(fetch, ways, fast, 640 // share, 100),
            "bytes": lambda: equal_bytes(fetch, ways, 10_000 // share),
            "held": lambda: held(fetch, ways, 1000 // share),
        }
        for name in only:
            note(name, await jobs[name]())


async def measure_vllm(ways: Ways, share: int, note: Note) -> None:
    """The same two on a real server."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        fetch = Client(session)
        one = {"model": "m", "prompt": "def", "max_tokens": 1, "temperature": 0}
        path = "/v1/completions"
        found = await latency(fetch, ways, one, 200 // share, path)
        note("vllm_latency", found)
        many = one | {"max_tokens": 64, "ignore_eos": True, "stream": True}
        rounds = max(2, VLLM_ROUNDS // share)
        found = await throughput(fetch, ways, many, STREAMS, 64, path, rounds)
        note("vllm_throughput", found)


class Client:
    """Sends requests and reads whole answers."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def __call__(self, url: str, body: Any, path: str = CHAT) -> bytes:
        """The bytes of an answer."""
        async with self.session.post(url + path, json=body) as answer:
            data = await answer.read()
            if answer.status != 200:
                raise SystemExit(f"{url}: {answer.status} {data[:300]!r}")
            return data


def request(**wishes: Any) -> dict[str, Any]:
    """A request for a stream with these properties, or for a plain answer."""
    messages = [{"role": "user", "content": "Hi"}]
    return {
        "model": "m",
        "messages": messages,
        "stream": bool(wishes),
        "stub": wishes,
    }


async def latency(
    fetch: Client, ways: Ways, body: Any, count: int, path: str = CHAT
) -> dict[str, float]:
    """Milliseconds of one request at a time, each way, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(count + 20):
        for name, (url, _) in ways.items():
            start = time.perf_counter()
            await fetch(url, body, path)
            if turn >= 20:
                times[name].append(1000 * (time.perf_counter() - start))
    found: dict[str, float] = {"requests": count}
    mid = {name: statistics.median(times[name]) for name in ways}
    for name in ways:
        found[f"{name}_ms"] = round(mid[name], 3)
        found[f"{name}_p99_ms"] = round(percentile(times[name]), 3)
        if name != "direct":
            found[f"{name}_added_ms"] = round(mid[name] - mid["direct"], 3)
    return found


async def throughput(
    fetch: Client,
    ways: Ways,
    body: Any,
    count: int,
    tokens: int,
    path: str = CHAT,
    rounds: int = ROUNDS,
) -> dict[str, float]:
    """Streams per second, 64 at a time, of all rounds together; the ways take turns.

    The tokens are those of one stream.
    """
    seconds = dict.fromkeys(ways, 0.0)
    cpu = dict.fromkeys(ways, 0.0)
    for turn in range(rounds):
        # In another order each time, so that none always follows the same one.
        names = list(ways) if turn % 2 else list(reversed(ways))
        for name in names:
            url, process = ways[name]
            taken = cpu_us(process) if process else 0
            start = time.perf_counter()
            await many(fetch, url, [body] * count, path)
            seconds[name] += time.perf_counter() - start
            cpu[name] += (cpu_us(process) if process else 0) - taken
    found: dict[str, float] = {"streams": count, "rounds": rounds}
    for name, (_, process) in ways.items():
        found[f"{name}_per_s"] = round(count * rounds / seconds[name], 2)
        if process:
            lost = 100 * (1 - seconds["direct"] / seconds[name])
            found[f"{name}_lost_percent"] = round(lost, 1)
            per_token = cpu[name] / (count * rounds * tokens)
            found[f"{name}_cpu_us_per_token"] = round(per_token, 1)
    return found


async def equal_bytes(fetch: Client, ways: Ways, count: int) -> dict[str, float]:
    """Streams of random lengths, through the gateway and not."""
    draw = random.Random(0)
    bodies = [
        request(events=draw.randrange(1, 40), size=5 * draw.randrange(1, 200))
        for _ in range(count)
    ]
    # The stub's answer depends on the request only, so every pair must be equal.
    passed = await many(fetch, ways["gateway"][0], bodies)
    plain = await many(fetch, ways["direct"][0], bodies)
    return {
        "streams": count,
        "bytes": sum(map(len, plain)),
        "unequal": sum(a != b for a, b in zip(passed, plain, strict=True)),
    }


async def held(fetch: Client, ways: Ways, count: int) -> dict[str, Any]:
    """Many streams at one time; memory when all run, a while later, and after."""
    through, process = ways["gateway"]
    assert process is not None
    body = request(events=60, gap_s=0.5)
    before = resident_mib(process)
    jobs = [asyncio.ensure_future(fetch(through, body)) for _ in range(count)]
    samples = []
    for _ in range(3):
        await asyncio.sleep(7)
        samples.append(round(resident_mib(process), 1))
    open_now = sum(not job.done() for job in jobs)
    answers = await asyncio.gather(*jobs)
    whole = sum(data.endswith(b"data: [DONE]\n\n") for data in answers)
    for _ in range(2):  # further waves take no more memory than the first
        again = [asyncio.ensure_future(fetch(through, body)) for _ in range(count)]
        await asyncio.sleep(7)
        samples.append(round(resident_mib(process), 1))
        await asyncio.gather(*again)
    return {
        "streams": count,
        "open_together": open_now,
        "complete": whole,
        "resident_mib_before": round(before, 1),
        "resident_mib": samples,
    }


async def many(
    fetch: Client, url: str, bodies: list[Any], path: str = CHAT
) -> list[bytes]:
    """All answers, in order, 64 at a time."""
    gate = asyncio.Semaphore(STREAMS)

    async def one(body: Any) -> bytes:
        async with gate:
            return await fetch(url, body, path)

    return list(await asyncio.gather(*map(one, bodies)))


def percentile(values: list[float]) -> float:
    """The 99th."""
    return sorted(values)[int(0.99 * len(values))]


def show(name: str, found: dict[str, Any]) -> None:
    """One line, with the load of the machine."""
    found["load_average"] = round(os.getloadavg()[0], 1)
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
