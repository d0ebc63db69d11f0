"""How fast are our experts beside what a CPU user would pick instead?

    python bench/cpu_peers.py [--quick] [--json FILE] [--shapes mixtral ...]
        [--tokens 1 ...] [--threads 1 2] [--experts 4] [--realtime]

One layer's experts in the shapes of Mixtral-8x7B, DeepSeek-V2-Lite and Qwen3-30B-A3B,
fewer of them where they would not fit or take long to make (the row says how many).
Beside each other, taking turns in the same run: our int4 (groups of 32 and 128), int8
and bf16 with half zeros; llama.cpp's ``mul_mat_id`` in Q4_0, as llama.cpp lays it out
anew and as it is stored, and Q8_0; vLLM's bf16 kernel, and zentorch's int4 if that
package can be imported. Times are the least of all rounds: others only ever add to
them. Routing is random and new for every round; all experts have the same weights,
which lie in different memory. Rates are bytes of the weights that were used, over
those of the fastest reading in the same run (bench/read.c, and PyTorch's sum).

llama.cpp's library comes with ``pip install --no-deps --target PEERS
llama-cpp-python``: PYTHONPATH=PEERS, or GGML_LIB=FOLDER. --realtime asks for real-time
priority while calls are timed (root), for machines that others use.
"""

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ggml_experts
import torch
from ggml_experts import Q4_0, Q8_0, Ggml
from shapes import Shape
from sparse_moe import SMALL, Call, matrix, stock
from torch import Tensor

from vllm_moe_prune.kernels import blocks, cpu_encode, cpu_library, int_blocks
from vllm_moe_prune.kernels.int_blocks import IntBlocks, Integers
from vllm_moe_prune.plugin.compat import has_amx

SHAPES = {
    "mixtral": (Shape(4096, 14336, 4, 2), 8),
    "deepseek-v2-lite": (Shape(2048, 1408, 16, 6), 64),
    "qwen3-30b-a3b": (Shape(2048, 768, 32, 8), 128),
}
"""With how many experts the model has."""
TOKENS = (1, 2, 4, 8, 16, 64, 256)
READ_BYTES = 1 << 29
"""More than caches hold."""
Way = tuple[Call, int]
"""With the bytes of an expert."""


def main() -> None:
    """Measure and print a line per shape, number of threads and of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small layer")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--experts", type=int, help="another number of them")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=8, help="then two are enough")
    parser.add_argument("--ways", nargs="+", help="only those whose names begin so")
    parser.add_argument("--realtime", action="store_true")
    options = parser.parse_args()
    shapes = {name: SHAPES[name] for name in options.shapes}
    if options.quick:
        shapes, options.tokens = {"small": (SMALL, SMALL.experts)}, [1, 4, 16]
    found = []
    for name, (shape, whole) in shapes.items():
        if options.experts:
            shape = Shape(shape.hidden, shape.width, options.experts, shape.top_k)
        about = {"shape": name, **vars(shape), "of_experts": whole, **machine()}
        print(json.dumps(about), flush=True)
        ways = dict(all_ways(shape, options.ways))
        for threads in options.threads:
            torch.set_num_threads(threads)
            for call, _ in ways.values():
                if isinstance(call, Ggml):
                    call.set_threads(threads)
            for tokens in options.tokens:
                with realtime(options.realtime):
                    row = measure(shape, ways, threads, tokens, options)
                found.append({**about, **row})
                print(json.dumps(row), flush=True)
                if options.json:
                    text = json.dumps({"rows": found}, indent=1)
                    options.json.write_text(text + "\n", "utf-8")


def machine() -> dict[str, object]:
    """What the figures are measured on; the load tells who else is there."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    model = next(line for line in lines if line.startswith("model name"))
    dots = {bit: name for name, bit in cpu_library.DOTS.items()}
    return {
        "cpu": model.partition(":")[2].strip(),
        "cores": os.cpu_count(),
        "kernel": cpu_library.LEVELS[cpu_library.level()],
        "dots": dots[cpu_library.all_dots()[0]],
        "load_average": round(os.getloadavg()[0], 1),
    }


def all_ways(shape: Shape, asked: list[str] | None) -> Iterator[tuple[str, Way]]:
    """Every way of computing the layer that there is here."""

    def wanted(name: str) -> bool:
        return asked is None or any(name.startswith(one) for one in asked)

    folder = ggml_experts.find()
    if folder is None:
        print("llama.cpp's library was not found: see --help")
    for bits, kind, peer in ((4, Q4_0, "ggml Q4_0"), (8, Q8_0, "ggml Q8_0")):
        matrices = [random_matrix(bits, *size) for size in sizes(shape)]
        for group in (32, 128) if bits == 4 else (32,):
            name = f"ours int{bits}" + (f" g{group}" if bits == 4 else "")
            if wanted(name):
                yield name, ours(shape, matrices, bits, group)
        layouts = (True, False) if kind == Q4_0 else (False,)
        for repacked in layouts:
            name = peer + (" as stored" if kind == Q4_0 and not repacked else "")
            if folder is not None and wanted(name):
                yield name, peers(folder, shape, matrices, kind, repacked=repacked)
    if wanted("ours bf16"):
        yield "ours bf16 50 %", half_zeros(shape)
    if wanted("vLLM"):
        yield "vLLM bf16", dense(shape)
    with contextlib.suppress(ImportError):
        if wanted("zentorch"):
            yield "zentorch int4", zentorch(shape)


def sizes(shape: Shape) -> list[tuple[int, int]]:
    """Gate, up and down."""
    return [(shape.width, shape.hidden)] * 2 + [(shape.hidden, shape.width)]


def random_matrix(bits: int, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Integers and scales in fp16, one for 32."""
    low = -(1 << (bits - 1))
    values = torch.randint(low, -low, (rows, cols), dtype=torch.int8)
    scales = 0.5 + torch.rand(rows, cols // ggml_experts.GROUP)
    return values, (scales * cols**-0.5 * 2.0 ** (2 - bits)).half()


def words(values: Tensor, bits: int) -> Tensor:
    """As compressed-tensors packs them."""
    if bits == 8:
        return values.view(torch.int32)
    low, high = (values + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (low | (high << 4)).view(torch.int32)


def ours(shape: Shape, matrices: list[Any], bits: int, group: int) -> Way:
    """Our kernel with rounded tokens, which is the default."""
    # Of larger groups scales are others: only time counts then.
    every = group // ggml_experts.GROUP
    parts = [Integers(words(v, bits), s[:, ::every], None) for v, s in matrices]
    w13 = repeated(int_blocks.encode(parts[:2], group, bits), shape.experts)
    w2 = repeated(int_blocks.encode(parts[2:], group, bits), shape.experts)
    dots = cpu_library.all_dots()[0]

    def call(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return cpu_library.fused_moe(
            x, weights, ids, None, w13, w2, shape.width, dots=dots
        )

    return call, (w13.nbytes + w2.nbytes) // shape.experts


def repeated(one: IntBlocks, experts: int) -> IntBlocks:
    """Copies of an expert."""
    return int_blocks.join([one] * experts)


def peers(
    folder: Path, shape: Shape, matrices: list[Any], kind: int, *, repacked: bool
) -> Way:
    """llama.cpp's on the same weights."""
    stored = ggml_experts.q4_0 if kind == Q4_0 else ggml_experts.q8_0
    parts = [stored(values, scales) for values, scales in matrices]
    call = Ggml(folder, kind)
    call.load(*parts, experts=shape.experts, repacked=repacked)
    return call, sum(part.nbytes for part in parts)


def half_zeros(shape: Shape) -> Way:
    """Our kernel for bf16 that leaves zeros out."""
    gate, up, down = (matrix(*size, "0.5") for size in sizes(shape))
    w13 = blocks.join([cpu_encode.encode([gate, up])] * shape.experts)
    w2 = blocks.join([cpu_encode.encode([down])] * shape.experts)

    def call(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return cpu_library.fused_moe(x, weights, ids, None, w13, w2, shape.width)

    return call, (w13.nbytes + w2.nbytes) // shape.experts


def dense(shape: Shape) -> Way:
    """vLLM's kernel for bf16."""
    w13, w2 = (
        torch.full((shape.experts, *size), 0.01, dtype=torch.bfloat16)
        for size in ((2 * shape.width, shape.hidden), (shape.hidden, shape.width))
    )
    return stock(w13, w2, has_amx()), 3 * shape.width * shape.hidden * 2


def zentorch(shape: Shape) -> Way:
    """AMD's for int4 in groups of 128, which rounds tokens too."""
    import integer_moe

    half = integer_moe.random_matrix(shape.experts, 2 * shape.width, shape.hidden, 128)
    down = integer_moe.random_matrix(shape.experts, shape.hidden, shape.width, 128)
    held = sum(part.nbytes for part in (*half, *down)) // shape.experts
    return integer_moe.zentorch_int4(half, down), held


@contextlib.contextmanager
def realtime(asked: bool) -> Iterator[None]:
    """Real-time priority for all threads of this process."""

    def set_all(policy: int, priority: int) -> None:
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))

    if not asked:
        yield
        return
    set_all(os.SCHED_RR, 1)
    try:
        yield
    finally:
        set_all(os.SCHED_OTHER, 0)


def compiled_read() -> Callable[[Tensor, int], object]:
    """bench/read.c."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "read.so"
        source = Path(__file__).with_name("read.c")
        flags = ["-O3", "-mavx2", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, str(source), "-o", str(target)], check=True)
        read = ctypes.CDLL(str(target)).read_all
    read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    read.restype = ctypes.c_int64
    return lambda data, threads: read(data.data_ptr(), data.nbytes, threads)


READ_ALL = compiled_read()
# The kernel may give pages only when they are written.
READ = torch.ones(READ_BYTES // 4)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    shape: Shape,
    ways: dict[str, Way],
    threads: int,
    tokens: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The least milliseconds of each way, which take turns, and their rates."""
    x = torch.randn(tokens, shape.hidden).bfloat16()
    weights = torch.rand(tokens, shape.top_k)
    times: dict[str, list[float]] = {name: [] for name in ways}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    reading = []
    outs: dict[str, Tensor] = {}
    start = time.perf_counter()
    # The first round warms up and does not count.
    while len(reading) <= 2 * options.rounds:
        if len(reading) >= 6 and time.perf_counter() - start > options.seconds:
            break
        scores = torch.rand(tokens, shape.experts)
        ids = scores.topk(shape.top_k).indices.to(torch.int32)
        used = len(ids.unique())
        reading.append(timed(lambda: READ_ALL(READ, threads)))
        reading.append(timed(READ.sum))
        for name, (call, held) in ways.items():
            begin = time.perf_counter()
            outs[name] = call(x, weights, ids)
            times[name].append(time.perf_counter() - begin)
            rates[name].append(used * held / times[name][-1] / 1e9)
            if options.realtime:
                # At real-time priority nothing else runs on these cores meanwhile: the
                # kernel and whoever shares the machine get as long a turn after it.
                time.sleep(min(times[name][-1], 0.5))
    least = {name: min(found[1:]) for name, found in times.items()}
    read = READ_BYTES / min(reading[2:]) / 1e9
    row: dict[str, Any] = {"threads": threads, "tokens": tokens}
    row["rounds"] = len(reading) // 2 - 1
    row["ms"] = {name: round(1e3 * value, 3) for name, value in least.items()}
    row["read_gb_s"] = round(read, 1)
    row["of_read"] = {
        name: round(max(found[1:]) / read, 2) for name, found in rates.items()
    }
    row["against"] = against(least)
    if {"ours int4 g32", "ggml Q4_0"} <= outs.keys():
        theirs, own = outs["ggml Q4_0"], outs["ours int4 g32"].float()
        difference = (own - theirs).abs().max() / theirs.abs().max()
        row["difference"] = round(float(difference), 4)
    return row


def against(least: dict[str, float]) -> dict[str, float]:
    """How many times as fast as the fastest peer of as many bits each of ours is."""
    found = {}
    for name, value in least.items():
        kind = name.split()[1]
        bits = {"int4": ("Q4_0", "int4"), "int8": ("Q8_0",), "bf16": ("bf16",)}
        if not name.startswith("ours"):
            continue
        others = [
            seconds
            for other, seconds in least.items()
            if not other.startswith("ours") and other.split()[1] in bits[kind]
        ]
        if others:
            found[name] = round(min(others) / value, 2)
    return found


if __name__ == "__main__":
    main()
