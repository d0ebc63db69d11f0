"""Layers with different numbers of experts as other tools spell them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import summed_loss
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.predict import model_facts
from vllm_moe_prune.decide.cut_plan import CutPlan, LayerPlan
from vllm_moe_prune.errors import CheckpointError, PlanError, ServeError
from vllm_moe_prune.pipeline import RunOptions, convert, cut, verify
from vllm_moe_prune.plugin.launch import serve_command
from vllm_moe_prune.recipes.schema import Recipe

IDS_ST = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
KEPT = ((0, 1, 2, 3), (0, 2), (), (1,))
COUNTS = [4, 2, 0, 1]
EXPERTS = "num_local_experts"
PLAN_KEYS = ("per_layer_config", "moe_prune")


@pytest.fixture(scope="module")
def cut_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours whose layers differ, one without experts."""
    folder = tmp_path_factory.mktemp("uneven")
    tiny_checkpoint(
        folder / "ckpt", layers=4, experts=4, hidden=32, width=48, tokenizer=False
    )
    source = open_checkpoint(folder / "ckpt")
    layers = [
        LayerPlan(layer=at, experts=4, keep=kept, action="keep" if kept else "drop-moe")
        for at, kept in enumerate(KEPT)
    ]
    plan = CutPlan(
        tool_version="test",
        model=model_facts(source).model,
        recipe=Recipe(),
        layers=tuple(layers),
    )
    cut(source, plan, folder / "out", RunOptions())
    return folder / "out"


def spelled(ours: Path, to: Path, **values: Any) -> Path:
    """The same weights with nothing of ours in config.json but ``values``."""
    to.mkdir()
    for path in ours.glob("model*"):
        (to / path.name).hardlink_to(path)
    config = json.loads((ours / "config.json").read_text("utf-8"))
    for key in PLAN_KEYS:
        config.pop(key, None)
    config |= values
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


def loss(opened: Checkpoint) -> float:
    return summed_loss(StreamingModel(opened), IDS_ST, "ids")[0]


def puzzle(counts: list[int]) -> list[dict[str, Any]]:
    """As Puzzletron's BlockConfig is saved."""
    attention = {"no_op": False, "num_key_value_heads": 1, "llama4": None}
    return [
        {
            "attention": attention,
            "ffn": {
                "no_op": count == 0,
                "moe": {
                    "num_local_experts": count,
                    "num_experts_per_tok": min(count, 2),
                    "expert_intermediate_dim": 48,
                }
                if count
                else None,
            },
            "parallel_blocks": None,
        }
        for count in counts
    ]


RECORD = {
    "ragged": True,
    "n_routed_experts_per_layer": COUNTS,
    "layers": [
        {"index": at, "kind": "moe", "experts_before": 4, "kept": list(kept)}
        for at, kept in enumerate(KEPT)
    ],
}
SPELLINGS: dict[str, dict[str, Any]] = {
    "a list": {EXPERTS: COUNTS},
    "a list with nothing": {EXPERTS: [4, 2, None, 1]},
    "a list with -1": {EXPERTS: [4, 2, -1, 1]},
    "an object": {EXPERTS: {"0": 4, "1": 2, "2": 0, "3": 1}},
    "per_layer_num_experts": {"per_layer_num_experts": COUNTS, EXPERTS: 4},
    "num_experts_per_layer": {"num_experts_per_layer": COUNTS, EXPERTS: 4},
    "n_routed_experts_per_layer": {
        "n_routed_experts_per_layer": {"1": 2, "2": 0, "3": 1},
        "_ragged_experts": True,
    },
    "reap_pruning": {"reap_pruning": RECORD},
    "block_configs": {"block_configs": puzzle(COUNTS)},
    "moe_sparsity_config": {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "moe_sparsity_config": {"method": "prune", "num_experts": COUNTS},
        }
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_read_as_ours(name: str, cut_one: Path, tmp_path: Path) -> None:
    ours = open_checkpoint(cut_one)
    found = open_checkpoint(spelled(cut_one, tmp_path / "other", **SPELLINGS[name]))
    assert found.foreign
    assert [one.num_experts for one in found.layers] == COUNTS
    assert [one.top_k for one in found.moe_layers] == [2, 2, 1]
    assert found.layers[2].dropped
    for key in ("per_layer_config", "architectures", EXPERTS):
        assert found.config[key] == ours.config[key]
    assert found.remap is not None
    kept = tuple(entry.kept for entry in found.remap.layers)
    told = name == "reap_pruning"
    assert kept == (KEPT if told else tuple(tuple(range(one)) for one in COUNTS))
    with pytest.raises(ServeError, match="convert IN OUT"):
        serve_command(str(tmp_path / "other"))
    if told:
        converted = tmp_path / "converted"
        convert(found, converted, RunOptions())
        verify(converted)
        again = open_checkpoint(converted)
        assert not again.foreign
        assert again.remap == found.remap
        assert loss(again) == loss(found) == loss(ours)
        for path in cut_one.glob("*.safetensors"):
            assert (converted / path.name).read_bytes() == path.read_bytes()
        with pytest.raises(PlanError, match="MoE sublayer is dropped"):
            convert(again, tmp_path / "stock", RunOptions(spelling="stock-vllm"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({EXPERTS: [4, 2, 0]}, "each of the 4 layers"),
        ({EXPERTS: [4, 2, 0, "1"]}, "of layer 3 is '1'"),
        ({EXPERTS: [4, 2, 0, True]}, "of layer 3 is True"),
        ({EXPERTS: [4, 2, 0, -2]}, "of layer 3 is -2"),
        ({EXPERTS: [4, 2, 0, 10**12]}, "more than 8192"),
        ({EXPERTS: [0, 0, 0, 0]}, "gives no layer any experts"),
        ({EXPERTS: {"0": 4, "x": 2}}, "'x' is no layer"),
        ({EXPERTS: {"0": 4, "9" * 5000: 2}}, "is no layer"),
        ({EXPERTS: {"0": 4}}, "says nothing of layer 1"),
        ({EXPERTS: [4, 2, 0, 2]}, "says 2 experts, but|has 1 rows"),
        ({"per_layer_num_experts": COUNTS, EXPERTS: [4, 4, 4, 4]}, "other numbers"),
        (
            {EXPERTS: COUNTS, "per_layer_config": {"1": {EXPERTS: 2}}},
            "has both per_layer_config",
        ),
        (
            {"moe_sparsity_config": {"method": "novice", "num_experts": COUNTS}},
            "only method 'prune'",
        ),
        ({"block_configs": [{}]}, "each of the 4 layers"),
        (
            {"block_configs": [{"attention": {"no_op": True}}, {}, {}, {}]},
            "more than experts",
        ),
        (
            {"reap_pruning": {"ragged": True, "layers": [{"index": 0, "kept": 3}]}},
            "lists no kept",
        ),
        (
            {
                "reap_pruning": {
                    "ragged": True,
                    "layers": [{"index": 0, "kept": [0, 0], "experts_before": 4}],
                }
            },
            "each once",
        ),
        ({"reap_pruning": {"ragged": True, "layers": []}}, "lists none"),
    ],
)
def test_hostile_spellings_are_refused(
    values: dict[str, Any], says: str, cut_one: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(spelled(cut_one, tmp_path / "other", **values))
