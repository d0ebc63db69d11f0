"""Streaming perplexity against transformers' on the same windows."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer, MixtralForCausalLM

from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import evaluate
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import CalibrationError
from vllm_moe_prune.evaluate import perplexity
from vllm_moe_prune.progress import Progress


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    return open_checkpoint(tiny_checkpoint(folder, dtype="float32", layers=2))


@torch.no_grad()
def by_transformers(folder: Path, text: str, length: int) -> tuple[float, int]:
    """Each window alone, BOS in front, the last one shorter."""
    ids = AutoTokenizer.from_pretrained(folder)(
        text, add_special_tokens=False
    ).input_ids
    model = MixtralForCausalLM.from_pretrained(folder, dtype="float32").eval()
    total = 0.0
    for start in range(0, len(ids), length - 1):
        window = torch.tensor([[1, *ids[start : start + length - 1]]])
        logits = model(window).logits[0, :-1]
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
    monkeypatch.setattr(evaluate, "BATCH_BYTES", 3 * 32 * 64 * 4)
    path = tiny_text(tmp_path, 2_000)
    found = perplexity(checkpoint, str(path), sequence_length=length)
    # 10 000 is capped at the 512 positions of the model.
    total, count = by_transformers(
        checkpoint.folder, path.read_text(), min(length, 512)
    )
    assert found.tokens == count
    assert found.nll_sum == pytest.approx(total, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.source == "text.txt"


def test_only_so_many_tokens_are_used(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tiny_text(tmp_path, 2_000)
    found = perplexity(checkpoint, str(path), sequence_length=16, max_tokens=50)
    assert found.tokens == 50


def test_progress_counts_every_layer_of_every_batch(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "BATCH_BYTES", 1)
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
