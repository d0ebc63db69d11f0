"""The streaming forward against transformers' own, in every spelling of the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

from tests.streamed import streamed_loss
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.archs import find_arch
from vllm_moe_prune.calibrate.forward import NO_TARGET, StreamingModel
from vllm_moe_prune.calibrate.perplexity import run_layer
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import CalibrationError, CheckpointError

LAYOUTS = [layout.name for layout in find_arch("mixtral", "test").layouts]


@pytest.fixture(scope="module")
def tokens_ST() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 512, (4, 64), generator=generator)


@torch.no_grad()
def transformers_loss(folder: Path, tokens_ST: torch.Tensor, dtype: str) -> float:
    model = MixtralForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    return float(model.eval()(tokens_ST, labels=tokens_ST).loss)


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_every_layout_gives_the_loss_of_transformers(
    tmp_path: Path, tokens_ST: torch.Tensor, dtype: str, noise: float
) -> None:
    losses = {}
    for layout in LAYOUTS:
        folder = tiny_checkpoint(tmp_path / layout, layout=layout, dtype=dtype)
        losses[layout] = streamed_loss(folder, tokens_ST).mean
    reference = transformers_loss(tmp_path / LAYOUTS[0], tokens_ST, dtype)
    # The model is not degenerate: it prefers some tokens over others.
    assert abs(reference - torch.tensor(512.0).log()) > 0.1
    assert len(LAYOUTS) == 6
    assert len(set(losses.values())) == 1
    assert losses[LAYOUTS[0]] == pytest.approx(reference, rel=noise)


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 16},
        {"tied": True},
        {"head_dim": 16, "kv_heads": 2},
        {"experts": 1, "top_k": 1},
        {"rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 2.0,
                                                 "rope_theta": 1e4}},
        {"hidden_act": "gelu"},
    ],
    ids=["sliding", "tied", "head_dim", "one expert", "linear rope", "gelu"],
)  # fmt: skip
def test_config_variants_give_the_loss_of_transformers(
    tmp_path: Path, tokens_ST: torch.Tensor, options: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(tmp_path, dtype="float32", layers=2, shards=1, **options)
    loss = streamed_loss(folder, tokens_ST).mean
    assert loss == pytest.approx(
        transformers_loss(folder, tokens_ST, "float32"), rel=1e-5
    )


def test_batching_does_not_change_the_result(
    tmp_path: Path, tokens_ST: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path, dtype="float32", sliding_window=16)
    whole = streamed_loss(folder, tokens_ST).mean
    for module in ("memory", "expert_forward"):
        name = f"vllm_moe_prune.calibrate.{module}.TEMPORARY_BYTES"
        monkeypatch.setattr(name, 100_000)
    monkeypatch.setattr("vllm_moe_prune.calibrate.forward.LOGIT_BYTES", 10_000)
    assert streamed_loss(folder, tokens_ST).mean == pytest.approx(whole, rel=1e-6)


def test_repeating_gives_the_same_bits(tmp_path: Path, tokens_ST: torch.Tensor) -> None:
    folder = tiny_checkpoint(tmp_path)
    assert (
        streamed_loss(folder, tokens_ST).mean == streamed_loss(folder, tokens_ST).mean
    )


def test_dropped_moe_sublayers_leave_attention_and_residual(
    tmp_path: Path, tokens_ST: torch.Tensor
) -> None:
    """The same as experts that give nothing."""
    folder = tiny_checkpoint(tmp_path / "a", dtype="float32", layers=3)
    checkpoint = open_checkpoint(folder)
    model = StreamingModel(checkpoint)
    hidden_STD = model.embed(tokens_ST)
    run_layer(model, 0, hidden_STD)
    model.enter(1, hidden_STD)
    run_layer(model, 2, hidden_STD)
    lost = model.nll(hidden_STD, tokens_ST)[0] / tokens_ST[:, 1:].numel()

    reference = MixtralForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with torch.no_grad():
        reference.model.layers[1].mlp.experts.down_proj.zero_()
        loss = float(reference(tokens_ST, labels=tokens_ST).loss)
    assert lost == pytest.approx(loss, rel=1e-5)


def test_one_sweep_over_all_layers_is_one_forward_pass(
    tmp_path: Path, tokens_ST: torch.Tensor
) -> None:
    folder = tiny_checkpoint(tmp_path, tokenizer=False)
    model = StreamingModel(open_checkpoint(folder))
    assert model.forward_passes == 0
    hidden_STD = model.embed(tokens_ST)
    for index in range(model.num_layers):
        run_layer(model, index, hidden_STD)
        assert model.forward_passes == 1
    run_layer(model, 0, hidden_STD)
    assert model.forward_passes == 2


def test_filled_up_targets_do_not_count(
    tmp_path: Path, tokens_ST: torch.Tensor
) -> None:
    folder = tiny_checkpoint(tmp_path, dtype="float32", layers=1, tokenizer=False)
    model = StreamingModel(open_checkpoint(folder))
    hidden_STD = model.embed(tokens_ST)
    short = model.nll(hidden_STD[:, :10], tokens_ST[:, :10])
    filled_ST = tokens_ST.clone()
    filled_ST[:, 10:] = NO_TARGET
    assert model.nll(hidden_STD, filled_ST) == pytest.approx(short)
    assert short[1] == 4 * 9


def checkpoint_without(folder: Path, name: str) -> Checkpoint:
    checkpoint = open_checkpoint(tiny_checkpoint(folder, tokenizer=False, layers=2))
    del checkpoint.tensors[name]
    return checkpoint


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_missing_tensor_is_named_before_anything_is_read(
    tmp_path: Path, name: str
) -> None:
    checkpoint = checkpoint_without(tmp_path, name)
    with pytest.raises(CheckpointError, match=name):
        StreamingModel(checkpoint)


def test_a_misshapen_attention_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    with pytest.raises(CheckpointError, match=r"k_proj.weight has shape \[32, 64\]"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rope_theta": "big"},
        {"rope_scaling": {"rope_type": "x"}},
        {"rms_norm_eps": "x"},
    ],
)
def test_a_config_that_builds_no_model_is_one_line(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(tmp_path, tokenizer=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | wrong))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="cannot build a") as caught:
        StreamingModel(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_token_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    model = StreamingModel(open_checkpoint(tiny_checkpoint(tmp_path)))
    with pytest.raises(CalibrationError, match="token 512, but the model knows 512"):
        model.embed(torch.tensor([[1, 512]]))


def test_an_unused_tensor_is_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path, tokenizer=False))
    for name in ("self_attn.q_proj.bias", "self_attn.rotary_emb.inv_freq"):
        some = checkpoint.tensors["model.norm.weight"]
        checkpoint.tensors[f"model.layers.0.{name}"] = some
    StreamingModel(checkpoint)
    assert "q_proj.bias" in caplog.text
    assert "inv_freq" not in caplog.text
