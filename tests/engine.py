"""Real vLLM engines, and what they say about a fixed text. V vocabulary, T tokens."""

import gc
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
VOCAB = 128
IDS = [1, *torch.randint(3, VOCAB, (47,), generator=torch.Generator().manual_seed(3))]
TOKENS = [int(token) for token in IDS]
ROUNDING = 2e-4
"""Largest log-probability difference in float32; 6e-5 was the most ever seen."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
COUNTING = {
    "additional_config": {"moe_prune_load": True},
    "worker_extension_cls": "vllm_moe_prune.plugin.routing_load.RoutingLoad",
}
Loads = dict[int, list[int]]
"""Layer -> routed slots of each expert."""
# vLLM starts workers by importing the main script again: it must be a file of its own.
ENGINES = """
import torch
from tests.engine import served
if __name__ == "__main__":
    for out, model in {models}.items():
        loads = {{}}
        found = served(model, loads, tensor_parallel_size=2, **{options})
        torch.save((found, loads), out)
"""


def served(model: Path | str, loads: Loads | None = None, **options: Any) -> Tensor:
    """Log-probabilities [T, V] from a vLLM engine, which is gone afterwards.

    Args:
        model: A checkpoint.
        loads: Filled with how many tokens were routed where; None: nothing counts.
        options: Of the engine.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 2,
        "max_logprobs": -1,
        "skip_tokenizer_init": True,
    }
    if loads is not None:
        engine |= COUNTING
    llm = LLM(str(model), **(engine | options))
    try:
        if loads is not None:
            assert all(llm.collective_rpc("moe_prune_start_load"))
        (output,) = llm.generate(
            [{"prompt_token_ids": TOKENS}],
            SamplingParams(
                max_tokens=1, logprobs=-1, prompt_logprobs=-1, detokenize=False
            ),
            use_tqdm=False,
        )
        if loads is not None:
            loads |= read_loads(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    rows_TV = torch.full((len(TOKENS), VOCAB), math.nan, dtype=torch.float64)
    found = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    for row_V, tokens in zip(rows_TV, found, strict=True):
        for token, entry in tokens.items():
            row_V[token] = entry.logprob
    return rows_TV


def read_loads(llm: Any) -> Loads:
    """What an engine has counted; each layer comes from one process only."""
    loads: Loads = {}
    for worker in llm.collective_rpc("moe_prune_read_load"):
        for layer, counts in worker or ():
            assert layer not in loads
            loads[layer] = counts
    return loads


def assert_same(found_TV: Tensor, expected_TV: Tensor) -> None:
    """Equal but for rounding in float32."""
    assert (found_TV - expected_TV).abs().max().item() <= ROUNDING


def in_two_processes(
    folder: Path,
    models: Mapping[Path, Path],
    options: Mapping[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Save what engines of two workers say and count, one model after the other.

    Args:
        folder: For the script.
        models: File to write -> checkpoint.
        options: Of every engine.
        monkeypatch: For the environment.
    """
    script = folder / "engines.py"
    named = {str(out): str(model) for out, model in models.items()}
    script.write_text(ENGINES.format(models=named, options=dict(options)))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
