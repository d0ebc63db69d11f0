"""Does training after a cut pay? Perplexity per domain before and after each method.

    .venv/bin/python bench/recover.py examples/demo-mixtral --work /tmp/recover \
        --json bench/results/recover.json

Half of the experts of every layer leave by STUN; then routers are distilled, adapters
trained, everything trained, on `examples/calibration.txt`. Perplexity is measured on
`examples/heldout`, of which no document is in that text. The control trains the model
that was not cut in the same way: what that gains is the text's doing, not recovery.
Rows that the JSON file has already are not made again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.perplexity import perplexity
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.recipes.flags import with_overrides
from vllm_moe_prune.recipes.loading import load_recipe
from vllm_moe_prune.recipes.schema import Calibration
from vllm_moe_prune.recover.options import training

EXAMPLES = Path(__file__).parent.parent / "examples"
DOMAINS = ("arithmetic", "chat", "licence", "prose", "python")
LENGTH = 256
# Name, what is trained, method, and more of ``training``.
ROWS: tuple[tuple[str, str, str | None, dict[str, Any]], ...] = (
    ("dense", "dense", None, {}),
    ("half of the experts", "cut", None, {}),
    ("router", "cut", "router", {}),
    ("lora, attention", "cut", "lora", {"learning_rate": 2e-3}),
    (
        "lora, attention and experts",
        "cut",
        "lora",
        {"learning_rate": 2e-3, "targets": "attention,experts"},
    ),
    ("full", "cut", "full", {"learning_rate": 3e-4}),
    ("dense, full (control)", "dense", "full", {"learning_rate": 3e-4}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="for checkpoints")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--only", help="the row of this name")
    given = parser.parse_args()
    text = Calibration(
        source=str(EXAMPLES / "calibration.txt"), samples=256, sequence_length=LENGTH
    )
    folders = {"dense": given.model, "cut": given.work / "cut"}
    if not folders["cut"].is_dir():
        prune(given.model, folders["cut"])
    result: dict[str, Any] = {
        "model": given.model.name,
        "steps": given.steps,
        "max_tokens_per_domain": given.max_tokens,
        "rows": {},
    }
    if given.json.is_file():
        result = json.loads(given.json.read_text())
    rows = result["rows"]
    for name, what, method, options in ROWS:
        if name in rows or given.only not in (None, name):
            continue
        folder, row = folders[what], {}
        if method is not None:
            began = time.monotonic()
            checkpoint = open_checkpoint(folder)
            asked = training(checkpoint.arch, method, steps=given.steps, **options)
            folder = given.work / name.replace(" ", "-")
            original = open_checkpoint(given.model) if method == "router" else None
            done = pipeline.recover(
                checkpoint,
                original,
                folder,
                asked,
                text,
                pipeline.RunOptions(resume=True, overwrite=True),
            )
            row = {
                "learning_rate": asked.learning_rate,
                "parameters": done.parameters,
                "elapsed_s": round(time.monotonic() - began, 1),
            }
        row["perplexity"] = {
            domain: round(value_of(folder, domain, given.max_tokens), 3)
            for domain in DOMAINS
        }
        rows[name] = row
        given.json.write_text(json.dumps(result, indent=2) + "\n")
        print(name, row, flush=True)
    print_table(rows)


def prune(model: Path, out: Path) -> None:
    """Half of the experts of every layer, no zeros."""
    flags = {
        "keep": open_checkpoint(model).layers[0].num_experts // 2,
        "budget": "per-layer",
        "slim": "none",
        "calibration": str(EXAMPLES / "calibration.txt"),
        "samples": 64,
        "sequence_length": LENGTH,
    }
    recipe = with_overrides(load_recipe("stun40-paper"), flags)
    pipeline.run(open_checkpoint(model), recipe, out, pipeline.RunOptions())


def value_of(folder: Path, domain: str, max_tokens: int) -> float:
    text = EXAMPLES / "heldout" / f"{domain}.txt"
    return perplexity(
        open_checkpoint(folder),
        str(text),
        sequence_length=LENGTH,
        max_tokens=max_tokens,
    ).perplexity


def print_table(rows: dict[str, Any]) -> None:
    print(f"| | {' | '.join(DOMAINS)} |")
    print("|---" * (len(DOMAINS) + 1) + "|")
    for name, row in rows.items():
        values = " | ".join(f"{row['perplexity'][domain]:.2f}" for domain in DOMAINS)
        print(f"| {name} | {values} |")


if __name__ == "__main__":
    main()
