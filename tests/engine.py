"""Real vLLM engines, and what they say about a fixed text. V vocabulary, T tokens."""

import gc
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from tests.server import free_ports
from vllm_moe_prune.plugin.watch.switch import EXTENSION, SWITCH, merge

ROOT = Path(__file__).parents[1]
VOCAB = 128
IDS = [1, *torch.randint(3, VOCAB, (47,), generator=torch.Generator().manual_seed(3))]
TOKENS = [int(token) for token in IDS]
ROUNDING = 2e-4
"""Largest log-probability difference in float32; 6e-5 was the most ever seen."""
STOCK = "from tests.engine import run_stock; run_stock({!r})"
RANK = "from tests.engine import run_rank; run_rank({!r})"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
COUNTING = {"additional_config": {SWITCH: True}, "worker_extension_cls": EXTENSION}
Loads = dict[int, list[int]]
"""Layer -> routed slots of each expert."""


@dataclass(frozen=True)
class Job:
    """A model to be served by two ranks, and what they should say."""

    model: Path
    expected_TV: Tensor
    expected_loads: Loads
    options: Mapping[str, Any] = field(default_factory=dict)


def python_path(*first: Path) -> str:
    """For child processes: some folders, this project, and what was there before."""
    before = filter(None, [os.environ.get("PYTHONPATH")])
    return os.pathsep.join([*map(str, first), str(ROOT), *before])


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
        "num_gpu_blocks_override": 64,  # of the cache; else a gigabyte is zeroed
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
            loads |= merge(llm.collective_rpc("moe_prune_read_load"))
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        # What is left stays, and need not be looked through at every collection.
        gc.freeze()
    rows_TV = torch.full((len(TOKENS), VOCAB), math.nan, dtype=torch.float64)
    found = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    for row_V, tokens in zip(rows_TV, found, strict=True):
        for token, entry in tokens.items():
            row_V[token] = entry.logprob
    return rows_TV


def assert_same(found_TV: Tensor, expected_TV: Tensor) -> None:
    """Equal but for rounding in float32."""
    assert (found_TV - expected_TV).abs().max().item() <= ROUNDING


def served_by_stock(
    folder: Path,
    models: Mapping[str, Path],
    own: Mapping[str, Mapping[str, Any]] = {},
    **options: Any,
) -> dict[str, Tensor]:
    """Log-probabilities of some models by a vLLM that no plugin has touched.

    Args:
        folder: For what it finds and writes.
        models: Name -> checkpoint.
        own: Name -> options of this engine alone.
        options: Of all engines.
    """
    jobs = {
        name: (str(model), dict(own.get(name, {}))) for name, model in models.items()
    }
    out = folder / "stock.pt"
    environment = ENVIRONMENT | {
        "PYTHONPATH": python_path(),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_PLUGINS": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", STOCK.format((str(out), jobs, options))],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:]
    found: dict[str, Tensor] = torch.load(out)
    return found


def run_stock(
    job: tuple[str, Mapping[str, tuple[str, Mapping[str, Any]]], Mapping[str, Any]],
) -> None:
    """What that process does: file for what is found, models, options."""
    from vllm import ModelRegistry

    out, models, options = job
    found = {
        name: served(model, **options, **own) for name, (model, own) in models.items()
    }
    assert not any("MoePrune" in name for name in ModelRegistry.get_supported_archs())
    torch.save(found, out)


def check_two_ranks(folder: Path, jobs: Mapping[str, Job]) -> None:
    """Serve one model after the other by the same two processes; each must be right.

    vLLM's own executor would start three processes for each, for half a minute.

    Args:
        folder: For what they find and write.
        jobs: Name -> what to serve.
    """
    ports = free_ports(len(jobs))
    named = [
        (port, str(folder / f"{name}.pt"), str(job.model), dict(job.options))
        for port, (name, job) in zip(ports, jobs.items(), strict=True)
    ]
    everyone = {
        **os.environ,
        **ENVIRONMENT,
        "PYTHONPATH": python_path(),
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "WORLD_SIZE": "2",
    }
    ranks, logs = [], []
    for rank in ("0", "1"):
        logs.append(folder / f"rank-{rank}.txt")
        with logs[-1].open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-c", RANK.format(named)],
                    env=everyone | {"RANK": rank, "LOCAL_RANK": rank},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        # One that fails leaves the other waiting for it.
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.2)
        for rank, log in zip(ranks, logs, strict=True):
            assert not rank.poll(), log.read_text("utf-8")[-8000:]
        for rank, log in zip(ranks, logs, strict=True):
            assert rank.wait(60) == 0, log.read_text("utf-8")[-8000:]
    finally:
        for rank in ranks:
            rank.kill()
        # vLLM's workers leave it to the end of their process, which is cut short.
        for port in ports:
            for left in Path("/dev/shm").glob(f"{port}-*"):
                left.unlink()
    for name, job in jobs.items():
        found_TV, loads = torch.load(folder / f"{name}.pt")
        difference = (found_TV - job.expected_TV).abs().max().item()
        assert difference <= ROUNDING, f"{name}: {difference}"
        assert loads == job.expected_loads, name


def run_rank(jobs: Sequence[tuple[int, str, str, Mapping[str, Any]]]) -> NoReturn:
    """What one of the processes does.

    Args:
        jobs: Port to meet at, file for what is found, model, options of the engine.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    rank, code = int(os.environ["RANK"]), 1
    try:
        for port, out, model, options in jobs:
            # By the environment, all runs on a machine would share their memory.
            address = (f"tcp://127.0.0.1:{port}", rank, rank)
            ExecutorWithExternalLauncher._distributed_args = lambda _, a=address: a
            loads: Loads = {}
            found_TV = served(
                model,
                loads,
                tensor_parallel_size=2,
                distributed_executor_backend="external_launcher",
                **options,
            )
            if rank == 0:
                torch.save((found_TV, loads), out)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of vLLM would keep the process alive
