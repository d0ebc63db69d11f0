"""What does counting routed tokens cost while decoding?

    python bench/routing_load.py [--quick] [--json FILE] [--rounds 30] [--new 32]

Claim: below 2 % of decode time when on, nothing when off. One engine of each model
(bf16, eager, in this process) decodes in turns with and without counting: the same
memory, seconds apart. Times are CPU time of the process, with one thread for the model,
so that others on the machine are not measured. Beside the difference of the medians the
time of the counting itself is given: the op called as routers call it, as often as a
step has layers with experts, as a share of the step. When off, no code of it is loaded.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from server import VLLM

from vllm_moe_prune.plugin.watch.switch import EXTENSION, SWITCH

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = VLLM | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
COUNTING = {"additional_config": {SWITCH: True}, "worker_extension_cls": EXTENSION}
CALLS = 2000
clock = time.process_time


def main() -> None:
    """Measure each model, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the demo model only")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--new", type=int, default=32, help="tokens per request")
    options = parser.parse_args()
    core = min(os.sched_getaffinity(0))
    os.environ |= ENVIRONMENT | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
    }
    from synthetic import write_mixtral

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        models = {"demo-mixtral": EXAMPLES / "demo-mixtral"}
        if not options.quick:
            models["8 x 1024 x 3584"] = write_mixtral(
                Path(temporary) / "mixtral",
                layers=8,
                hidden=1024,
                width=3584,
                experts=8,
            )
        for name, folder in models.items():
            rows += measure(name, folder, options.rounds, options.new)
    show(rows)
    if options.json:
        figures = {
            "cpus": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
            "rounds": options.rounds,
            "rows": rows,
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def measure(name: str, folder: Path, rounds: int, new: int) -> list[dict[str, Any]]:
    """Rows for batches of 1 and 16."""
    from vllm import LLM

    llm = LLM(
        str(folder),
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=16,
        skip_tokenizer_init=True,
        **COUNTING,
    )
    llm.collective_rpc("moe_prune_start_load")
    worker = llm.llm_engine.model_executor.driver_worker.worker
    runners = [m for m in worker.get_model().modules() if hasattr(m, "routing_load")]
    rows = []
    for batch in (1, 16):
        times: dict[bool, list[float]] = {False: [], True: []}
        decode(llm, batch, new)
        for index in range(2 * rounds):
            on = index % 4 in (1, 2)  # off on on off: drift cancels out
            for runner in runners:
                runner.router.set_capture_fn(runner.count if on else None)
            times[on].append(decode(llm, batch, new))
        off_s, on_s = (statistics.median(times[on]) / new for on in (False, True))
        op_s = len(runners) * op_time(runners[0], batch)
        rows.append(
            {
                "model": name,
                "layers": len(runners),
                "batch": batch,
                "off_ms": round(off_s * 1e3, 3),
                "on_ms": round(on_s * 1e3, 3),
                "difference_percent": round((on_s / off_s - 1) * 100, 2),
                "counting_ms": round(op_s * 1e3, 4),
                "counting_percent": round(op_s / off_s * 100, 2),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    llm.llm_engine.engine_core.shutdown()
    return rows


def decode(llm: Any, batch: int, new: int) -> float:
    """CPU seconds for some requests of a few tokens' prompt."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=new, ignore_eos=True, temperature=0, detokenize=False
    )
    prompts = [{"prompt_token_ids": [5, 6, 7 + seed]} for seed in range(batch)]
    start = clock()
    llm.generate(prompts, params, use_tqdm=False)
    return clock() - start


def op_time(runner: Any, batch: int) -> float:
    """CPU seconds of one call, as vLLM's router makes it during a forward pass."""
    import torch
    from vllm.forward_context import ForwardContext, override_forward_context

    experts = len(runner.routing_load) - 1
    top_k = runner.moe_config.experts_per_token
    ids = torch.randint(0, experts, (batch, top_k), dtype=torch.int32)
    context = ForwardContext(
        no_compile_layers={},
        attn_metadata={},
        slot_mapping={"layer": torch.arange(batch)},
    )
    with override_forward_context(context):
        for _ in range(CALLS // 10):
            runner.count(ids)
        start = clock()
        for _ in range(CALLS):
            runner.count(ids)
        return (clock() - start) / CALLS


def show(rows: list[dict[str, Any]]) -> None:
    """A Markdown table."""
    print("\n| model | batch | step off ms | on ms | difference | counting alone |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['model']} | {row['batch']} | {row['off_ms']} | {row['on_ms']} | "
            f"{row['difference_percent']} % | {row['counting_ms']} ms, "
            f"{row['counting_percent']} % |"
        )


if __name__ == "__main__":
    main()
