"""What any number of ranks has to write as one process does, recipe by recipe.

    torchrun --nproc-per-node 3 --standalone -m tests.several_ranks FOLDER OUT

runs every recipe on its model in FOLDER; so does plain Python, in one process. One
start for all of them: most of the time goes into importing.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate import expert_forward, memory
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.ranks.group import joined
from vllm_moe_prune.recipes.schema import parse_recipe

# 7 experts: no number of ranks divides them.
SIZES: dict[str, Any] = {"layers": 2, "experts": 7, "hidden": 64, "width": 64}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": SIZES,
    # All experts of a layer in one tensor, which several ranks then write.
    "packed": SIZES | {"layout": "mlp.packed"},
    "deepseek": {"model_type": "deepseek_v2", "layers": 3},
}
ALL = ["experts", "attention", "shared", "mlp"]
NONE: dict[str, Any] = {"experts": {"method": "none"}, "slim": {"method": "none"}}
REAP: dict[str, Any] = {"method": "score", "criterion": "reap", "keep": 5}
INT4 = {"weights": "int4", "group_size": 32, "zero_point": True}
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    # Nothing runs: router rows choose, weights are averaged and zeroed by size.
    "without-data": (
        "mixtral",
        {
            "experts": {
                **{"method": "stun", "coactivation_weight": 0, "keep": 4},
                "reconstruct": "always",
            },
            "slim": {"method": "magnitude", "sparsity": 0.5},
        },
    ),
    "wanda": (
        "deepseek",
        {
            "experts": {"method": "stun", "keep": 12, "reconstruct": "always"},
            "slim": {"method": "wanda", "sparsity": 0.5, "scope": ALL},
            "routing": "redirect",
        },
    ),
    # Experts are copied, so only what comes after them runs.
    "experts": ("mixtral", {"experts": REAP, "slim": {"method": "none"}}),
    "packed": ("packed", {"experts": REAP, "slim": {"sparsity": 0.5}}),
    "bitmask": (
        "mixtral",
        {
            "experts": {"method": "none"},
            "slim": {"method": "wanda", "sparsity": 0.6, "compensate": True},
            "storage": "bitmask",
        },
    ),
    "sparsegpt": (
        "mixtral",
        {
            "experts": {"method": "none"},
            "slim": {"method": "sparsegpt", "pattern": "2:4"},
        },
    ),
    "gptq": ("mixtral", NONE | {"quantize": INT4 | {"method": "gptq", "scope": ALL}}),
    "awq": ("deepseek", NONE | {"quantize": INT4 | {"method": "awq"}}),
    "narrowed": ("mixtral", NONE | {"narrow": {"share": 0.5}}),
    # The default of `run`: experts leave where they are missed least.
    "refit": (
        "mixtral",
        {
            "experts": {
                **{"method": "score", "criterion": "reap", "drop": 0.3},
                **{"budget": "sensitivity", "refit": "ridge"},
            },
            "slim": {"method": "none"},
        },
    ),
    "stock": (
        "mixtral",
        {
            **{"experts": REAP, "slim": {"method": "none"}},
            **{"routing": "mean", "spelling": "stock-vllm"},
        },
    ),
    "owl": (
        "mixtral",
        {"experts": REAP, "slim": {"sparsity": 0.5, "allocation": "owl"}},
    ),
    "tuned": (
        "mixtral",
        {
            "total_sparsity": 0.4,
            "tune": {
                **{"experts": ["reap"], "budgets": ["global"], "shares": [0, 1]},
                **{"slims": ["wanda"], "owl": False, "narrow": [], "finalists": 2},
                "layers": [],
            },
        },
    ),
}


def make_models(folder: Path) -> Path:
    """The folder that the script takes."""
    for name, sizes in MODELS.items():
        tiny_checkpoint(folder / name, **sizes)
    tiny_text(folder, 20_000)
    return folder


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    # So that tiny models too run some windows, or tokens, at a time.
    memory.TEMPORARY_BYTES = expert_forward.TEMPORARY_BYTES = 200_000
    with joined() as ranks:
        text = str(next(folder.glob("*.txt")))
        calibration = {"source": text, "samples": 10, "sequence_length": 32}
        options = pipeline.RunOptions(ranks=ranks, max_shard_bytes=50_000)
        for name, (model, asked) in RECIPES.items():
            recipe = parse_recipe({**asked, "calibration": calibration}, name)
            pipeline.run(open_checkpoint(folder / model), recipe, out / name, options)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
