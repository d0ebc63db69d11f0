"""Each family through the whole run: measure, plan, cut, verify."""

from pathlib import Path
from typing import Any

import pytest

from tests.reference import read_json
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import perplexity
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.recipes.schema import Recipe

FAMILIES: dict[str, dict[str, Any]] = {
    "arctic": {"moe_layer_frequency": 2, "layers": 4},
    "deepseek": {"layers": 4},
    "deepseek_v2": {"layers": 4},
    "deepseek_v3": {"layers": 4, "num_nextn_predict_layers": 1},
    "deepseek_v3-fp8": {"layers": 2, "fp8": (32, 32)},
}
RECIPES: dict[str, dict[str, Any]] = {
    "stun": {
        "total_sparsity": 0.4,
        "experts": {"drop": 0.25, "reconstruct": "never"},
        "slim": {"method": "wanda"},
    },
    "uneven": {
        "experts": {
            "method": "score",
            "criterion": "reap",
            "drop": 0.3,
            "groups": "uneven",
        },
        "slim": {"method": "none"},
        "layers": {"mtp": "drop"},
    },
    "layers": {
        "experts": {"method": "none"},
        "slim": {"method": "none"},
        "layers": {"moe_count": 1, "block_count": 1},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_works(name: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        tmp_path / "in", model_type=name.partition("-")[0], **FAMILIES[name]
    )
    text = tiny_text(tmp_path, characters=12_000)
    calibration = {"source": str(text), "samples": 8, "sequence_length": 64}
    recipes = RECIPES if "fp8" not in name else {"stun": RECIPES["stun"]}
    for kind, asked in recipes.items():
        recipe = Recipe.model_validate(asked | {"calibration": calibration})
        out = tmp_path / kind
        checkpoint = open_checkpoint(folder)
        plan, result, verified = pipeline.run(
            checkpoint, recipe, out, pipeline.RunOptions()
        )
        assert verified.tensors_compared > 0
        assert plan.predicted is not None
        assert plan.predicted.file_bytes == result.file_bytes
        if kind == "stun":
            assert verified.expert_sparsity == pytest.approx(0.4, abs=2e-3)
        passes = read_json(out / "provenance.json")["forward_passes"]
        assert passes == {"measure": 1, "cut": int(kind == "stun")}
        pruned = open_checkpoint(out)
        assert len(StreamingModel(pruned).checkpoint.layers) == len(pruned.layers)
        if kind == "uneven":
            assert not any(layer.mtp for layer in pruned.layers)
        found = perplexity(pruned, str(text), sequence_length=64, max_tokens=512)
        assert found.perplexity < 1e6
