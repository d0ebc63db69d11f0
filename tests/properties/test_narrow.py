"""Narrowed experts: scores, least squares, and cuts, against naive references."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.killing import Killed, at_layer
from tests.reference import folder_bytes
from tests.streamed import streamed_loss
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.data import load_heldout, load_tokens
from vllm_moe_prune.calibrate.expert_forward import expert_hidden
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import Expert, read_expert
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.channels import read_channels
from vllm_moe_prune.cut.losses import Text
from vllm_moe_prune.cut.planned import planned_losses
from vllm_moe_prune.cut.predict import model_facts
from vllm_moe_prune.decide.build_plan import make_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError, RecipeError
from vllm_moe_prune.recipes.schema import Recipe, parse_recipe
from vllm_moe_prune.slim.narrow import channel_scores, kept_channels, narrowed

CALIBRATION = {"samples": 8, "sequence_length": 32, "heldout": 4}
NOTHING_ELSE = {"experts": {"method": "none"}, "slim": {"method": "none"}}


def drawn(seed: int, width: int, hidden: int, dtype: torch.dtype) -> Expert:
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return torch.randn(rows, cols, generator=generator).to(dtype)

    return Expert(matrix(width, hidden), matrix(width, hidden), matrix(hidden, width))


@given(
    seed=st.integers(0, 1 << 30),
    width=st.integers(2, 12),
    hidden=st.integers(1, 6),
    tokens=st.integers(0, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_channels_and_columns_are_those_of_a_naive_reference(
    seed: int,
    width: int,
    hidden: int,
    tokens: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    expert = drawn(seed, width, hidden, dtype)
    inner_nF = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    kept = data.draw(st.integers(1, width))
    penalty = data.draw(st.sampled_from([1e-3, 0.1, 1.0]))
    gate, up, down = (matrix.double().numpy() for matrix in expert)
    a = inner_nF.double().numpy()
    # Token by token, channel by channel: the squared error of leaving it out.
    costs = []
    for c in range(width):
        if tokens:
            error = sum(
                float(((a[n, c] * down[:, c]) ** 2).sum()) for n in range(tokens)
            )
        else:
            norms = (gate[c] ** 2).sum() * (up[c] ** 2).sum()
            error = float(norms * (down[:, c] ** 2).sum())
        costs.append(error)
    scores = channel_scores(expert, inner_nF.double().square().sum(0))
    np.testing.assert_allclose(scores.numpy(), costs, rtol=1e-6)
    expected = sorted(sorted(range(width), key=lambda c: (costs[c], c))[width - kept :])
    kept_K = kept_channels(scores, kept)
    assert kept_K.tolist() == expected
    # The least-squares problem as one tall system: data, then the penalty's rows.
    gram_FF = (
        (inner_nF.double().T @ inner_nF.double())
        if tokens
        else torch.zeros(width, width, dtype=torch.float64)
    )
    found = narrowed(expert, kept_K, gram_FF, penalty)
    chosen = a[:, expected]
    strength = penalty * np.diag(chosen.T @ chosen).mean()
    tall = np.concatenate([chosen, np.sqrt(strength) * np.eye(kept)])
    targets = np.concatenate([a @ down.T, np.sqrt(strength) * down[:, expected].T])
    fitted = (
        np.linalg.lstsq(tall, targets, rcond=None)[0].T if tokens else down[:, expected]
    )
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    np.testing.assert_allclose(
        found.down_DF.double().numpy(), fitted, rtol=tolerance, atol=tolerance
    )
    assert torch.equal(found.gate_FD, expert.gate_FD[expected])
    assert torch.equal(found.up_FD, expert.up_FD[expected])


@given(seed=st.integers(0, 1 << 30), kept=st.integers(1, 11))
@settings(max_examples=25, deadline=None)
def test_a_narrowed_expert_is_the_original_with_channels_zeroed(
    seed: int, kept: int
) -> None:
    expert = drawn(seed, 12, 5, torch.float64)
    x_nD = torch.randn(7, 5, dtype=torch.float64)
    kept_K = kept_channels(channel_scores(expert, torch.zeros(12)), kept)
    mask_F = torch.zeros(12, dtype=torch.float64).index_fill_(0, kept_K, 1.0)
    small = narrowed(expert, kept_K)
    out_nD = expert_hidden(x_nD, small) @ small.down_DF.T
    masked_nD = (expert_hidden(x_nD, expert) * mask_F) @ expert.down_DF.T
    torch.testing.assert_close(out_nD, masked_nD)


def test_fitted_columns_come_closer_than_plain_ones() -> None:
    expert = drawn(1, 64, 16, torch.float32)
    # Activations of few dimensions: what leaves can be said by what stays.
    inner_nF = torch.randn(200, 20) @ torch.randn(20, 64)
    target_nD = inner_nF @ expert.down_DF.T
    kept_K = kept_channels(channel_scores(expert, inner_nF.square().sum(0)), 32)

    def error(small: Expert) -> float:
        return float((inner_nF[:, kept_K] @ small.down_DF.T - target_nD).norm())

    plain = narrowed(expert, kept_K)
    fitted = narrowed(expert, kept_K, inner_nF.T @ inner_nF, 1e-3)
    assert error(fitted) < 0.1 * error(plain)


def recipe_of(text: Path, **fields: Any) -> Recipe:
    calibration = {**CALIBRATION, "source": str(text)}
    narrow = {"share": 0.3, "multiple": 32, **fields.pop("narrow", {})}
    data = {**NOTHING_ELSE, **fields, "calibration": calibration, "narrow": narrow}
    return parse_recipe(data, "test")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text"))


def original(folder: Path, model_type: str = "mixtral", **fields: Any) -> Checkpoint:
    return open_checkpoint(
        tiny_checkpoint(folder, model_type=model_type, layers=2, **fields)
    )


def run(
    checkpoint: Checkpoint, recipe: Recipe, out: Path, **options: Any
) -> Checkpoint:
    """Cut, verified against its source; the size is the one predicted."""
    plan, result, verified = pipeline.run(
        checkpoint, recipe, out, pipeline.RunOptions(**options)
    )
    assert plan.predicted is not None
    assert plan.predicted.file_bytes == result.file_bytes
    # A mean of experts may be exactly zero here and there.
    predicted = pytest.approx(plan.predicted.expert_sparsity, abs=1e-3)
    assert verified.expert_sparsity == predicted
    return open_checkpoint(out)


FAMILIES = (
    *("mixtral", "arctic", "deepseek", "deepseek_v2", "deepseek_v3"),
    "olmoe",
    "qwen3_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "minimax_m2",
    "qwen2_moe",
)
MORE: dict[str, dict[str, Any]] = {
    "alone": {},
    "not fitted": {"narrow": {"refit": "none"}},
    "after experts": {"experts": {"drop": 0.25}},
    "averaged": {"experts": {"drop": 0.4, "reconstruct": "always"}},
    "redirected": {"experts": {"drop": 0.25}, "routing": "redirect"},
    "MoE gone": {"layers": {"drop_moe": [1]}},
    "block gone": {"layers": {"drop_blocks": [0]}},
    "zeros": {"slim": {"method": "wanda", "sparsity": 0.5}},
    "zeros everywhere": {
        "slim": {"sparsity": 0.25, "scope": ["experts", "attention", "mlp", "shared"]}
    },
    "sparsegpt, 2:4": {"slim": {"method": "sparsegpt", "pattern": "2:4"}},
    "int4": {"quantize": {"method": "rtn"}},
    "gptq": {"quantize": {"method": "gptq"}},
    "awq": {"quantize": {"method": "awq"}},
    "fp8": {"quantize": {"method": "rtn", "weights": "fp8"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_narrowing_goes_with_everything_else(
    tmp_path: Path, text: Path, name: str
) -> None:
    checkpoint = original(tmp_path / "model", width=96)
    recipe = recipe_of(text, **MORE[name])
    found = run(checkpoint, recipe, tmp_path / "out")
    for layer in found.moe_layers:
        assert layer.width == 64
        assert read_expert(found, layer, 0).down_DF.shape[1] == 64
    assert found.config["intermediate_size"] == 64
    heldout, tokens = (
        load(checkpoint, recipe.calibration) for load in (load_heldout, load_tokens)
    )
    loss = streamed_loss(tmp_path / "out", heldout.ids_ST)
    assert math.isfinite(loss.mean)
    if "quantize" not in MORE[name] and name != "zeros everywhere":
        # What tune judges is what a cut makes.
        plan = load_plan(tmp_path / "out" / "plan.json")
        judged = planned_losses(
            StreamingModel(checkpoint), [plan], [Text(heldout.ids_ST)], tokens.ids_ST
        )
        assert judged[0][0].nll == pytest.approx(loss.nll, rel=1e-6)


@pytest.mark.parametrize("layout", ["mlp.packed", "block_sparse_moe.gate_up_down"])
def test_packed_experts_lose_channels_too(
    tmp_path: Path, text: Path, layout: str
) -> None:
    checkpoint = original(tmp_path / "model", width=96, layout=layout)
    recipe = recipe_of(text, slim={"method": "wanda", "sparsity": 0.5})
    assert run(checkpoint, recipe, tmp_path / "out").moe_layers[0].width == 64


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_loses_the_channels_that_the_record_names(
    tmp_path: Path, text: Path, model_type: str
) -> None:
    checkpoint = original(tmp_path / "model", model_type, width=128)
    recipe = recipe_of(text, narrow={"share": 0.5, "refit": "none", "multiple": 32})
    found = run(checkpoint, recipe, tmp_path / "out")
    if model_type != "arctic":
        stock = checkpoint.arch.stock_architecture
        assert found.config["architectures"] == [stock]
    assert "per_layer_config" not in found.config
    for before, after in zip(checkpoint.moe_layers, found.moe_layers, strict=True):
        assert (before.width, after.width) == (128, 64)
        assert before.shared_width == after.shared_width
        kept = read_channels(
            tmp_path / "out", before.index, before.num_experts, 128, 64
        )
        for expert in range(before.num_experts):
            old = read_expert(checkpoint, before, expert)
            new = read_expert(found, after, expert)
            assert torch.equal(new.gate_FD, old.gate_FD[kept[expert]])
            assert torch.equal(new.up_FD, old.up_FD[kept[expert]])
            assert torch.equal(new.down_DF, old.down_DF[:, kept[expert]])


def test_arctic_layers_without_experts_keep_their_width(
    tmp_path: Path, text: Path
) -> None:
    checkpoint = original(tmp_path / "model", "arctic", moe_layer_frequency=2)
    found = run(checkpoint, recipe_of(text), tmp_path / "out")
    assert [layer.has_moe for layer in found.layers] == [False, True]
    assert found.config["per_layer_config"] == {"0": {"intermediate_size": 96}}
    assert found.config["architectures"] == [checkpoint.arch.pruned_architecture]


def test_fp8_experts_lose_whole_blocks_with_their_scales(
    tmp_path: Path, text: Path
) -> None:
    checkpoint = original(tmp_path / "model", "deepseek_v3", width=128, fp8=(32, 32))
    recipe = recipe_of(
        text,
        narrow={"share": 0.5},
        slim={"method": "wanda", "sparsity": 0.25},
    )
    found = run(checkpoint, recipe, tmp_path / "out")
    layer = found.moe_layers[0]
    kept = read_channels(tmp_path / "out", layer.index, layer.num_experts, 128, 64)
    assert all(
        channels.view(2, 32)[:, 0].remainder(32).eq(0).all() for channels in kept
    )
    bad = original(tmp_path / "odd", "deepseek_v3", width=96, fp8=(64, 64))
    with pytest.raises(RecipeError, match="do not divide into FP8 blocks of 64"):
        make_plan(None, recipe, model_facts(bad), tool_version="")


def test_narrowing_what_was_narrowed_before(tmp_path: Path, text: Path) -> None:
    checkpoint = original(tmp_path / "model", width=128)
    fields = {"narrow": {"share": 0.25, "refit": "none"}}
    first = run(checkpoint, recipe_of(text, **fields), tmp_path / "first")
    second = run(first, recipe_of(text, **fields), tmp_path / "second")
    widths = [one.moe_layers[0].width for one in (checkpoint, first, second)]
    assert widths == [128, 96, 64]
    one = read_channels(tmp_path / "first", 0, 8, 128, 96)
    two = read_channels(tmp_path / "second", 0, 8, 96, 64)
    for expert in range(8):
        through = one[expert][two[expert]]
        old = read_expert(checkpoint, checkpoint.layers[0], expert)
        new = read_expert(second, second.layers[0], expert)
        assert torch.equal(new.down_DF, old.down_DF[:, through])


def test_a_killed_cut_continues_to_the_same_bytes(tmp_path: Path, text: Path) -> None:
    checkpoint = original(tmp_path / "model")
    recipe = recipe_of(text, experts={"drop": 0.25}, slim={"sparsity": 0.5})
    how: dict[str, Any] = {"max_shard_bytes": 40_000}
    run(checkpoint, recipe, tmp_path / "whole", **how)
    with pytest.raises(Killed):
        run(
            checkpoint, recipe, tmp_path / "out", report=at_layer(1, stage="cut"), **how
        )
    run(checkpoint, recipe, tmp_path / "out", resume=True, **how)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_verify_finds_what_is_not_the_plan(tmp_path: Path, text: Path) -> None:
    checkpoint = original(tmp_path / "model")
    run(checkpoint, recipe_of(text), tmp_path / "out")
    file = tmp_path / "out" / "moe_prune" / "channels.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="layer 1, expert 7: names"):
        pipeline.verify(tmp_path / "out", checkpoint)
    shutil.rmtree(file.parent)
    with pytest.raises(CheckpointError, match="missing, but its experts were narrowed"):
        pipeline.verify(tmp_path / "out", checkpoint)
