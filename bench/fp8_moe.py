"""How fast are FP8 experts without their zeros, beside vLLM's dense FP8 kernel?

    python bench/fp8_moe.py [--quick] [--json FILE] [--shapes deepseek-v2-lite ...]
        [--tokens 1 ...] [--zeros 0.5 ...] [--threads 2]

One layer of random e4m3 weights with a scale for 128 x 128 of them, as DeepSeek-V3 has
them, in the shapes of bench/sparse_moe.py. vLLM's kernel (it needs AMX) and ours take
turns in the same run. Each row says how far ours is from vLLM's: the largest
difference over the largest output.
"""

import json

import torch
from sparse_moe import (
    Call,
    Shape,
    arguments,
    describe_machine,
    in_turns,
    level,
    prepare,
    save,
)
from torch import Tensor
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
    CPUQuantMethod,
    fused_experts_cpu,
)

from vllm_moe_prune.kernels import blocks, cpu_encode, cpu_library
from vllm_moe_prune.kernels.blocks import FP8, Blocks

TOKENS = (1, 2, 4, 8, 16, 64, 256)
SCALED = 128
"""Rows and columns that share a scale."""


def main() -> None:
    """Measure and print one table per shape and share of zeros."""
    parser = arguments(__doc__, TOKENS)
    parser.add_argument("--zeros", nargs="+", type=float, default=[0.5])
    options = parser.parse_args()
    shapes, amx = prepare(options)
    if not amx:
        raise SystemExit("vLLM's FP8 kernel needs AMX; there is nothing to compare.")
    found = []
    for name, shape in shapes.items():
        for zeros in options.zeros:
            about = {"shape": name, **vars(shape), "zeros": zeros}
            about["machine"] = describe_machine(options.threads, amx)
            ways, bytes_ratio = build(shape, zeros)
            about["bytes_ratio"] = round(bytes_ratio, 2)
            print(f"\n{name}: {about}")
            rows = []
            for count in options.tokens:
                rows.append(measure(shape, ways, count, options.seconds))
                print(json.dumps(rows[-1]), flush=True)
            found.append({**about, "rows": rows})
            if options.json:
                save(options.json, found)


def random_weights(experts: int, rows: int, cols: int, zeros: float) -> Tensor:
    """e4m3 [E, rows, cols], no NaNs and no denormals, many of them zero."""
    made = torch.randint(0x08, 0x70, (experts, rows, cols), dtype=torch.uint8)
    made |= torch.randint(0, 2, made.shape, dtype=torch.uint8) << 7
    made[torch.rand(made.shape) < zeros] = 0
    return made.view(FP8)


def build(shape: Shape, zeros: float) -> tuple[dict[str, Call], float]:
    """Both ways on the same weights, and how much smaller ours are."""
    w13 = random_weights(shape.experts, 2 * shape.width, shape.hidden, zeros)
    w2 = random_weights(shape.experts, shape.hidden, shape.width, zeros)
    s13, s2 = (
        torch.rand(len(w), w.shape[1] // SCALED, w.shape[2] // SCALED) * 1e-4 + 1e-4
        for w in (w13, w2)
    )
    ups, downs = ours(w13, s13, 2), ours(w2, s2, 1)
    packed = [torch.ops._C.convert_weight_packed(w) for w in (w13, w2)]

    def stock(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        fused_experts_cpu(
            *(out, x, *packed, weights, ids, CPUQuantMethod.FP8_W8A16, s13, s2),
            *(None, None, [SCALED, SCALED], None, None, None, None, True),
        )
        return out

    def own(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return cpu_library.fused_moe(
            x, weights, ids, None, ups, downs, shape.width, at_level=level(True)
        )

    smaller = (w13.nbytes + w2.nbytes) / (ups.nbytes + downs.nbytes)
    return {"ours": own, "vLLM": stock}, smaller


def ours(weights: Tensor, scales: Tensor, count: int) -> Blocks:
    """Blocks; gate and up are the halves of one matrix."""
    rows, cols = SCALED // blocks.BLOCK, SCALED // blocks.STEP
    wide = scales.repeat_interleave(rows, 1).repeat_interleave(cols, 2)
    return blocks.join(
        [
            cpu_encode.encode(list(weight.chunk(count)), list(scale.chunk(count)))
            for weight, scale in zip(weights, wide, strict=True)
        ]
    )


def measure(
    shape: Shape, ways: dict[str, Call], count: int, seconds: float
) -> dict[str, object]:
    """Milliseconds of each way, which take turns, and how far they are apart."""
    x = torch.randn(count, shape.hidden).bfloat16()
    weights = torch.rand(count, shape.top_k)
    taken, routed = in_turns(shape, ways, x, weights, seconds)
    mine, theirs = (call(x, weights, routed[-1]).float() for call in ways.values())
    return {
        "tokens": count,
        "rounds": len(routed) - 1,
        "ms": {name: round(1e3 * value, 3) for name, value in taken.items()},
        "against_vllm": round(taken["vLLM"] / taken["ours"], 2),
        "apart": round(float((mine - theirs).abs().max() / theirs.abs().max()), 4),
    }


if __name__ == "__main__":
    main()
