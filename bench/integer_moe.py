"""How fast are int4 experts, by our kernel, by vLLM's and by zentorch's?

    python bench/integer_moe.py [--quick] [--json FILE] [--shapes mixtral ...]
        [--tokens 1 ...] [--group 128] [--threads 2] [--no-amx]

One layer of random int4 weights (symmetric, a scale for so many inputs), in the shapes
of bench/sparse_moe.py. Beside each other, taking turns in the same run: our kernel,
with activations rounded to 8 bits (the default) and as they are; vLLM's (AMX only) and
zentorch's (if that package can be imported), which both round them; and vLLM's bf16
kernel on as many weights. Each row says how far a way is from the dequantized weights:
the largest error over the largest output. zentorch is installed as bench/sparse_moe.py
says.
"""

import contextlib
import json
from functools import partial
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from sparse_moe import (
    Call,
    Shape,
    arguments,
    describe_machine,
    in_turns,
    level,
    prepare,
    save,
    stock,
)
from torch import Tensor
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
    CPUQuantMethod,
    fused_experts_cpu,
    prepare_int4_moe_layer_for_cpu,
)

from vllm_moe_prune.kernels import cpu_library, int_blocks
from vllm_moe_prune.kernels.int_blocks import IntBlocks, Integers

TOKENS = (1, 4, 16, 64, 256)
Matrix = tuple[Tensor, Tensor]
"""Words [E, N, K / 8] and scales [E, N, G] in bf16."""


def main() -> None:
    """Measure and print one table per shape."""
    parser = arguments(__doc__, TOKENS)
    parser.add_argument("--group", type=int, default=128)
    options = parser.parse_args()
    shapes, amx = prepare(options)
    found = []
    for name, shape in shapes.items():
        about = {"shape": name, **vars(shape), "group": options.group}
        about["machine"] = describe_machine(options.threads, amx)
        print(f"\n{name}: {about}")
        ways, check = build(shape, options.group, amx)
        rows = []
        for count in options.tokens:
            rows.append(measure(shape, ways, check, count, options.seconds))
            print(json.dumps(rows[-1]), flush=True)
        found.append({**about, "rows": rows})
        if options.json:
            save(options.json, found)


def random_matrix(experts: int, rows: int, cols: int, group: int) -> Matrix:
    """Any words are int4 weights."""
    words = torch.randint(-(2**31), 2**31, (experts, rows, cols // 8))
    scales = (0.5 + torch.rand(experts, rows, cols // group)) * cols**-0.5 / 8
    return words.to(torch.int32), scales.bfloat16()


def build(shape: Shape, group: int, amx: bool) -> tuple[dict[str, Call], Call]:
    """The same weights as each way wants them, and what they stand for."""
    half = random_matrix(shape.experts, 2 * shape.width, shape.hidden, group)
    down = random_matrix(shape.experts, shape.hidden, shape.width, group)
    w13, w2 = ours(half, 2, group), ours(down, 1, group)
    at_level = level(amx)

    def own(dots: int, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return cpu_library.fused_moe(
            *(x, weights, ids, None, w13, w2, shape.width),
            dots=dots,
            at_level=at_level,
        )

    rounded = cpu_library.all_dots()[0]
    ways: dict[str, Call] = {
        "ours": partial(own, rounded),
        "ours, exact": partial(own, cpu_library.EXACT),
    }
    if amx:
        ways["vLLM int4"] = stock_int4(half, down)
    with contextlib.suppress(ImportError):
        ways["zentorch int4"] = zentorch_int4(half, down)
    ways["vLLM bf16"] = stock_bf16(shape, amx)

    def check(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros(x.shape)
        for token, row in enumerate(ids.tolist()):
            for slot, expert in enumerate(row):
                gate, up = int_blocks.decode(w13, expert, 2, (shape.width, x.shape[1]))
                (back,) = int_blocks.decode(w2, expert, 1, (x.shape[1], shape.width))
                given = x[token].float()
                inner = torch.nn.functional.silu(gate @ given) * (up @ given)
                out[token] += weights[token, slot] * (back @ inner)
        return out

    return ways, check


def ours(matrix: Matrix, count: int, group: int) -> IntBlocks:
    """Blocks; gate and up are the halves of one matrix."""
    experts = []
    for words, scales in zip(*matrix, strict=True):
        parts = zip(words.chunk(count), scales.chunk(count), strict=True)
        sources = [Integers(*part, None) for part in parts]
        experts.append(int_blocks.encode(sources, group, 4))
    return int_blocks.join(experts)


def stock_int4(half: Matrix, down: Matrix) -> Call:
    """vLLM's kernel for AMX, as its ``CPUExpertsInt4`` calls it."""
    turned = [part.transpose(1, 2).contiguous() for part in (*half, *down)]
    words13, scales13, words2, scales2 = turned
    w13, w2, s13, s2, z13, z2 = prepare_int4_moe_layer_for_cpu(
        words13, words2, scales13, scales2
    )

    def call(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        fused_experts_cpu(
            *(out, x, w13, w2, weights, ids, CPUQuantMethod.INT4_W4A8),
            *(s13, s2, z13, z2, None, None, None, None, None, True),
        )
        return out

    return call


def zentorch_int4(half: Matrix, down: Matrix) -> Call:
    """AMD's operator, as vLLM's ``ZentorchExpertsInt4`` calls it."""
    import zentorch  # noqa: F401

    repack = torch.ops.zentorch.zentorch_woq_repack_weight.default

    def packed(words: Tensor) -> Tensor:
        shape = torch.Size((words.shape[1], 8 * words.shape[2]))
        return torch.stack([repack(unpack_from_int32(w, 4, shape)) for w in words])

    w13, w2 = packed(half[0]), packed(down[0])
    s13, s2 = (part[1].transpose(1, 2).contiguous() for part in (half, down))

    def call(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops.zentorch.zentorch_fused_moe(
            *(out, x, w13, w2, None, None, weights, ids, False, "silu", s13, s2)
        )
        return out

    return call


def stock_bf16(shape: Shape, amx: bool) -> Call:
    """vLLM's kernel on as many dense weights; others, since only time counts."""
    w13, w2 = (
        torch.full((shape.experts, *size), 0.01, dtype=torch.bfloat16)
        for size in ((2 * shape.width, shape.hidden), (shape.hidden, shape.width))
    )
    return stock(w13, w2, amx)


def measure(
    shape: Shape, ways: dict[str, Call], check: Call, count: int, seconds: float
) -> dict[str, Any]:
    """Milliseconds of each way, which take turns, and how far off it is."""
    x = torch.randn(count, shape.hidden).bfloat16()
    weights = torch.rand(count, shape.top_k)
    taken, routed = in_turns(shape, ways, x, weights, seconds)
    row: dict[str, Any] = {"tokens": count, "rounds": len(routed) - 1}
    row["ms"] = {name: round(1e3 * value, 3) for name, value in taken.items()}
    others = [value for name, value in taken.items() if name.endswith("int4")]
    if others:
        row["against_fastest_int4"] = round(min(others) / taken["ours"], 2)
    row["against_bf16"] = round(taken["vLLM bf16"] / taken["ours"], 2)
    few = (x[:1], weights[:1], routed[-1][:1])
    expected = check(*few)
    row["error"] = {
        name: round(
            float((call(*few) - expected).abs().max() / expected.abs().max()), 4
        )
        for name, call in ways.items()
        if name != "vLLM bf16"
    }
    return row


if __name__ == "__main__":
    main()
