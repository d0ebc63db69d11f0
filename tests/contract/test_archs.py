"""Rules for every file in archs/, with no further code when one is added."""

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.reference import LayerCut, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.archs import find_arch, supported
from vllm_moe_prune.archs.spec import GatedMlp, Key
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import run_layer
from vllm_moe_prune.calibrate.stock import find_class
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.verify import verify
from vllm_moe_prune.decide.cut_plan import load_plan


@pytest.fixture(scope="module", params=supported())
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_checkpoint(
        folder, model_type=request.param, layers=4, dtype="float32", tokenizer=False
    )
    return open_checkpoint(folder)


def test_names_are_consistent(checkpoint: Checkpoint) -> None:
    arch = checkpoint.arch
    others = [find_arch(name, "test") for name in supported()]
    assert arch.model_type == checkpoint.config["model_type"]
    assert [other.pruned_architecture for other in others].count(
        arch.pruned_architecture
    ) == 1
    assert arch.pruned_architecture.startswith("MoePrune")
    prefix = arch.layer_prefix
    for layout in arch.layouts:
        for rule in layout.rules:
            assert rule.template.startswith(prefix)
            assert rule.template.removeprefix(prefix).startswith(arch.moe_members)
    if arch.shared is not None:
        assert arch.shared.prefix.startswith(arch.moe_members)
    if arch.residual is not None:
        assert not arch.residual.mlp.prefix.startswith(arch.moe_members)


def keys_of(table: object) -> Iterator[Key]:
    """Every key of config.json that a family's table reads."""
    for field in dataclasses.fields(table):  # type: ignore[arg-type]
        value = getattr(table, field.name)
        if isinstance(value, Key):
            yield value
        elif dataclasses.is_dataclass(value):
            yield from keys_of(value)


def test_absent_keys_mean_what_they_mean_to_transformers(
    checkpoint: Checkpoint,
) -> None:
    config = find_class(checkpoint.arch.hf_config)()
    expected = {
        key.name: found
        for key in keys_of(checkpoint.arch)
        if key.name and (found := getattr(config, key.name, None)) is not None
    }
    found = {key.name: key.default for key in keys_of(checkpoint.arch)}
    assert {name: found[name] for name in expected} == expected


def test_its_transformers_classes_exist(checkpoint: Checkpoint) -> None:
    arch = checkpoint.arch
    for path in (arch.hf_config, arch.hf_layer, arch.hf_rotary, arch.hf_norm):
        assert isinstance(find_class(path), type)


def test_every_tensor_has_a_place_in_the_forward(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    arch, layout = checkpoint.arch, checkpoint.layout
    with caplog.at_level(logging.WARNING):
        model = StreamingModel(checkpoint)
    assert not caplog.records
    named = {arch.embedding, arch.final_norm, arch.head}
    for layer in checkpoint.layers:
        prefix = arch.layer_prefix.format(layer=layer.index)
        if layer.has_moe:
            named |= {rule.name(layer.index) for rule in layout.router_parts}
            named |= set(checkpoint.expert_names(layer))
        parts = [arch.dense_mlp, arch.shared]
        parts += [arch.residual.mlp] if arch.residual else []
        for mlp in parts:
            if isinstance(mlp, GatedMlp):
                named |= {prefix + name for name in (*mlp.names, mlp.weigher) if name}
        if arch.residual:
            named.add(f"{prefix}{arch.residual.norm}.weight")
        named |= {
            f"{prefix}{norm}.weight"
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
    rest = [name for name in checkpoint.tensors if name not in named]
    assert all(".self_attn." in name for name in rest)
    hidden_STD = model.embed(torch.arange(3, 35).view(2, 16))
    for index in range(model.num_layers):
        before = hidden_STD.clone()
        run_layer(model, index, hidden_STD)
        assert torch.isfinite(hidden_STD).all()
        assert not torch.equal(before, hidden_STD)


def test_transformers_finds_every_tensor_and_no_other(checkpoint: Checkpoint) -> None:
    if checkpoint.arch.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("transformers does not have this family")
    _, info = AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_a_plan_is_cut_and_verified(checkpoint: Checkpoint, tmp_path: Path) -> None:
    layer = checkpoint.moe_layers[-1]
    # Every second expert: of every group, half.
    keep = tuple(range(0, layer.num_experts, 2))
    if layer.groups is None:
        keep = keep[1:]
    plan = write_plan(
        tmp_path / "plan.json", checkpoint, {layer.index: LayerCut(keep=keep)}
    )
    execute_plan(checkpoint, load_plan(plan), tmp_path / "out")
    assert verify(tmp_path / "out", checkpoint).tensors_compared > 0
    pruned = open_checkpoint(tmp_path / "out")
    assert pruned.layers[layer.index].num_experts == len(keep)
    assert pruned.config["architectures"] == [checkpoint.arch.pruned_architecture]
