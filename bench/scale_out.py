"""How much sooner are two ranks done than one, and what do they wait for and send?

    PYTHONPATH=. python bench/scale_out.py [--ranks 1 2] [--shrink 4] [--experts 64]
        [--moe-layers 2] [--windows 64] [--json FILE] [--keep-in FOLDER]

Writes a checkpoint of DeepSeek-V3's layers, each size divided by ``--shrink`` (1 is the
published shape; heads keep theirs), then for each number of ranks, each on one thread:
measures (REAP's scores), and cuts with Wanda and with SparseGPT, half of all expert
weights. Claim: two ranks are done in 1 / 1.7 of the time of one.

Wall time needs a core for each rank that nobody else uses. ``processor s`` does not:
the processor time of one rank, or of several between any two exchanges that of the
slowest.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.progress import peak_rss_bytes
from vllm_moe_prune.ranks.group import Ranks, joined
from vllm_moe_prune.recipes.schema import parse_recipe

JOBS: dict[str, dict[str, Any]] = {
    "measure": {
        "experts": {"method": "score", "criterion": "reap", "drop": 0.5},
        "slim": {"method": "none"},
    },
    "wanda": {
        "experts": {"method": "none"},
        "slim": {"method": "wanda", "sparsity": 0.5},
    },
    "sparsegpt": {
        "experts": {"method": "none"},
        "slim": {"method": "sparsegpt", "sparsity": 0.5},
    },
}
LENGTH = 256


@dataclasses.dataclass(frozen=True)
class Counted(Ranks):
    """Ranks that note every exchange."""

    log: list[tuple[float, float, int]] = dataclasses.field(default_factory=list)
    """Processor time up to its end, time in it, bytes sent."""

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        start = time.monotonic()
        found = super().broadcast(tensor, source)
        if self.watch is not None and tensor.numel():
            sent = tensor.nbytes * (self.size - 1) if source == self.rank else 0
            self.log.append((time.process_time(), time.monotonic() - start, sent))
        return found


def work(job: str, folder: Path, out: Path, windows: int) -> None:
    """One rank's part; what it took goes beside the output."""
    torch.set_num_threads(1)
    calibration = {
        **{"source": str(folder / "text.txt"), "samples": windows},
        "sequence_length": LENGTH,
    }
    recipe = parse_recipe({**JOBS[job], "calibration": calibration}, job)
    checkpoint = open_checkpoint(folder)
    StreamingModel(checkpoint)  # imports what a first layer would import
    with joined() as plain:
        ranks = Counted(plain.rank, plain.size, plain.watch)
        options = pipeline.RunOptions(ranks=ranks, max_shard_bytes=10**9)
        tokens = pipeline.calibration_tokens(checkpoint, recipe)
        ranks.wait()
        ranks.log.clear()
        start, processor = time.monotonic(), time.process_time()
        if job == "measure":
            pipeline.measure_into(out, checkpoint, recipe, tokens, options)
        else:
            decided = pipeline.plan(checkpoint, recipe, None)
            pipeline.cut(checkpoint, decided, out, options, tokens)
        found = {
            "wall_s": time.monotonic() - start,
            "processor": [*(at for at, _, _ in ranks.log), time.process_time()],
            "from": processor,
            "waited_s": sum(waited for _, waited, _ in ranks.log),
            "sent_bytes": sum(sent for _, _, sent in ranks.log),
            "peak_rss_bytes": peak_rss_bytes(),
        }
    path = out.with_name(f"{out.name}-{ranks.rank}.json")
    path.write_text(json.dumps(found), "utf-8")


def one(job: str, ranks: int, folder: Path, work_in: Path, windows: int) -> Any:
    """A job by so many ranks."""
    out = work_in / f"{job}-{ranks}"
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(ranks)]
    arguments = ["--worker", job, str(folder), str(out), "--windows", str(windows)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([*start, __file__, *arguments], env=environment, check=True)
    each = [
        json.loads(out.with_name(f"{out.name}-{rank}.json").read_text("utf-8"))
        for rank in range(ranks)
    ]
    if out.is_dir():
        shutil.rmtree(out)
    # All ranks meet in every exchange: between two of them the slowest counts.
    steps = zip(*(_steps(rank) for rank in each), strict=True)
    return {
        "job": job,
        "ranks": ranks,
        "wall_s": max(rank["wall_s"] for rank in each),
        "processor_s": sum(map(max, steps)),
        "waited_s": sum(rank["waited_s"] for rank in each) / ranks,
        "sent_bytes": sum(rank["sent_bytes"] for rank in each),
        "exchanges": len(each[0]["processor"]) - 1,
        "peak_rss_bytes": max(rank["peak_rss_bytes"] for rank in each),
    }


def _steps(rank: dict[str, Any]) -> list[float]:
    at = [rank["from"], *rank["processor"]]
    return [after - before for before, after in itertools.pairwise(at)]


def write_model(folder: Path, shrink: int, experts: int, moe_layers: int) -> Path:
    """DeepSeek-V3's layers: a dense one, then some with experts."""
    tiny_checkpoint(
        folder,
        model_type="deepseek_v3",
        layers=1 + moe_layers,
        experts=experts,
        top_k=8,
        hidden=7168 // shrink,
        width=2048 // shrink,
        heads=128 // shrink,
        n_shared_experts=1,
        intermediate_size=18432 // shrink,
        q_lora_rank=1536 // shrink,
        kv_lora_rank=512 // shrink,
        **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        **{"n_group": 8, "topk_group": 4, "num_nextn_predict_layers": 0},
        max_positions=4096,
    )
    tiny_text(folder, 8 * LENGTH * 1000)
    return folder


def show(found: list[dict[str, Any]], moe_layers: int) -> None:
    """Print the table."""
    print(
        f"{'':10} ranks   wall s  speed-up  processor s  speed-up  waiting s/layer  "
        "sent MiB/layer  peak MiB"
    )
    for one_of in found:
        alone = next(other for other in found if other["job"] == one_of["job"])
        wall, processor = (
            alone[key] / one_of[key] for key in ("wall_s", "processor_s")
        )
        print(
            f"{one_of['job']:10} {one_of['ranks']:5} {one_of['wall_s']:8.1f} "
            f"{wall:9.2f} {one_of['processor_s']:12.1f} {processor:9.2f} "
            f"{one_of['waited_s'] / (1 + moe_layers):16.2f} "
            f"{one_of['sent_bytes'] / (1 + moe_layers) / 2**20:15.1f} "
            f"{one_of['peak_rss_bytes'] / 2**20:9.0f}"
        )


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--shrink", type=int, default=4, help="1 is the real shape")
    parser.add_argument("--experts", type=int, default=64, help="V3 has 256")
    parser.add_argument("--moe-layers", type=int, default=2)
    parser.add_argument("--windows", type=int, default=64, help=f"of {LENGTH} tokens")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--keep-in", type=Path, help="work in this folder")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        job, folder, out = options.worker
        work(job, Path(folder), Path(out), options.windows)
        return
    with tempfile.TemporaryDirectory(dir=options.keep_in) as temporary:
        work_in = Path(temporary)
        folder = write_model(
            work_in / "model", options.shrink, options.experts, options.moe_layers
        )
        found = [
            one(job, ranks, folder, work_in, options.windows)
            for job in options.jobs
            for ranks in options.ranks
        ]
    show(found, options.moe_layers)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
