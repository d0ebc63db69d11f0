"""Where the time of a decode step goes, in the engine, on a CPU.

    python bench/decode_profile.py FOLDER [--streams 1 4 16] [--tokens 48] [--compiled]

An engine in this process; what is timed is wrapped here, in the bench: the scheduler,
the worker's forward (whole, and eagerly by kind of layer), the head, sampling. Wrapped
parts contain each other: numbers in front say how deep. Milliseconds of a step,
medians. ``--compiled``: with torch.compile as `vllm serve` starts by itself, where
kinds of layers cannot be told apart.
"""

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from server import VLLM

PROMPT = 64
spent: dict[str, float] = defaultdict(float)
"""Seconds of the step that is running, by what took them."""


def main() -> None:
    """Start the engine, wrap it, decode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    # One process: what is wrapped here is what runs.
    os.environ.update(VLLM | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    from vllm import LLM

    llm = LLM(
        str(options.folder),
        enforce_eager=not options.compiled,
        max_model_len=256,
        max_num_seqs=16,
        skip_tokenizer_init=True,
    )
    wrap(llm, by_layer=not options.compiled)
    for streams in options.streams:
        steps = decode(llm, streams, options.tokens)
        names = sorted({name for step in steps for name in step})
        middle = {
            name: 1e3 * statistics.median(step.get(name, 0.0) for step in steps)
            for name in names
        }
        print(f"{streams} streams, ms of a step:")
        for name, each in middle.items():
            print(f"  {name:<28} {each:7.2f}")


def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, adding its time."""

    @wraps(call)
    def run(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*given, **named)
        finally:
            spent[name] += time.perf_counter() - start

    return run


def wrap(llm: Any, *, by_layer: bool) -> None:
    """Time the engine's parts."""
    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    for name in ("schedule", "update_from_output"):
        wrapped = timed(f"1 scheduler.{name}", getattr(core.scheduler, name))
        setattr(core.scheduler, name, wrapped)
    for name, title in (
        ("execute_model", "2 worker.execute_model"),
        ("sample_tokens", "5 worker.sample_tokens"),
    ):
        if hasattr(core.model_executor, name):
            called = getattr(core.model_executor, name)
            setattr(core.model_executor, name, timed(title, called))
    runner._update_states = timed("3 update states", runner._update_states)
    runner._prepare_inputs = timed("3 prepare inputs", runner._prepare_inputs)
    runner.sampler.forward = timed("6 sampler", runner.sampler.forward)
    model = runner.model
    model.compute_logits = timed("4 head", model.compute_logits)
    forward = model.forward
    model.forward = timed("4 forward", forward)
    if not by_layer:
        return
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        known = {
            "self_attn": "  attention, whole",
            "qkv_proj": "    attention: qkv",
            "attn": "    attention: scores",
            "o_proj": "    attention: out",
            "block_sparse_moe": "  MoE, whole",
            "gate": "    MoE: router",
            "experts": "    MoE: experts and routing",
            "input_layernorm": "  norms",
            "post_attention_layernorm": "  norms",
        }
        if title := known.get(kind):
            module.forward = timed(f"4 {title}", module.forward)


def decode(llm: Any, streams: int, tokens: int) -> list[dict[str, float]]:
    """Times of every step but the first few."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(
        max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False
    )
    for stream in range(streams):
        ids = [3 + (7 * stream + 11 * at) % 900 for at in range(PROMPT)]
        engine.add_request(f"{streams}-{stream}", {"prompt_token_ids": ids}, params)
    steps = []
    while engine.has_unfinished_requests():
        spent.clear()
        start = time.perf_counter()
        engine.step()
        steps.append(dict(spent) | {"0 step": time.perf_counter() - start})
    return steps[8:-2]


if __name__ == "__main__":
    main()
