"""Narrowed experts in vLLM, without the plugin and with it, and in transformers.

Compared with plain references that run the original, its channels zeroed where the
record of the cut says that they left.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.engine import TOKENS, VOCAB, assert_same, served, served_by_stock
from tests.family_cases import MLA
from tests.reference import Reference, read_json, read_tensors
from tests.reference_families import FamilyReference, Removed
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.data import Tokens, sha256_of
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.channels import read_channels
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.errors import PlanError
from vllm_moe_prune.recipes.schema import parse_recipe
from vllm_moe_prune.stages.plan import plan

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.usefixtures("engines_in_this_process"),
]
NARROW = {"share": 0.5, "multiple": 32, "refit": "none"}


def make(folder: Path, family: str, **layers: Any) -> tuple[Path, Path]:
    """A narrowed checkpoint, and its original with the same channels zeroed."""
    config = {"moe_layer_frequency": 2} if family == "arctic" else {}
    original = tiny_checkpoint(
        folder / "original",
        model_type=family,
        width=64,
        vocab=VOCAB,
        dtype="float32",
        tokenizer=False,
        rms_norm_eps=1e-6,
        **config,
    )
    checkpoint = open_checkpoint(original)
    nothing = {"experts": {"method": "none"}, "slim": {"method": "none"}}
    recipe = parse_recipe({**nothing, "narrow": NARROW, "layers": layers}, "narrow")
    ids_ST = torch.randint(3, VOCAB, (2, 32), generator=torch.manual_seed(0))
    tokens = Tokens(ids_ST=ids_ST, source="random", sha256=sha256_of(ids_ST))
    out = folder / "narrow"
    decided = plan(checkpoint, recipe, None)
    execute_plan(checkpoint, decided, out, tokens=tokens)
    tensors = read_tensors(original)
    for layer in checkpoint.moe_layers:
        if not decided.layers[layer.index].keep:
            continue
        kept = read_channels(out, layer.index, layer.num_experts, 64, 32)
        for expert, kept_K in enumerate(kept):
            gone_F = torch.ones(64, dtype=torch.bool).index_fill(0, kept_K, False)
            for rule in checkpoint.layout.experts:
                if rule.role == "down":
                    tensors[rule.name(layer.index, expert)][:, gone_F] = 0
    masked = folder / "masked"
    shutil.copytree(original, masked, ignore=shutil.ignore_patterns("model*"))
    save_file(tensors, masked / "model.safetensors", metadata={"format": "pt"})
    return out, masked


def says(reference: Any) -> Tensor:
    logits_STV: Tensor = reference.logits(torch.tensor([TOKENS]))
    return logits_STV[0].log_softmax(dim=-1)


def test_stock_vllm_and_transformers_serve_uniform_widths(tmp_path: Path) -> None:
    mixtral, mixtral_masked = make(tmp_path / "mixtral", "mixtral")
    deepseek, deepseek_masked = make(tmp_path / "deepseek", "deepseek_v3")
    models = {"mixtral": mixtral, "deepseek": deepseek, "masked": deepseek_masked}
    found = served_by_stock(tmp_path, models, {"deepseek": MLA, "masked": MLA})
    assert_same(found["mixtral"], says(Reference(mixtral_masked)))
    # Stock vLLM's attention on CPUs takes V3 otherwise than transformers does, the
    # original too: of narrowing this says what it can.
    assert_same(found["deepseek"], found["masked"])
    assert read_json(deepseek / "config.json")["n_shared_experts"] == 2
    for narrow, reference in (
        (mixtral, Reference(mixtral_masked)),
        (deepseek, FamilyReference(deepseek_masked)),
    ):
        model = AutoModelForCausalLM.from_pretrained(narrow, dtype=torch.float32)
        with torch.no_grad():
            logits_TV = model(torch.tensor([TOKENS])).logits[0]
        assert_same(logits_TV.double().log_softmax(-1), says(reference))
    original, decided = tmp_path / "mixtral" / "original", mixtral / "plan.json"
    with pytest.raises(PlanError, match="narrows experts, which needs calibration"):
        served(
            original,
            load_format="moe_prune",
            model_loader_extra_config={"plan": str(decided)},
        )


@pytest.mark.parametrize("family", ["arctic", "deepseek_v3"])
def test_the_plugin_serves_widths_beside_layers_that_differ(
    tmp_path: Path, family: str
) -> None:
    narrow, masked = make(tmp_path, family, drop_moe=[3])
    assert "per_layer_config" in read_json(narrow / "config.json")
    options = MLA if family == "deepseek_v3" else {}
    reference = FamilyReference(masked, Removed(moe=(3,)))
    assert_same(served(narrow, **options), says(reference))
