"""Routing load in the words of the original model, and the flags that switch it on."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.reference import DROP_BLOCK, DROP_MOE, LayerCut, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import ServeError
from vllm_moe_prune.plugin import launch as serving
from vllm_moe_prune.plugin.watch.switch import (
    EXTENSION,
    SWITCH,
    check_supported,
    describe_load,
    is_on,
    merge,
)

CUTS = {
    0: DROP_MOE,
    1: LayerCut(keep=(2, 5), clusters=((0, 2, 7), (1, 3, 4, 5, 6))),
    2: DROP_BLOCK,
    3: LayerCut(keep=(7, 0, 3), clusters=((4, 7), (0, 1, 2, 5), (3, 6))),
}


@pytest.fixture
def original(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(tmp_path / "ckpt", experts=8))


@pytest.fixture
def pruned(original: Checkpoint) -> Checkpoint:
    plan = original.folder.with_name("plan.json")
    out = original.folder.with_name("out")
    execute_plan(
        original, load_plan(write_plan(plan, original, CUTS, routing="redirect")), out
    )
    return open_checkpoint(out)


def test_load_names_layers_and_experts_of_the_original(pruned: Checkpoint) -> None:
    load = describe_load(pruned, pruned.remap, {1: [9, 4], 2: [1, 0, 6]}, 12.5, 2, 99)
    assert load.model_dump() == {
        "enabled": True,
        "since": 12.5,
        "top_k": 2,
        "weight_bytes": 99,
        "layers": [
            {"layer": 0, "source_layer": 0, "experts": [], "source_experts": []},
            {
                "layer": 1,
                "source_layer": 1,
                "experts": [9, 4],
                "source_experts": [2, 5],
            },
            {
                "layer": 2,
                "source_layer": 3,
                "experts": [1, 0, 6],
                "source_experts": [7, 0, 3],
            },
        ],
    }


def test_load_of_an_original_names_its_experts(original: Checkpoint) -> None:
    counts = {layer: list(range(8)) for layer in range(4)}
    load = describe_load(original, None, counts, 1.0)
    assert [each.source_layer for each in load.layers] == [0, 1, 2, 3]
    assert load.layers[3].source_experts == list(range(8))


def test_load_of_an_unknown_family_is_what_was_counted() -> None:
    load = describe_load(None, None, {3: [1, 2], 1: [5]}, 1.0, top_k=4)
    assert load.top_k == 4
    assert [(each.layer, each.source_layer) for each in load.layers] == [(1, 1), (3, 3)]
    assert load.layers[1].source_experts == [0, 1]


def test_dense_layers_are_not_listed(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "v2", model_type="deepseek_v2")
    checkpoint = open_checkpoint(folder)
    counts = {layer: [0] * 16 for layer in (1, 2, 3)}
    load = describe_load(checkpoint, None, counts, 1.0)
    assert [each.layer for each in load.layers] == [1, 2, 3]
    assert load.top_k == 4


def test_nothing_is_listed_while_counting_is_off(pruned: Checkpoint) -> None:
    load = describe_load(pruned, pruned.remap, {}, None)
    assert load.model_dump() == {
        "enabled": False,
        "since": None,
        "top_k": 2,
        "weight_bytes": None,
        "layers": [],
    }


def test_counts_of_another_model_are_refused(pruned: Checkpoint) -> None:
    with pytest.raises(ServeError, match="layer 2: 2 experts were counted, but 3"):
        describe_load(pruned, pruned.remap, {1: [9, 4], 2: [1, 0]}, 12.5)


def test_each_layer_is_taken_from_one_process() -> None:
    assert merge([[(0, [1, 2])], None, [(1, [3])]]) == {0: [1, 2], 1: [3]}
    with pytest.raises(ServeError, match="layer 0 was counted by two"):
        merge([[(0, [1, 2])], [(0, [1, 2])]])


@pytest.mark.parametrize(
    ("extra", "on"), [({}, False), ({SWITCH: False}, False), ({SWITCH: True}, True)]
)
def test_the_switch(extra: dict[str, bool], on: bool) -> None:
    assert is_on(SimpleNamespace(additional_config=extra)) == on


def test_the_switch_is_a_truth_value() -> None:
    with pytest.raises(ServeError, match="moe_prune_load is 'yes'; use true or false"):
        is_on(SimpleNamespace(additional_config={SWITCH: "yes"}))


@pytest.mark.parametrize(
    "name", ["data_parallel_size", "prefill_context_parallel_size"]
)
def test_processes_that_see_other_tokens_are_refused(name: str) -> None:
    sizes = {
        "data_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    check_supported(SimpleNamespace(**sizes))
    with pytest.raises(ServeError, match=f"--{name.replace('_', '-')} 2"):
        check_supported(SimpleNamespace(**(sizes | {name: 2})))


def test_watch_adds_the_flags_and_names_every_plugin(
    original: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(serving, "find_vllm", lambda: "/bin/vllm")
    command = serving.serve_command(str(original.folder), watch=True)
    assert command[0].endswith("/env")
    plugins = command[1].removeprefix("VLLM_PLUGINS=").split(",")
    assert {"moe_prune", "moe_prune_api"} <= set(plugins)
    assert command[2:5] == ["/bin/vllm", "serve", str(original.folder)]
    at = command.index("--additional-config")
    assert json.loads(command[at + 1]) == {SWITCH: True}
    assert command[command.index("--worker-extension-cls") + 1] == EXTENSION


def test_watch_adds_to_a_list_of_plugins(
    original: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    monkeypatch.setattr(serving, "find_vllm", lambda: "/bin/vllm")
    command = serving.serve_command(str(original.folder), watch=True)
    assert command[1] == "VLLM_PLUGINS=moe_prune,moe_prune_api,theirs"


def test_watch_refuses_flags_that_it_sets(
    original: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "find_vllm", lambda: "/bin/vllm")
    with pytest.raises(ServeError, match="--watch sets --additional-config itself"):
        serving.serve_command(
            str(original.folder), extra=["--additional-config={}"], watch=True
        )
