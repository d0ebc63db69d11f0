"""A checkpoint through its family's table: layouts, layers, experts, what it counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference import (
    DROP_MOE,
    LayerCut,
    experts_of,
    raw_bytes,
    read_json,
    read_tensors,
    router_of,
    write_plan,
)
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.reader import read_expert, read_router
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError

LAYOUTS = [
    f"{moe}.{spelling}"
    for moe in ("block_sparse_moe", "mlp")
    for spelling in ("w1w2w3", "gate_up_down", "packed")
]


def make_model(folder: Path, layout: str = LAYOUTS[0], **config: Any) -> Path:
    return tiny_checkpoint(
        folder,
        layout=layout,
        layers=2,
        experts=4,
        hidden=16,
        width=8,
        vocab=32,
        shards=1,
        tokenizer=False,
        **config,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_known_by_its_names(tmp_path: Path, layout: str) -> None:
    model = make_model(tmp_path / "model", layout)
    checkpoint = open_checkpoint(model)
    assert checkpoint.layout.name == layout
    tensors = read_tensors(model)
    for layer in checkpoint.layers:
        assert (layer.num_experts, layer.top_k, layer.width) == (4, 2, 8)
        assert layer.has_moe
        assert torch.equal(
            read_router(checkpoint, layer), router_of(tensors, layer.index)
        )
        for number, expected in enumerate(experts_of(tensors, layer.index)):
            for ours, theirs in zip(
                read_expert(checkpoint, layer, number), expected, strict=True
            ):
                assert raw_bytes(ours) == raw_bytes(theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_are_counted_to_the_last_one(tmp_path: Path, layout: str) -> None:
    model = make_model(tmp_path / "model", layout)
    checkpoint, tensors = open_checkpoint(model), read_tensors(model)
    assert checkpoint.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert checkpoint.tensor_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.expert_parameters == 2 * 4 * 3 * 16 * 8


def test_layers_are_seen_as_per_layer_config_says(tmp_path: Path) -> None:
    model = make_model(
        tmp_path / "model", per_layer_config={"1": {"num_experts_per_tok": 1}}
    )
    assert [layer.top_k for layer in open_checkpoint(model).layers] == [2, 1]


@pytest.mark.parametrize("key", ["2", "-1", "01", "1.0", " 1", "one", "\u0661", ""])
def test_per_layer_config_of_no_layer_is_refused(tmp_path: Path, key: str) -> None:
    model = make_model(tmp_path / "model", per_layer_config={key: {"top": 1}})
    with pytest.raises(CheckpointError, match="layers 0 to 1"):
        open_checkpoint(model)


@pytest.mark.parametrize("absent", ["per_layer_config", "quantization_config"])
def test_null_is_as_good_as_absent(tmp_path: Path, absent: str) -> None:
    model = make_model(tmp_path / "model", **{absent: None})
    assert len(open_checkpoint(model).layers) == 2


def test_a_cut_checkpoint_is_seen_as_it_is(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "model"))
    plan = write_plan(
        tmp_path / "plan.json", checkpoint, {0: LayerCut(keep=(2,)), 1: LayerCut()}
    )
    execute_plan(checkpoint, load_plan(plan), tmp_path / "uneven")
    first, second = open_checkpoint(tmp_path / "uneven").layers
    assert (first.num_experts, first.top_k) == (1, 1)
    assert (second.num_experts, second.top_k) == (4, 2)
    plan = write_plan(tmp_path / "plan.json", checkpoint, {1: DROP_MOE})
    execute_plan(checkpoint, load_plan(plan), tmp_path / "dropped")
    dropped = open_checkpoint(tmp_path / "dropped").layers[1]
    assert (dropped.num_experts, dropped.has_moe, dropped.dropped) == (0, False, True)


def test_a_redirecting_checkpoint_tells_where_rows_lead(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "model"))
    half = LayerCut(keep=(3, 1), clusters=((0, 3), (1, 2)))
    plan = write_plan(
        tmp_path / "plan.json", checkpoint, {0: half, 1: half}, routing="redirect"
    )
    execute_plan(checkpoint, load_plan(plan), tmp_path / "out")
    layer = open_checkpoint(tmp_path / "out").layers[0]
    assert (layer.num_experts, layer.top_k) == (2, 2)
    assert layer.redirect == (0, 1, 1, 0)


def with_tensor(model: Path, name: str) -> None:
    path = model / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(3)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.rotary_emb.inv_freq",
        "model.layers.0.block_sparse_moe.gate.bias_of_the_future",
        "vision.tower.weight",
        "model.layers.norm",
        "größe \N{SNOWMAN}",
    ],
)
def test_unknown_tensors_pass_through_untouched(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "model")
    with_tensor(model, name)
    checkpoint = open_checkpoint(model)
    plan = write_plan(tmp_path / "plan.json", checkpoint, {1: LayerCut(keep=(0, 1))})
    execute_plan(checkpoint, load_plan(plan), tmp_path / "out")
    assert read_tensors(tmp_path / "out")[name].tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "name",
    [
        f"model.layers.{'9' * 5000}.weight",
        "model.layers.00.weight",
        "model.layers.\u0661.weight",
        f"model.layers.0.block_sparse_moe.experts.{'9' * 5000}.w1.weight",
    ],
    ids=["long", "padded", "other digits", "long expert"],
)
def test_numbers_that_no_layer_has_are_refused(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "model")
    with_tensor(model, name)
    with pytest.raises(CheckpointError):
        open_checkpoint(model)


def test_the_origin_of_a_folder_is_its_name(tmp_path: Path) -> None:
    model = make_model(tmp_path / "Mixtral-Tiny")
    (tmp_path / "link").symlink_to(model)
    for path in (model, str(model), tmp_path / "link", model / "."):
        origin = open_checkpoint(path).origin
        assert (origin.name, origin.revision) == ("Mixtral-Tiny", None)


@pytest.mark.parametrize(
    "source", ["nowhere", "./nowhere", "../a/b", "a/b/c", "/a", "~/a", "", "a//b"]
)
def test_what_is_neither_folder_nor_hub_id_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no such folder|missing"):
        open_checkpoint(source)


def test_the_config_stays_as_it_was_read(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    checkpoint = open_checkpoint(model)
    before = json.dumps(checkpoint.config)
    plan = write_plan(tmp_path / "plan.json", checkpoint, {1: DROP_MOE})
    execute_plan(checkpoint, load_plan(plan), tmp_path / "out")
    assert (
        json.dumps(checkpoint.config)
        == before
        == json.dumps(read_json(model / "config.json"))
    )
