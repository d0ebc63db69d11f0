"""A pruned checkpoint that is not what its remap table says does not get served."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.reference import DROP_MOE, LayerCut, read_json, read_tensors, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.archs import find_arch
from vllm_moe_prune.archs.spec import RouterRule
from vllm_moe_prune.checkpoint.remap import FILE_NAME, ExpertRemap
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import (
    CheckpointError,
    MoePruneError,
    PlanError,
    RemapError,
    ServeError,
)
from vllm_moe_prune.plugin.load.served_layer import served_layers
from vllm_moe_prune.plugin.load.verify_remap import local_folder, verify_folder

ARCH = find_arch("mixtral", "test")
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("verify") / "original",
        layers=3,
        vocab=64,
        shards=1,
        dtype="float32",
        tokenizer=False,
    )


@pytest.fixture
def pruned(original: Path, tmp_path: Path) -> Path:
    """Layer 0 keeps 5 experts, layer 1 keeps 2, layer 2 has lost its MoE sublayer."""
    cuts = {0: LayerCut(keep=(0, 2, 3, 5, 7)), 1: LayerCut(keep=(4, 1)), 2: DROP_MOE}
    source = open_checkpoint(original)
    plan = load_plan(write_plan(tmp_path / "plan.json", source, cuts))
    execute_plan(source, plan, tmp_path / "pruned")
    return tmp_path / "pruned"


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = read_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    data = read_json(path)
    change(data)
    path.write_text(json.dumps(data))


def edit_table(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the table and sign it again, as a careful hand would."""
    edit_json(folder / FILE_NAME, change)
    digest = hashlib.sha256((folder / FILE_NAME).read_bytes()).hexdigest()
    block = {"remap_sha256": digest}
    edit_json(folder / "config.json", lambda data: data["moe_prune"].update(block))


def copy_tensor(tensors: Tensors, source: str, name: str) -> None:
    tensors[name] = tensors[source].clone()


def test_an_untouched_checkpoint_passes(pruned: Path) -> None:
    assert [len(layer.kept) for layer in verify_folder(pruned).layers] == [5, 2, 0]


DAMAGE: dict[str, tuple[Callable[[Path], object], type[MoePruneError], str]] = {
    "expert missing": (
        lambda folder: rewrite(folder, lambda t: t.pop(EXPERT.format(0, 3, "w2"))),
        CheckpointError,
        r"layer 0.*experts\.3\.w2",
    ),
    "expert out of range": (
        lambda folder: rewrite(
            folder,
            lambda t: copy_tensor(
                t, EXPERT.format(1, 0, "w1"), EXPERT.format(1, 2, "w1")
            ),
        ),
        CheckpointError,
        "layer 1: expert 2",
    ),
    "router row too many": (
        lambda folder: rewrite(
            folder, lambda t: t.update({ROUTER.format(1): torch.zeros(3, 64)})
        ),
        RemapError,
        "layer 1 has 3 router rows",
    ),
    "count in config": (
        lambda folder: edit_json(
            folder / "config.json",
            lambda data: data["per_layer_config"]["1"].update(num_local_experts=1),
        ),
        CheckpointError,
        "layer 1: expert 1 found",
    ),
    "count in table": (
        lambda folder: edit_table(
            folder,
            lambda data: data["layers"][1].update(kept=[4], router_rows=[4]),
        ),
        RemapError,
        "layer 1 has 2 experts, the remap table lists 1",
    ),
    "layers in table": (
        lambda folder: edit_table(folder, lambda data: data["layers"].pop()),
        CheckpointError,
        "remap table has 2 layers, config.json 3",
    ),
    "table changed": (
        lambda folder: edit_json(
            folder / FILE_NAME, lambda data: data.update(tool_version="9")
        ),
        RemapError,
        "SHA-256",
    ),
    "table gone": (lambda folder: (folder / FILE_NAME).unlink(), RemapError, "missing"),
    "block gone": (
        lambda folder: edit_json(
            folder / "config.json", lambda data: data.pop("moe_prune")
        ),
        RemapError,
        "no 'moe_prune' block",
    ),
    "another family's table": (
        lambda folder: edit_table(
            folder, lambda data: data.update(model_type="arctic")
        ),
        RemapError,
        "arctic",
    ),
    "dropped sublayer still there": (
        lambda folder: rewrite(
            folder, lambda t: copy_tensor(t, ROUTER.format(1), ROUTER.format(2))
        ),
        CheckpointError,
        r"layer 2: .*dropped, but '.*layers\.2.*gate",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, pruned: Path) -> None:
    damage, kind, message = DAMAGE[name]
    damage(pruned)
    with pytest.raises(kind, match=message):
        verify_folder(pruned)


def test_expert_in_two_shards_is_named(pruned: Path) -> None:
    tensors = read_tensors(pruned)
    (pruned / "model.safetensors").unlink()
    name = EXPERT.format(0, 1, "w3")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {name: "b.safetensors"}
    save_file(tensors, pruned / "a.safetensors")
    save_file({name: tensors[name]}, pruned / "b.safetensors")
    index = json.dumps({"weight_map": weight_map})
    (pruned / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"a\.safetensors.*experts\.1\.w3"):
        verify_folder(pruned)


def test_config_and_table_must_agree(pruned: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(pruned)
    remap = ExpertRemap.model_validate(read_json(pruned / FILE_NAME))
    layers = served_layers(config, remap, ARCH, RouterRule(), "model")
    assert [layer.experts for layer in layers] == [5, 2, 0]
    assert [layer.top_k for layer in layers] == [2, 2, 2]
    config.per_layer_config = {"1": {"num_local_experts": 3}}
    with pytest.raises(RemapError, match=r"layer 1: .*is 3, .* 2 kept experts"):
        served_layers(config, remap, ARCH, RouterRule(), "model")


def below(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / "sub" / "model.safetensors")
    names = load_file(folder / "sub" / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "sub/model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


STRAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shards below": (below, r"sub/model\.safetensors: vLLM reads only weights beside"),
    "one more file": (
        lambda folder: shutil.copyfile(
            folder / "model.safetensors", folder / "more.safetensors"
        ),
        r"more\.safetensors: is no part of this checkpoint",
    ),
}


@pytest.mark.parametrize("name", STRAYS)
def test_what_vllm_would_load_or_miss_is_refused(name: str, pruned: Path) -> None:
    damage, message = STRAYS[name]
    damage(pruned)
    assert open_checkpoint(pruned).remap is not None
    with pytest.raises(CheckpointError, match=message):
        verify_folder(pruned)


def test_links_are_followed_as_vllm_does(pruned: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for path in pruned.iterdir():
        (links / path.name).symlink_to(path)
    assert verify_folder(links) == verify_folder(pruned)


def test_hub_id_is_found_in_the_cache_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "models--owner--name"
    snapshot = cached / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "v1").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert local_folder("owner/name", "v1", str(tmp_path)) == snapshot
    assert local_folder(str(snapshot), None) == snapshot
    with pytest.raises(ServeError, match="owner/name: not a folder, and not available"):
        local_folder("owner/name", "v2", str(tmp_path))


@pytest.mark.vllm
def test_loader_refuses_plans_it_cannot_execute(original: Path, tmp_path: Path) -> None:
    from vllm.config.load import LoadConfig

    from vllm_moe_prune.plugin.load.loader import PruningLoader

    def loader(extra: dict[str, str]) -> PruningLoader:
        config = LoadConfig(load_format="moe_prune", model_loader_extra_config=extra)
        return PruningLoader(config)

    with pytest.raises(ServeError, match=re.escape('{"plan": "/path/plan.json"}')):
        loader({})
    source = open_checkpoint(original)
    cuts = {0: LayerCut(keep=(0, 1), sparsity=0.5)}
    plan = write_plan(tmp_path / "plan.json", source, cuts, slim="wanda")
    model = SimpleNamespace(model=str(original), revision=None)
    with pytest.raises(PlanError, match=r"needs calibration activations.* cut"):
        loader({"plan": str(plan)}).open(model)
    edit_json(plan, lambda data: data["model"].update(fingerprint="0" * 64))
    with pytest.raises(PlanError, match="for another model"):
        loader({"plan": str(plan)}).open(model)


@pytest.fixture
def uniform(original: Path, tmp_path: Path) -> Path:
    """Four experts in each layer, so that vLLM's own class serves it."""
    source = open_checkpoint(original)
    cuts = {layer: LayerCut(keep=(6, 1, 4, 3)) for layer in range(3)}
    plan = load_plan(write_plan(tmp_path / "plan.json", source, cuts))
    execute_plan(source, plan, tmp_path / "uniform")
    return tmp_path / "uniform"


ENGINE_DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "uneven": (
        "pruned",
        lambda folder: rewrite(folder, lambda t: t.pop(EXPERT.format(0, 3, "w2"))),
        r"layer 0.*experts\.3\.w2",
    ),
    "uniform": (
        "uniform",
        lambda folder: rewrite(folder, lambda t: t.pop(EXPERT.format(0, 3, "w2"))),
        r"layer 0.*experts\.3\.w2",
    ),
}


@pytest.mark.vllm
@pytest.mark.parametrize("name", ENGINE_DAMAGE)
def test_engine_does_not_start_without_every_expert(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import LLM

    which, damage, message = ENGINE_DAMAGE[name]
    folder: Path = request.getfixturevalue(which)
    damage(folder)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with pytest.raises(MoePruneError, match=message):
        LLM(str(folder), enforce_eager=True, skip_tokenizer_init=True, max_model_len=64)
