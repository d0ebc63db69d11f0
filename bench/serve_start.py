"""Does a vLLM server start later with this plugin than without?

    python bench/serve_start.py examples/demo-mixtral [--rounds 5]

The same checkpoint, in turns with the plugin and with none (``VLLM_PLUGINS=``): seconds
until ``/health`` answers, and processor seconds of all processes until then.
"""

import argparse
import os
import statistics
import subprocess
import time
from pathlib import Path

from server import VLLM

from vllm_moe_prune.judge.server import free_port, running

WAYS = {"stock": {"VLLM_PLUGINS": ""}, "plugin": {}}


def main() -> None:
    """One line per start, then medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="one that stock vLLM serves")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for turn in range(options.rounds):
        for name in list(WAYS) if turn % 2 else list(reversed(WAYS)):
            taken = start(options.checkpoint, WAYS[name])
            found[name].append(taken)
            print(
                f"{name}: {taken[0]:.1f} s, {taken[1]:.1f} s of processors", flush=True
            )
    for name, starts in found.items():
        seconds, cpu = (
            statistics.median(values) for values in zip(*starts, strict=True)
        )
        print(f"median of {name}: {seconds:.1f} s, {cpu:.1f} s of processors")


def start(checkpoint: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds, and processor seconds, of one start."""
    port = free_port()
    command = ["vllm", "serve", str(checkpoint), "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "512"]
    began = time.perf_counter()
    with running(command, port, subprocess.DEVNULL, **VLLM, **environment) as (
        _,
        server,
    ):
        return time.perf_counter() - began, cpu_seconds(server.pid)


def cpu_seconds(group: int) -> float:
    """Of all processes of a group, and of those they have waited for."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
