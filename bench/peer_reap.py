"""REAP by llm-compressor and by this tool, side by side: same tokens, same judge.

    python3 -m venv PEER && PEER/bin/pip install llmcompressor==0.14.0.1
    .venv/bin/python bench/peer_reap.py examples/demo-mixtral --peer PEER/bin/python

llm-compressor needs other versions than vLLM, hence an environment of its own. Both get
the same calibration windows and take the same number of experts from each layer. Its
output is opened and judged as any checkpoint, on the windows of ``bench/quality.py``.
It calibrates a layer behind those it has already pruned; this tool decides everything
on the original model, so the layers behind the first need not choose alike.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quality import (
    BUDGETS,
    EXAMPLES,
    NO_ZEROS,
    losses_as_is,
    search_text,
    summary,
    texts,
)
from safetensors.torch import save_file

from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.data import Tokens, load_heldout, load_tokens
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.decide.cut_plan import CutPlan
from vllm_moe_prune.decide.required_stats import needed_statistics
from vllm_moe_prune.recipes.schema import parse_recipe
from vllm_moe_prune.stages.measure import collect
from vllm_moe_prune.stages.plan import plan
from vllm_moe_prune.stages.probe import with_sensitivity

PEER = """
import sys, time
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, tokens, sparsity, out, report = sys.argv[1:]
ids = load_file(tokens)["ids"].tolist()
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
rows = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
start = time.monotonic()
oneshot(
    model=model,
    dataset=Dataset.from_dict(rows),
    recipe=REAPPruningModifier(sparsity=float(sparsity), report_path=report),
    max_seq_length=len(ids[0]),
    num_calibration_samples=len(ids),
    shuffle_calibration_samples=False,
    moe_calibrate_all_experts=False,
    output_dir=out,
)
print("seconds", time.monotonic() - start)
"""


def main() -> None:
    """One table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--peer", type=Path, required=True, help="its interpreter")
    parser.add_argument("--drops", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=6, help="of each domain")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    found = []
    for folder in args.model:
        for row in rows(folder, args):
            found.append(row)
            shown = {key: value for key, value in row.items() if key != "costs"}
            print(*(f"{key} {value}" for key, value in shown.items()), sep="  ")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def rows(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The original, and each way of dropping so many experts."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        checkpoint = open_checkpoint(folder)
        search = work / "search.txt"
        search.write_text(search_text(checkpoint), "utf-8")
        calibration = {
            "source": str(EXAMPLES / "calibration.txt"),
            "samples": args.samples,
            "sequence_length": args.length,
            "heldout": args.samples,
            "heldout_source": str(search),
        }
        recipe = parse_recipe({"calibration": calibration}, "tokens")
        tokens = load_tokens(checkpoint, recipe.calibration)
        yield row(folder, "original", 0.0, judge(checkpoint, args))
        for drop in args.drops:
            yield by_peer(folder, drop, tokens, work / f"{drop:g}", args)
            for budget in BUDGETS:
                start = time.monotonic()
                plan_ = by_us(checkpoint, drop, budget, calibration, tokens)
                seconds = time.monotonic() - start
                out = work / f"{drop:g}-{budget}"
                pipeline.cut(checkpoint, plan_, out, pipeline.RunOptions())
                costs = judge(open_checkpoint(out), args)
                kept = {one.layer: list(one.keep) for one in plan_.layers}
                yield row(folder, f"this tool, {budget}", drop, costs, seconds, kept)


def by_peer(
    folder: Path, drop: float, tokens: Tokens, work: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """llm-compressor's own run, and what its checkpoint costs."""
    work.mkdir()
    save_file({"ids": tokens.ids_ST}, work / "ids.safetensors")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [str(args.peer), "-c", PEER, str(folder), str(work / "ids.safetensors")]
    command += [str(drop), str(work / "out"), str(work / "kept.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {
            "model": folder.name,
            "way": "llm-compressor",
            "drop": drop,
            "refused": done.stderr.strip().splitlines()[-1],
        }
    seconds = float(done.stdout.rpartition("seconds")[2])
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    kept = json.loads((work / "kept.json").read_text("utf-8"))
    numbered = {int(name.split(".")[2]): kept[name] for name in kept}
    note = mend(work / "out" / "config.json", len(next(iter(kept.values()))))
    costs = judge(open_checkpoint(work / "out"), args)
    found = row(folder, "llm-compressor", drop, costs, seconds, numbered)
    return {**found, "cpu_s": round(cpu, 1), "note": note}


def mend(path: Path, experts: int) -> str:
    """Let the configuration say how many experts there are, and say if it did not."""
    config = json.loads(path.read_text("utf-8"))
    if config.get("n_routed_experts") in (None, experts):
        return ""
    note = f"config.json says {config['n_routed_experts']} experts, has {experts}"
    path.write_text(json.dumps(config | {"n_routed_experts": experts}), "utf-8")
    return note


def by_us(
    checkpoint: Checkpoint,
    drop: float,
    budget: str,
    calibration: dict[str, Any],
    tokens: Tokens,
) -> CutPlan:
    """REAP with one of our budgets."""
    stage = {"method": "score", "criterion": "reap", "drop": drop, "budget": budget}
    experts = {**stage, **BUDGETS[budget]}
    data = {"calibration": calibration, "experts": experts, **NO_ZEROS}
    recipe = parse_recipe(data, "reap")
    stats = collect(checkpoint, [recipe], tokens, pipeline.RunOptions())
    if "sensitivity_P2" in needed_statistics(recipe):
        heldout = load_heldout(checkpoint, recipe.calibration)
        model = StreamingModel(checkpoint)
        stats = with_sensitivity(model, recipe, stats, heldout)
    return plan(checkpoint, recipe, stats)


def judge(checkpoint: Checkpoint, args: argparse.Namespace) -> dict[str, float]:
    """Perplexity per domain of a checkpoint as it lies on the disk."""
    return summary(
        losses_as_is(checkpoint, texts(checkpoint, args.windows, args.length))
    )


def row(
    folder: Path,
    way: str,
    drop: float,
    costs: dict[str, float],
    seconds: float = 0.0,
    kept: dict[int, list[int]] | None = None,
) -> dict[str, Any]:
    """One line of the table."""
    return {
        "model": folder.name,
        "way": way,
        "drop": drop,
        "perplexity": round(costs["all"], 3),
        "seconds": round(seconds, 1),
        "kept": kept,
        "costs": costs,
    }


if __name__ == "__main__":
    sys.exit(main())
