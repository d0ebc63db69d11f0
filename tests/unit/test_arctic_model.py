"""The trainable Arctic of the examples is the Arctic that everything else knows."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.reference_families import FamilyReference
from vllm_moe_prune import configs
from vllm_moe_prune.checkpoint.source import open_checkpoint

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def arctic() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("arctic_model")
    finally:
        sys.path.remove(str(EXAMPLES))
        # It took the name in transformers; other tests want the package's class.
        configs.register.cache_clear()
        configs.register()


def test_it_is_saved_as_published_and_computes_the_same(
    arctic: ModuleType, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = arctic.ArcticConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = arctic.ArcticForCausalLM(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert [layer.num_experts for layer in open_checkpoint(tmp_path).layers] == [4, 4]
    ids_ST = torch.randint(0, 128, (2, 12))
    with torch.no_grad():
        loss = float(model(ids_ST, labels=ids_ST).loss)
    assert loss == pytest.approx(FamilyReference(tmp_path).loss(ids_ST), rel=1e-5)
    again = arctic.ArcticForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again[name], tensor.bfloat16())
