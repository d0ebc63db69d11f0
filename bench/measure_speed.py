"""Measuring against a plain transformers forward of the same tokens.

    python bench/measure_speed.py [--hidden 512 --width 1024 --experts 8 ...]

Prints a table; the model is random and in a temporary folder. The project's bound is
that measure and cut together stay below three plain forwards.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.data import Tokens, sha256_of
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.measure import measure
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.evaluate import run_layer


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    shape = {"layers": 4, "experts": 8, "hidden": 512, "width": 1024, "heads": 8}
    for name, default in {**shape, "samples": 32, "length": 512, "batch": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def best_s(work: Callable[[], object], repeats: int, device: str) -> float:
    """The shortest of some runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@torch.no_grad()
def plain_forward(folder: Path, tokens: Tokens, args: argparse.Namespace) -> float:
    """Seconds of the stock model, weights in memory, head included."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
    model = model.to(args.device).eval()
    batches = [batch.to(args.device) for batch in tokens.ids_ST.split(args.batch)]

    def work() -> None:
        for batch in batches:
            model(batch, use_cache=False)

    return best_s(work, args.repeats, args.device)


def stream(checkpoint: Checkpoint, tokens: Tokens, device: str) -> None:
    """The same by the streaming forward, weights read from the file."""
    model = StreamingModel(checkpoint, device)
    hidden_STD = model.embed(tokens.ids_ST)
    for index in range(model.num_layers):
        run_layer(model, index, hidden_STD)
    model.nll(hidden_STD, tokens.ids_ST)


def main() -> None:
    """Make the model, time everything, print the table."""
    args = options()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    shape = {name: getattr(args, name) for name in ("layers", "experts", "hidden")}
    with tempfile.TemporaryDirectory() as root:
        folder = tiny_checkpoint(
            Path(root) / "model",
            **shape,
            width=args.width,
            heads=args.heads,
            kv_heads=max(1, args.heads // 4),
            dtype=args.dtype,
            max_positions=args.length,
            tokenizer=False,
        )
        checkpoint = open_checkpoint(folder)
        generator = torch.Generator().manual_seed(0)
        size = (args.samples, args.length)
        ids_ST = torch.randint(3, 512, size, generator=generator)
        tokens = Tokens(ids_ST, "random", sha256_of(ids_ST))
        plain = plain_forward(folder, tokens, args)
        rows: dict[str, Callable[[], object]] = {
            "streaming forward": lambda: stream(checkpoint, tokens, args.device),
            "measure: router": lambda: measure(checkpoint, weights=False),
            "measure: router, weights": lambda: measure(checkpoint, device=args.device),
            "measure: all, with co-activation": lambda: measure(
                checkpoint, tokens=tokens, device=args.device
            ),
        }
        experts = checkpoint.expert_parameters / checkpoint.parameters
        print(
            f"{checkpoint.parameters / 1e6:.1f} M parameters, "
            f"{experts:.0%} of them in experts, {args.dtype}; "
            f"{ids_ST.numel()} tokens, {args.device}, "
            f"{torch.get_num_threads()} threads"
        )
        print(f"{'transformers forward':34} {plain:8.3f} s   1.00")
        for name, work in rows.items():
            taken = best_s(work, args.repeats, args.device)
            print(f"{name:34} {taken:8.3f} s  {taken / plain:5.2f}")


if __name__ == "__main__":
    main()
