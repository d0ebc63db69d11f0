"""Does a compressed checkpoint decode faster than its dense form, through vllm serve?

    python bench/serve_decode.py [--quick] [--json FILE] [--layers 2] [--zeros 0.5 0.65]
        [--concurrency 1 4 16] [--keep-in FOLDER]

Random Mixtral-shaped models (4096 x 14336, 8 experts, top-2; two layers hold 5.6 GB of
experts) with zeros, once dense under stock vLLM (VLLM_PLUGINS empty) and once
compressed under the plugin, one after the other through real servers. Requests stream
fixed numbers of tokens; time to first token and tokens per second after it are medians
over requests. Claims at 50 % zeros: decoding at least 1.4 times as fast, no worse time
to first token, experts in at most 1/1.7 of the memory, no slower start. Memory is what
all processes of a server hold: the difference between two rows is that of the experts.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from safetensors.torch import load_file, save_file
from server import VLLM
from synthetic import write_mixtral

from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.convert import convert
from vllm_moe_prune.judge.server import free_port, resident, running

PROMPT, NEW = 64, 32


@dataclass(frozen=True)
class Model:
    """The shape of the random model."""

    layers: int
    hidden: int
    width: int
    experts: int


def main() -> None:
    """Build the models, serve each, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.65])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--keep-in", type=Path, help="work in this folder")
    options = parser.parse_args()
    model = Model(options.layers, 4096, 14336, 8)
    if options.quick:
        model = Model(2, 1024, 3584, 4)
        options.zeros, options.concurrency = options.zeros[:1], [1, 4]
    rows = []
    with tempfile.TemporaryDirectory(dir=options.keep_in) as temporary:
        for zeros in options.zeros:
            folders = build(model, zeros, Path(temporary))
            for name, folder in folders.items():
                found = serve_and_measure(folder, options.concurrency, name)
                rows.append({"zeros": zeros, "weights": name, **found})
                print(json.dumps(rows[-1]), flush=True)
            for folder in folders.values():
                shutil.rmtree(folder)
    figures = {"model": vars(model), "load_average": os.getloadavg()[0], "rows": rows}
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def build(model: Model, zeros: float, work: Path) -> dict[str, Path]:
    """The same random weights with zeros, dense and compressed."""
    dense, packed = work / "dense", work / "packed"
    write_mixtral(
        dense,
        layers=model.layers,
        hidden=model.hidden,
        width=model.width,
        experts=model.experts,
        heads=model.hidden // 128,
        layers_per_shard=0.5,
    )
    for path in dense.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if ".experts." in name:
                tensor[torch.rand(tensor.shape) < zeros] = 0
        save_file(tensors, path, metadata={"format": "pt"})
    convert(open_checkpoint(dense), packed, "bitmask")
    return {"dense": dense, "compressed": packed}


def serve_and_measure(
    folder: Path, concurrency: list[int], name: str
) -> dict[str, object]:
    """Start a server, load it, stop it."""
    port = free_port()
    environment = VLLM | ({"VLLM_PLUGINS": ""} if name == "dense" else {})
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(folder)),
        *("--port", str(port), "--max-model-len", "256", "--enforce-eager"),
        *("--skip-tokenizer-init", "--max-num-seqs", "16"),
    ]
    started = time.monotonic()
    with running(command, port, None, **environment) as (url, server):
        start_s = time.monotonic() - started
        asyncio.run(load(url, folder, 2))  # warms up
        result: dict[str, object] = {"start_s": round(start_s, 1)}
        result["resident_gb"] = round(resident(server.pid) / 1e9, 2)
        for parallel in concurrency:
            result[str(parallel)] = asyncio.run(load(url, folder, parallel))
        return result


async def load(url: str, folder: Path, parallel: int) -> dict[str, float]:
    """Requests in parallel: seconds to the first token, tokens per second after it."""
    async with httpx.AsyncClient(timeout=None) as client:
        start = time.monotonic()
        jobs = [ask(client, url, folder, seed) for seed in range(parallel)]
        found = await asyncio.gather(*jobs)
        elapsed = time.monotonic() - start
    first = statistics.median(item[0] for item in found)
    rate = sum((NEW - 1) / (item[1] - item[0]) for item in found)
    return {
        "ttft_s": round(first, 3),
        "decode_tokens_s": round(rate, 2),
        "total_tokens_s": round(parallel * NEW / elapsed, 2),
    }


async def ask(
    client: httpx.AsyncClient, url: str, folder: Path, seed: int
) -> tuple[float, float]:
    """Seconds until the first token and until the last."""
    tokens = [random.Random(seed).randrange(3, 1000) for _ in range(PROMPT)]
    body = {
        "model": str(folder),
        "prompt": tokens,
        "max_tokens": NEW,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "temperature": 0,
    }
    start, first, count = time.monotonic(), 0.0, 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.monotonic() - start
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                count += len(choice["token_ids"])
    if count != NEW:
        raise SystemExit(f"{url}: {count} tokens came, {NEW} were asked for")
    return first, time.monotonic() - start


def show(rows: list[dict[str, object]]) -> None:
    """The table: compressed over dense."""
    print("zeros weights       GB start s   " + "per concurrency: TTFT s, decode tok/s")
    for row in rows:
        cells = "   ".join(
            f"{key}: {value['ttft_s']:.2f} {value['decode_tokens_s']:.1f}"
            for key, value in row.items()
            if isinstance(value, dict)
        )
        print(
            f"{row['zeros']:<5} {row['weights']:<10} {row['resident_gb']:>6} "
            f"{row['start_s']:>7}   {cells}"
        )


if __name__ == "__main__":
    main()
