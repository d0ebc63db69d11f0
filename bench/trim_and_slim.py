"""Trimming, 4-bit weights and both, on a demo model: Demystifying's Table 3.

    python bench/trim_and_slim.py examples/demo-mixtral [--markdown FILE] [--json FILE]

Base, AWQ, and Expert, Layer and Block Drop, each alone and with AWQ, in both orders:
T+S trims and then quantizes in one run, S+T trims a checkpoint that AWQ has made. Every
row is a checkpoint that was written, opened again and judged: perplexity over five
held-out domains and sums of which the answer counts, with standard errors (over
windows, and over sums). FLOPs are those of one prompt of 2048 tokens.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quality import DOMAINS, EXAMPLES, NO_EXPERTS, NO_ZEROS, SUMS, losses_as_is, texts

from vllm_moe_prune import pipeline
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.losses import Loss, Text
from vllm_moe_prune.recipes.schema import parse_recipe
from vllm_moe_prune.tune.recommend import costs_as_is

AWQ = {"quantize": {"method": "awq", "weights": "int4"}}
EXPERT_DROP = {"method": "score", "criterion": "routing-score", "drop": 0.25}


def trimmings(layers: int) -> dict[str, dict[str, Any]]:
    """What leaves, by the name of the paper's rows: 2/8, 8/32 and 5/32, scaled."""
    sublayers, blocks = max(1, layers // 4), max(1, round(layers * 5 / 32))
    return {
        "Expert Drop 25 %": {"experts": {**EXPERT_DROP, "budget": "per-layer"}},
        f"Layer Drop {sublayers} of {layers}": {
            **NO_EXPERTS,
            "layers": {"moe_count": sublayers},
        },
        f"Block Drop {blocks} of {layers}": {
            **NO_EXPERTS,
            "layers": {"block_count": blocks},
        },
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24, help="of each domain")
    parser.add_argument("--keep", type=Path, help="leave the checkpoints here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        table = list(rows(args, work))
    print(markdown(table))
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    if args.markdown:
        args.markdown.write_text(markdown(table), "utf-8")


def rows(args: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Every row of the table, as it is found."""
    original = open_checkpoint(args.model)
    base = judge("base", original, args)
    yield base
    awq = make(original, {**NO_EXPERTS, **AWQ}, work / "awq", args)
    yield judge("AWQ", awq, args, base)
    for name, trim in trimmings(len(original.decoder_layers)).items():
        slug = name.split()[0].lower()
        trimmed = make(original, trim, work / slug, args)
        yield judge(name, trimmed, args, base)
        both = make(original, {**trim, **AWQ}, work / f"{slug}-awq", args)
        yield judge(f"{name} + AWQ (T+S)", both, args, base)
        other = make(awq, trim, work / f"awq-{slug}", args)
        yield judge(f"AWQ + {name} (S+T)", other, args, base)


def make(
    checkpoint: Checkpoint, data: dict[str, Any], out: Path, args: argparse.Namespace
) -> Checkpoint:
    """Run a recipe."""
    calibration = {
        "source": str(EXAMPLES / "calibration.txt"),
        "samples": args.samples,
        "sequence_length": args.length,
    }
    recipe = parse_recipe({"calibration": calibration, **NO_ZEROS, **data}, out.name)
    pipeline.run(checkpoint, recipe, out, pipeline.RunOptions(overwrite=True))
    return open_checkpoint(out)


def judge(
    name: str,
    checkpoint: Checkpoint,
    args: argparse.Namespace,
    base: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Losses of a checkpoint as it lies on the disk, and its sizes."""
    *domains, sums = texts(checkpoint, args.windows, args.length)
    windows = [Text(row[None]) for text in domains for row in text.ids_ST]
    *nll, right = losses_as_is(checkpoint, [*windows, sums])
    mean, error = over_windows(nll)
    share = right.exact / SUMS
    costs = costs_as_is(checkpoint)
    found = {
        "name": name,
        "weight_bytes": costs.weight_bytes,
        "flops": costs.flops,
        "decode_bytes": costs.decode_bytes,
        "perplexity": math.exp(mean),
        "perplexity_se": math.exp(mean) * error,
        "sums": share,
        "sums_se": math.sqrt(share * (1 - share) / SUMS),
    }
    # Of the original's likelihood per token: 1 / 1.1 where perplexity is a tenth up.
    found["recovery"] = (base or found)["perplexity"] / found["perplexity"]
    print(name, found, file=sys.stderr)
    return found


def over_windows(losses: list[Loss]) -> tuple[float, float]:
    """Mean loss in nats of windows of equal length, and its standard error.

    Domains are strata: windows differ between them by design, not by chance.
    """
    means = [loss.mean for loss in losses]
    each = len(means) // len(DOMAINS)
    strata = [means[at : at + each] for at in range(0, len(means), each)]
    variance = sum(statistics.variance(one) / each for one in strata)
    return statistics.fmean(means), math.sqrt(variance) / len(strata)


def markdown(table: list[dict[str, Any]]) -> str:
    """The table of docs/results/index.md."""
    heads = ("", "weights", "FLOPs", "bytes per decoded token", "perplexity", "kept")
    lines = ["| " + " | ".join([*heads, "sums right"]) + " |"]
    lines.append("|---|" + "---:|" * len(heads))
    for row in table:
        cells = [row["name"], f"{row['weight_bytes'] / 1e6:.2f} MB"]
        cells += [f"{row['flops'] / 1e9:.2f} G", f"{row['decode_bytes'] / 1e6:.2f} MB"]
        cells.append(f"{row['perplexity']:.2f} ± {row['perplexity_se']:.2f}")
        cells.append(f"{row['recovery']:.1%}")
        cells.append(f"{row['sums']:.1%} ± {row['sums_se']:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
