"""How fast is a layer of compressed experts, and how fast the same layer dense?

    python -m bench.gpu.moe [--json FILE] [--small] [--seconds S] [--shapes NAME ...]
        [--zeros Z ...] [--tokens T ...]

One layer of random weights in the shapes of Mixtral-8x7B, DeepSeek-V2-Lite and a fourth
of Arctic. Each way runs in a CUDA graph, on two copies of the weights in turn and with
another random routing each time, so that no weight stays in the cache. Dense is the
fastest of bench/gpu/dense.py; expand is expansion and the same dense product behind it.
Ratios are dense by the other: above 1, compressed is faster.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.common import (
    DEVICE,
    ROUNDS,
    SHAPES,
    SMALL,
    Layer,
    Shape,
    arguments,
    bytes_of,
    layer,
    random_ids,
    save,
    seconds,
)
from bench.gpu.dense import SMALL_TILE, TILES, Dense, by_cublas, by_triton, by_vllm
from bench.gpu.right import apart
from vllm_moe_prune.kernels.blocks import local_ids
from vllm_moe_prune.kernels.triton import workspace
from vllm_moe_prune.kernels.triton.expand import expand_layer, workspace_bytes
from vllm_moe_prune.kernels.triton.fused import fused_moe

ZEROS = ("0.5", "0.65", "2:4")
TOKENS = (1, 2, 4, 8, 16, 32, 64)
ROUTINGS = 8
"""Calls in a graph."""
MUCH_APART = 3e-2
Row = dict[str, Any]


def measured(shape: Shape, copies: list[Layer], tokens: int, rounds: int) -> Row:
    """One row: milliseconds of each way and ratios."""
    x_TD = torch.randn(tokens, shape.hidden, device=DEVICE).bfloat16()
    weights_TK = torch.rand(tokens, shape.top_k, device=DEVICE)
    routed = [random_ids(shape, tokens) for _ in range(ROUTINGS if rounds else 1)]

    def timed(call: Callable[[Layer, Tensor], Tensor]) -> float:
        calls = [
            partial(call, copies[at % len(copies)], ids)
            for at, ids in enumerate(routed)
        ]
        return 1e3 * seconds(calls, rounds)

    def dense(way: Dense, of: Layer, ids: Tensor) -> Tensor:
        return way(x_TD, weights_TK, ids, of.gate_up_EFD, of.down_EDF)

    def fused(of: Layer, ids: Tensor) -> Tensor:
        return fused_moe(x_TD, weights_TK, ids, None, of.w13, of.w2, shape.width)

    def expanded(way: Dense, of: Layer, ids: Tensor) -> Tensor:
        local_TK = local_ids(ids, None, shape.experts)
        pair = expand_layer(x_TD, local_TK, of.w13, of.w2, shape.width)
        return way(x_TD, weights_TK, ids, *pair)

    tiles = TILES if rounds else [SMALL_TILE]
    ways = {f"triton {tile}": by_triton(tile) for tile in tiles}
    if rounds and (own := by_vllm()) is not None:
        ways["vllm"] = own
    ms = {name: timed(partial(dense, way)) for name, way in ways.items()}
    best = ways[min(ms, key=ms.__getitem__)]
    known = {id(ids): by_cublas(ids) for ids in routed}
    ms["cublas"] = timed(lambda of, ids: dense(known[id(ids)], of, ids))
    found = {
        "dense": min(ms.values()),
        "fused": timed(fused),
        "expand": timed(partial(expanded, best)),
    }
    wanted = dense(known[id(routed[0])], copies[0], routed[0])
    errors = {
        "dense": apart(dense(best, copies[0], routed[0]), wanted),
        "fused": apart(fused(copies[0], routed[0]), wanted),
        "expand": apart(expanded(best, copies[0], routed[0]), wanted),
    }
    chosen = sum(len(ids.unique()) for ids in routed) / len(routed) / shape.experts
    stored = copies[0].w13.nbytes + copies[0].w2.nbytes
    return {
        "tokens": tokens,
        "ms": {name: round(value, 4) for name, value in found.items()},
        "dense_ms": {name: round(value, 4) for name, value in ms.items()},
        "fused_ratio": round(found["dense"] / found["fused"], 3),
        "expand_ratio": round(found["dense"] / found["expand"], 3),
        "dense_gb_s": round(chosen * bytes_of(shape) / found["dense"] / 1e6, 1),
        "fused_gb_s": round(chosen * stored / found["fused"] / 1e6, 1),
        "apart": {name: round(value, 5) for name, value in errors.items()},
    }


def rows(shape: Shape, zeros: str, tokens: list[int], rounds: int) -> Iterator[Row]:
    """Of one layer; nothing but a reason where it does not fit."""
    size = workspace_bytes(shape.experts, shape.hidden, shape.width, torch.bfloat16)
    free, _ = torch.cuda.mem_get_info()
    if (needed := int(3.5 * bytes_of(shape)) + size) > free:
        yield {"left_out": f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} needed"}
        return
    workspace.reserve(size, DEVICE)
    copies = [layer(shape, zeros) for _ in range(2)]
    for count in tokens:
        yield measured(shape, copies, count, rounds)


def main() -> None:
    """One table for each shape and share of zeros."""
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--zeros", nargs="+", default=list(ZEROS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    options = parser.parse_args()
    began = time.monotonic()
    shapes = SMALL if options.small else {name: SHAPES[name] for name in options.shapes}
    tokens, rounds = ([3], 0) if options.small else (options.tokens, ROUNDS)
    share = ["0.5"] if options.small else options.zeros
    found: list[Row] = []
    wrong = False
    # Every shape once before any other share of zeros: a run may be cut short.
    for zeros in share:
        for name, shape in shapes.items():
            done: list[Row] = []
            found.append({"shape": name, **vars(shape), "zeros": zeros, "rows": done})
            print(f"\n{name}, zeros {zeros}: ms dense, fused, expand; ratios; apart")
            if time.monotonic() - began > options.seconds:
                done.append({"left_out": "no time left"})
                print("left out: no time left")
                save(options.json, found)
                continue
            for row in rows(shape, zeros, tokens, rounds):
                done.append(row)
                save(options.json, found)
                if "left_out" in row:
                    print("left out:", row["left_out"])
                    continue
                wrong |= max(row["apart"].values()) > MUCH_APART
                cells = "".join(f"{value:10.4f}" for value in row["ms"].values())
                ratios = f"{row['fused_ratio']:8} {row['expand_ratio']:8}"
                print(f"{row['tokens']:6}{cells}{ratios}  {row['apart']}", flush=True)
            torch.cuda.empty_cache()
    if wrong:
        raise SystemExit("results are too far apart")


if __name__ == "__main__":
    main()
