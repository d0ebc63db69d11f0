"""Is the fused sparse MoE kernel faster than vLLM's dense one on the same weights?

    python bench/sparse_moe.py [--quick] [--json FILE] [--shapes mixtral ...]
        [--zeros 0.5 ...] [--tokens 1 ...] [--threads 2] [--no-amx]

One layer of random weights with zeros, in the shapes of Mixtral-8x7B, DeepSeek-V2-Lite
and Arctic, as many experts as fit. Beside each other, taking turns in the same run:
vLLM's CPU fused MoE (AMX where there is AMX), the same through zentorch's operator if
that package can be imported, and ours from the compressed form. The ratio counts, times
on a shared machine do not. Routing is random, new for every call. Claims, against the
faster dense one: at 50 % zeros >= 1.6 for up to 4 tokens, >= 1.2 for up to 16, never
below 1.0; at 65 % >= 1.9 for up to 4; against vLLM's own: >= 1.6 at 50 % for up to 64;
for one token, reading compressed weights at 75 % of the speed of plain reading.

zentorch needs no environment of its own, only a folder of its own:

    pip install --no-deps --target ZEN zentorch==2.13.0.1 deprecated wrapt
    PYTHONPATH=ZEN python bench/sparse_moe.py

--no-amx measures what a processor without AMX would do, AMD's for instance.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import DEEPSEEK_V2_LITE, MIXTRAL, Shape
from torch import Tensor
from vllm import _custom_ops as ops

from vllm_moe_prune.kernels import cpu_encode, cpu_library
from vllm_moe_prune.kernels.blocks import Blocks, join
from vllm_moe_prune.plugin.compat import has_amx

SHAPES = {
    "mixtral": MIXTRAL,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "arctic": Shape(7168, 4864, 8, 2),  # of 128 experts
}
SMALL = Shape(1024, 3584, 4, 2)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
ZEROS = ("0.4", "0.5", "0.6", "0.65", "2:4")
NO_AMX = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
"""For oneDNN, also the one inside zentorch."""
READ = torch.zeros(1 << 27)
"""Half a gigabyte, more than caches hold."""
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
Row = dict[str, Any]


def main() -> None:
    """Measure and print one table per shape and share of zeros."""
    parser = arguments(__doc__, TOKENS)
    parser.add_argument("--zeros", nargs="+", default=list(ZEROS))
    parser.add_argument("--experts", type=int, help="fewer than the shape has")
    options = parser.parse_args()
    if options.quick:
        options.zeros = ["0.5"]
    shapes, amx = prepare(options)
    machine = describe_machine(options.threads, amx)
    print(machine)
    found = []
    for name, shape in shapes.items():
        experts = min(options.experts or shape.experts, shape.experts)
        for zeros in options.zeros:
            layer = Shape(shape.hidden, shape.width, experts, shape.top_k)
            print(f"\n{name}: {layer}, zeros {zeros}")
            rows: list[Row] = []
            about = {"shape": name, **vars(layer), "zeros": zeros, "machine": machine}
            found.append({**about, "rows": rows})
            for row in measure(layer, zeros, options.tokens, options.seconds, amx):
                rows.append(row)
                show(row, header=len(rows) == 1)
                if options.json:
                    save(options.json, found)


def arguments(
    description: str | None, tokens: tuple[int, ...]
) -> argparse.ArgumentParser:
    """What every bench of a layer can be asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="one small layer")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(tokens))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-amx", action="store_true", help="as without AMX")
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    return parser


def prepare(options: argparse.Namespace) -> tuple[dict[str, Shape], bool]:
    """The layers that were asked for, and whether AMX is used; threads are set."""
    amx = has_amx() and not options.no_amx
    if amx:
        torch.cpu._init_amx()
    else:
        os.environ |= NO_AMX
    torch.set_num_threads(options.threads)
    if options.quick:
        options.tokens = [1, 4, 16, 64]
        options.seconds = min(options.seconds, 0.2)
        return {"small": SMALL}, amx
    return {name: SHAPES[name] for name in options.shapes}, amx


def save(path: Path, found: list[dict[str, object]]) -> None:
    """What has been measured so far; a run may be cut short."""
    path.write_text(json.dumps({"layers": found}, indent=1) + "\n", "utf-8")


def describe_machine(threads: int, amx: bool) -> dict[str, object]:
    """What the figures were measured on; the load tells who else was there."""
    found = {
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "kernel": cpu_library.LEVELS[level(amx)],
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 1),
    }
    if level(amx) >= cpu_library.BF16:
        found |= asdict(cpu_library.measured(level(amx), cpu_library.AS_TOKENS))
    return found


def level(amx: bool) -> int:
    """The instructions that our kernel may use."""
    return cpu_library.level() if amx else min(cpu_library.level(), cpu_library.BF16)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def matrix(rows: int, cols: int, zeros: str) -> Tensor:
    """Random bf16 weights; made of integers, which is quicker than of normals."""
    made = torch.randint(15000, 15512, (rows, cols), dtype=torch.int16)
    if zeros == "2:4":
        order = torch.rand(rows, cols // 4, 4).argsort(dim=-1).view(rows, cols)
        made[order >= 2] = 0
    else:
        drawn = torch.randint(0, 256, (rows, cols), dtype=torch.uint8)
        made[drawn < round(256 * float(zeros))] = 0
    return made.view(torch.bfloat16)


def build(
    shape: Shape, zeros: str, amx: bool
) -> tuple[Blocks, Blocks, dict[str, Call]]:
    """The same weights compressed and in every dense form there is."""
    w13 = torch.empty(
        shape.experts, 2 * shape.width, shape.hidden, dtype=torch.bfloat16
    )
    w2 = torch.empty(shape.experts, shape.hidden, shape.width, dtype=torch.bfloat16)
    ups, downs = [], []
    for expert in range(shape.experts):
        w13[expert] = matrix(2 * shape.width, shape.hidden, zeros)
        w2[expert] = matrix(shape.hidden, shape.width, zeros)
        ups.append(cpu_encode.encode(w13[expert].chunk(2)))
        downs.append(cpu_encode.encode([w2[expert]]))
    dense: dict[str, Call] = {}
    if zen := zentorch():
        dense["zentorch"] = lambda x, weights, ids: zen(x, w13, w2, weights, ids)
    dense[f"vLLM {isa(amx)}"] = stock(w13, w2, amx)
    return join(ups), join(downs), dense


def isa(amx: bool) -> str:
    """vLLM's name of its dense operator."""
    return "amx" if amx else "vec"


def stock(w13: Tensor, w2: Tensor, amx: bool) -> Call:
    """vLLM's operator for dense weights."""
    packed13 = ops.cpu_prepack_moe_weight(w13, isa(amx))
    packed2 = ops.cpu_prepack_moe_weight(w2, isa(amx))

    def call(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        routed = (weights, ids, "silu", isa(amx), False)
        ops.cpu_fused_moe(out, x, packed13, packed2, None, None, *routed)
        return out

    return call


def random_ids(shape: Shape, tokens: int) -> Tensor:
    """Experts of each token."""
    scores = torch.rand(tokens, shape.experts)
    return scores.topk(shape.top_k).indices.to(torch.int32)


def zentorch() -> Callable[..., Tensor] | None:
    """AMD's operator; vLLM takes it by itself, but on Zen processors only."""
    try:
        import zentorch  # noqa: F401
    except ImportError:
        return None

    def call(
        x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor
    ) -> Tensor:
        out = torch.empty_like(x)
        torch.ops.zentorch.zentorch_fused_moe(
            out, x, w13, w2, None, None, weights, ids, False, "silu"
        )
        return out

    return call


def in_turns(
    shape: Shape, ways: dict[str, Call], x: Tensor, weights: Tensor, seconds: float
) -> tuple[dict[str, float], list[Tensor]]:
    """Median seconds of each way, which take turns, and where tokens went each time.

    The first round warms up and does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    routed: list[Tensor] = []
    start = time.perf_counter()
    while len(routed) < 4 or time.perf_counter() - start < seconds * len(ways):
        ids = random_ids(shape, len(x))
        routed.append(ids)
        for name, call in ways.items():
            times[name].append(timed(partial(call, x, weights, ids)))
    return {name: statistics.median(found[1:]) for name, found in times.items()}, routed


def measure(
    shape: Shape, zeros: str, tokens: list[int], seconds: float, amx: bool
) -> Iterator[Row]:
    """One row per number of tokens; the ways take turns, medians are compared."""
    w13, w2, ways = build(shape, zeros, amx)
    dense_ways = list(ways)
    ours, at_level = "compressed", level(amx)
    ways[ours] = lambda x, weights, ids: cpu_library.fused_moe(
        x, weights, ids, None, w13, w2, shape.width, at_level=at_level
    )
    ways["reading"] = lambda *_: READ @ READ
    stored = w13.nbytes + w2.nbytes
    dense = shape.experts * 3 * shape.hidden * shape.width * 2
    for count in tokens:
        x = torch.randn(count, shape.hidden).bfloat16()
        weights = torch.rand(count, shape.top_k)
        taken, routed = in_turns(shape, ways, x, weights, seconds)
        experts = [len(ids.unique()) for ids in routed]
        read_gb_s = READ.nbytes / taken.pop("reading") / 1e9
        fastest = min(taken[name] for name in dense_ways)
        share = statistics.mean(experts) / shape.experts
        yield {
            "tokens": count,
            "ms": {name: round(1e3 * value, 3) for name, value in taken.items()},
            "against_fastest": round(fastest / taken[ours], 2),
            "against_vllm": round(taken[dense_ways[-1]] / taken[ours], 2),
            "rounds": len(experts) - 1,
            "gb_s": round(share * stored / taken[ours] / 1e9, 1),
            "read_gb_s": round(read_gb_s, 1),
            "bytes_ratio": round(dense / stored, 2),
        }


def show(row: Row, header: bool) -> None:
    """One line of a table."""
    if header:
        names = "".join(f"{name + ' ms':>16}" for name in row["ms"])
        print(f"{row['bytes_ratio']} times fewer bytes")
        print(f"tokens {names}  against the faster, vLLM   GB/s  of plain reading")
    cells = "".join(f"{value:16.2f}" for value in row["ms"].values())
    ratios = f"{row['against_fastest']:18}x {row['against_vllm']:5}x"
    rates = f"{row['gb_s']:6} {row['gb_s'] / row['read_gb_s']:16.0%}"
    print(f"{row['tokens']:6} {cells} {ratios} {rates}", flush=True)


if __name__ == "__main__":
    main()
