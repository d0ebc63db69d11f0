"""Streaming perplexity against transformers' on the same windows."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, MixtralForCausalLM

from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate import perplexity as streaming
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import perplexity
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.remap import ExpertRemap
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import CalibrationError, CheckpointError
from vllm_moe_prune.progress import Progress
from vllm_moe_prune.recipes.schema import parse_recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    return open_checkpoint(tiny_checkpoint(folder, dtype="float32", layers=2))


def stock_model(folder: Path) -> MixtralForCausalLM:
    return MixtralForCausalLM.from_pretrained(
        folder, dtype="float32", experts_implementation="eager"
    ).eval()


@torch.no_grad()
def by_transformers(
    model: MixtralForCausalLM, folder: Path, text: str, length: int
) -> tuple[float, int]:
    """Each window alone, BOS in front, the last one shorter."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    total = 0.0
    for start in range(0, len(ids), length - 1):
        window = torch.tensor([[1, *ids[start : start + length - 1]]])
        logits = model(window, use_cache=False).logits[0, :-1]
        total += float(functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return total, len(ids)


@pytest.mark.parametrize("length", [32, 57, 10_000])
def test_perplexity_equals_that_of_transformers(
    checkpoint: Checkpoint,
    tmp_path: Path,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three windows of 32 tokens a batch.
    monkeypatch.setattr(streaming, "BATCH_BYTES", 3 * 32 * 64 * 4)
    path = tiny_text(tmp_path, 2_000)
    found = perplexity(checkpoint, str(path), sequence_length=length)
    # 10 000 is capped at the 512 positions of the model.
    model, folder = stock_model(checkpoint.folder), checkpoint.folder
    total, count = by_transformers(model, folder, path.read_text(), min(length, 512))
    assert found.tokens == count
    assert found.nll_sum == pytest.approx(total, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.source == "text.txt"
    if length == 10_000:
        named = perplexity(checkpoint, str(path), name="miller", max_tokens=8)
        assert named.source == "miller"


@torch.no_grad()
def prune_in_memory(model: MixtralForCausalLM, remap: ExpertRemap) -> None:
    """Make the stock original compute what a pruned checkpoint should."""
    blocks = model.model.layers
    for entry in remap.layers:
        block = blocks[entry.original_layer]
        if entry.moe_dropped:
            block.mlp.experts.down_proj.zero_()
            continue
        # The stock experts skip a number that is one too high.
        served = range(len(entry.kept)) if entry.redirect is None else entry.redirect
        targets = [8 if new is None else entry.kept[new] for new in served]

        def reroute(
            _module: object,
            _args: object,
            output: tuple[torch.Tensor, ...],
            rows: tuple[int, ...] = entry.router_rows,
            targets: list[int] = targets,
        ) -> tuple[torch.Tensor, ...]:
            logits = output[0][:, list(rows)]
            best = logits.softmax(-1).topk(2)
            weights = best.values / best.values.sum(-1, keepdim=True)
            return logits, weights, torch.tensor(targets)[best.indices]

        block.mlp.gate.register_forward_hook(reroute)
    model.model.layers = torch.nn.ModuleList(
        [blocks[entry.original_layer] for entry in remap.layers]
    )
    model.config.num_hidden_layers = len(remap.layers)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["drop", "redirect"])
@pytest.mark.parametrize("layers", [{}, {"drop_moe": [1]}, {"drop_blocks": [2]}])
def test_pruned_checkpoints_compute_what_was_left_of_the_original(
    tmp_path: Path, routing: str, layers: dict[str, list[int]]
) -> None:
    original = open_checkpoint(tiny_checkpoint(tmp_path / "model", dtype="float32"))
    experts = {"drop": 0.3, "coactivation_weight": 0, "reconstruct": "never"}
    asked = {
        "experts": experts,
        "slim": {"method": "none"},
        "routing": routing,
        "layers": layers,
    }
    out = tmp_path / "pruned"
    pipeline.run(original, parse_recipe(asked, "test"), out, pipeline.RunOptions())
    pruned = open_checkpoint(out)
    assert len({layer.num_experts for layer in pruned.moe_layers}) > 1
    assert pruned.remap is not None
    model = stock_model(original.folder)
    prune_in_memory(model, pruned.remap)
    path = tiny_text(tmp_path, 1_000)
    total, count = by_transformers(model, out, path.read_text(), 64)
    found = perplexity(pruned, str(path), sequence_length=64)
    assert found.tokens == count
    assert found.nll_sum == pytest.approx(total, rel=1e-5)


def test_weights_that_give_no_finite_loss_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamingModel, "nll", lambda *_: (math.nan, 3))
    with pytest.raises(CheckpointError, match=r"its loss on .* is nan"):
        perplexity(checkpoint, str(tiny_text(tmp_path, 500)), sequence_length=16)


def test_only_so_many_tokens_are_used(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tiny_text(tmp_path, 2_000)
    found = perplexity(checkpoint, str(path), sequence_length=16, max_tokens=50)
    assert found.tokens == 50


def test_progress_counts_every_layer_of_every_batch(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BATCH_BYTES", 1)
    path = tiny_text(tmp_path, 400)
    seen: list[Progress] = []
    perplexity(
        checkpoint, str(path), sequence_length=16, max_tokens=40, report=seen.append
    )
    assert [progress.layer for progress in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1].layers == 6
    assert seen[-1].bytes_done == seen[-1].bytes_total


def test_a_text_of_one_token_predicts_nothing(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1)
    path = tmp_path / "a.txt"
    path.write_text("a")
    # With BOS in front even one token is predicted; without, nothing is left.
    assert perplexity(open_checkpoint(folder), str(path)).tokens == 1
    content = (folder / "tokenizer_config.json").read_text()
    (folder / "tokenizer_config.json").write_text(
        content.replace('"bos_token": "<s>"', '"bos_token": null').replace(
            '"add_bos_token": true', '"add_bos_token": false'
        )
    )
    with pytest.raises(CalibrationError, match="nothing is left to predict"):
        perplexity(open_checkpoint(folder), str(path))


def test_windows_need_two_tokens(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="at least 2"):
        perplexity(checkpoint, str(tiny_text(tmp_path)), sequence_length=1)
