"""Does pruning on this GPU work, and give the same bytes twice?

    python -m bench.gpu.prune [--json FILE] [--small] [--seconds S]

Tiny checkpoints of several families, every kind of recipe, each twice on the GPU. That
bytes differ between the two is a failure; whether they are a CPU's is written down:
products round otherwise there. Ends with 1 if anything failed.
"""

import hashlib
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.gpu.common import arguments, save
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.recipes.schema import Recipe
from vllm_moe_prune.stages.preflight import RunOptions

FAMILIES = ("mixtral", "deepseek_v2", "deepseek_v3", "deepseek", "arctic")
NO_EXPERTS: dict[str, Any] = {"method": "none"}
RECIPES: dict[str, dict[str, Any]] = {
    "stun + wanda": {
        "experts": {"method": "stun", "drop": 0.25},
        "slim": {"method": "wanda", "sparsity": 0.5},
    },
    "sensitivity + sparsegpt 2:4": {
        "experts": {"method": "score", "drop": 0.25, "budget": "sensitivity"},
        "slim": {"method": "sparsegpt", "pattern": "2:4"},
    },
    "gptq": {
        "experts": NO_EXPERTS,
        "slim": {"method": "none"},
        "quantize": {
            "method": "gptq",
            "group_size": 32,
            "act_order": True,
            "zero_point": True,
        },
    },
    "reap + wanda-variant by owl": {
        "experts": {"method": "score", "criterion": "reap", "drop": 0.25},
        "slim": {"method": "wanda-variant", "sparsity": 0.5, "allocation": "owl"},
    },
    "removal loss + sparsegpt of all parts": {
        "experts": {
            "method": "score",
            "criterion": "removal-loss",
            "drop": 0.25,
            "budget": "per-layer",
        },
        "slim": {
            "method": "sparsegpt",
            "sparsity": 0.5,
            "scope": ["experts", "attention", "shared", "mlp"],
        },
    },
    "outputs + magnitude": {
        "experts": {"method": "stun", "cluster_by": "outputs", "drop": 0.25},
        "slim": {"method": "magnitude", "sparsity": 0.5},
    },
    "redirect + sparsegpt 2:4": {
        "experts": {"method": "stun", "drop": 0.3},
        "slim": {"method": "sparsegpt", "pattern": "2:4"},
        "routing": "redirect",
    },
    "4:8 by routing weights": {
        "experts": NO_EXPERTS,
        "slim": {"method": "wanda", "router_weighted": True, "pattern": "4:8"},
    },
    "compensated wanda": {
        "experts": NO_EXPERTS,
        "slim": {"method": "wanda", "sparsity": 0.5, "compensate": True},
    },
    "refitted by ridge": {
        "experts": {
            "method": "score",
            "criterion": "reap",
            "drop": 0.25,
            "budget": "sensitivity",
            "protect": "super",
            "refit": "ridge",
        },
        "slim": {"method": "none"},
    },
    "narrow": {
        "experts": NO_EXPERTS,
        "slim": {"method": "none"},
        "narrow": {"share": 0.25},
    },
    "awq": {
        "experts": NO_EXPERTS,
        "slim": {"method": "none"},
        "quantize": {"method": "awq", "group_size": 32},
    },
    "fp8": {
        "experts": NO_EXPERTS,
        "slim": {"method": "none"},
        "quantize": {"method": "rtn", "weights": "fp8"},
    },
    "a block and a sublayer": {
        "experts": NO_EXPERTS,
        "slim": {"method": "none"},
        "layers": {"block_count": 1, "moe_count": 1},
    },
}


def source(folder: Path, family: str, layers: int, width: int) -> Path:
    """A tiny checkpoint of a family."""
    size: dict[str, Any] = {"layers": layers, "hidden": width, "width": width}
    return tiny_checkpoint(folder / family, model_type=family, **size)


def recipe(name: str, text: Path) -> Recipe:
    """One of ``RECIPES``, calibrated on a text."""
    calibration = {
        "source": str(text),
        "samples": 6,
        "sequence_length": 32,
        "heldout": 2,
    }
    return Recipe.model_validate({"calibration": calibration, **RECIPES[name]})


def pruned(checkpoint: Path, chosen: Recipe, out: Path, device: str) -> dict[str, str]:
    """Prune, and say what the files of weights hash to."""
    pipeline.run(open_checkpoint(checkpoint), chosen, out, RunOptions(device=device))
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.glob("*.safetensors"))
    }


def compared(checkpoint: Path, chosen: Recipe, out: Path) -> dict[str, Any]:
    """What became of a recipe."""
    began = time.monotonic()
    try:
        first, again, host = (
            pruned(checkpoint, chosen, out / name, device)
            for name, device in (("a", "cuda"), ("b", "cuda"), ("c", "cpu"))
        )
    except Exception as error:  # any: the other recipes are still to be seen
        said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"verdict": "FAILED", "error": said}
    same = bool(first) and first == again
    return {
        "verdict": "ok" if same else "FAILED: other bytes the second time",
        "as_on_cpu": first == host,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Every recipe of a family before the next: a run may be cut short."""
    options = arguments(__doc__).parse_args()
    began = time.monotonic()
    families = FAMILIES[:1] if options.small else FAMILIES
    names = list(RECIPES)[:1] if options.small else list(RECIPES)
    quantizes = importlib.util.find_spec("compressed_tensors") is not None
    found = []
    with tempfile.TemporaryDirectory() as folder:
        text = tiny_text(Path(folder))
        for family in families:
            size = (2, 64) if options.small else (4, 128)
            checkpoint = source(Path(folder), family, *size)
            for at, name in enumerate(names):
                about: dict[str, Any] = {"family": family, "recipe": name}
                if "quantize" in RECIPES[name] and not quantizes:
                    about["verdict"] = "left out: no compressed_tensors"
                elif time.monotonic() - began > options.seconds:
                    about["verdict"] = "left out: no time left"
                else:
                    out = Path(folder, f"{family}-{at}")
                    about |= compared(checkpoint, recipe(name, text), out)
                found.append(about)
                print(about, flush=True)
                save(options.json, found)
    sys.exit(any("FAILED" in one["verdict"] for one in found))


if __name__ == "__main__":
    main()
