"""``vllm-moe-prune serve``: which of the words is the checkpoint, and what goes on."""

import shlex
from pathlib import Path

import pytest

from vllm_moe_prune.errors import ServeError
from vllm_moe_prune.plugin.launch import split_model


@pytest.fixture(autouse=True)
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder ``ckpt`` to be served."""
    (tmp_path / "ckpt").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("typed", "model", "rest"),
    [
        ("ckpt --port 8000", "ckpt", "--port 8000"),
        ("--port 8000 ckpt", "ckpt", "--port 8000"),
        ("--port=8000 ckpt", "ckpt", "--port=8000"),
        ("-tp 2 ckpt --enforce-eager", "ckpt", "-tp 2 --enforce-eager"),
        ("--enforce-eager ckpt --port 8000", "ckpt", "--enforce-eager --port 8000"),
        ("--port 8000 --enforce-eager ckpt", "ckpt", "--port 8000 --enforce-eager"),
        ("--port 8000 owner/name", "owner/name", "--port 8000"),
        ("--served-model-name a b ckpt", "ckpt", "--served-model-name a b"),
        # What is not there is said to be so, by whoever opens it.
        ("typo --tokenizer a/b", "typo", "--tokenizer a/b"),
        ("--port 8000 typo", "typo", "--port 8000"),
        ("typo ckpt", "typo", "ckpt"),
    ],
)
def test_the_checkpoint_may_stand_anywhere(typed: str, model: str, rest: str) -> None:
    assert split_model(shlex.split(typed)) == (model, shlex.split(rest))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--port 8000", "checkpoint among '8000'"),
        ("--enforce-eager typo", "checkpoint among 'typo'"),
        ("--tokenizer a/b --enforce-eager c/d", "checkpoint among 'a/b', 'c/d'"),
        ("--enforce-eager", "no checkpoint. Name it first: vllm-moe-prune serve MODEL"),
    ],
)
def test_what_may_be_a_value_is_not_guessed(typed: str, said: str) -> None:
    with pytest.raises(ServeError, match=said):
        split_model(shlex.split(typed))
