"""From text to windows of tokens, and every way in which a text can be unusable."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.tiny import sentences, tiny_checkpoint, tiny_text, write_tokenizer
from vllm_moe_prune.calibrate import text as text_module
from vllm_moe_prune.calibrate.data import READ_MULTIPLE, TokenReader, load_tokens
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import CalibrationError, MissingExtra
from vllm_moe_prune.recipes.schema import Calibration


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    return open_checkpoint(tiny_checkpoint(folder, layers=1, max_positions=256))


def asking(source: Path | str | None, **options: Any) -> Calibration:
    asked = {"samples": 6, "sequence_length": 32} | options
    return Calibration(source=None if source is None else str(source), **asked)


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_windows_are_consecutive_text_after_a_bos_token(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tiny_text(tmp_path, 20_000)
    tokens = load_tokens(checkpoint, asking(path))
    assert tokens.ids_ST.dtype == torch.int64
    assert tokens.ids_ST.shape == (6, 32)
    assert tokens.ids_ST[:, 0].tolist() == [1] * 6
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    ids = tokenizer(path.read_text(), add_special_tokens=False).input_ids
    windows = [ids[at : at + 31] for at in range(0, len(ids) - 30, 31)]
    chosen = [windows.index(row) for row in tokens.ids_ST[:, 1:].tolist()]
    assert chosen == sorted(set(chosen))
    assert tokens.source == "text.txt"
    assert tokens.describe() == {
        "source": "text.txt",
        "sha256": tokens.sha256,
        "samples": 6,
        "sequence_length": 32,
        "seed": 0,
        "windows": READ_MULTIPLE * 6,
    }


def test_the_seed_chooses_and_repeats(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tiny_text(tmp_path, 20_000)
    state = torch.get_rng_state()
    first = load_tokens(checkpoint, asking(path))
    assert load_tokens(checkpoint, asking(path)).sha256 == first.sha256
    assert load_tokens(checkpoint, asking(path, seed=1)).sha256 != first.sha256
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tokenizer_without_bos_gives_windows_without_one(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["add_bos_token"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = load_tokens(open_checkpoint(folder), asking(tiny_text(tmp_path)))
    assert tokens.ids_ST.shape == (6, 32)
    assert 1 not in tokens.ids_ST


def test_windows_are_no_longer_than_the_model_allows(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tiny_text(tmp_path)
    tokens = load_tokens(checkpoint, asking(path, sequence_length=2048))
    assert tokens.ids_ST.shape == (6, 256)
    assert tokens.describe()["sequence_length_asked"] == 2048


def test_only_a_multiple_of_what_is_needed_is_read(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tiny_text(tmp_path, 800_000)
    with path.open("ab") as file:
        file.write(b"\xff\xff")  # never reached
    tokens = load_tokens(checkpoint, asking(path))
    assert tokens.windows == READ_MULTIPLE * 6


def test_jsonl_records_are_separated_by_the_end_of_text_token(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = write_jsonl(
        tmp_path / "some.jsonl", [{"text": "bread"}, {"text": "stones", "id": 3}]
    )
    ids = TokenReader(checkpoint, str(path)).read().tolist()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    assert tokenizer.decode(ids) == "bread</s>stones</s>"


def test_jsonl_messages_go_through_the_chat_template(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    messages = [
        {"role": "user", "content": "bread?"},
        {"role": "assistant", "content": "stones."},
    ]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    ids = TokenReader(checkpoint, str(path)).read().tolist()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    assert tokenizer.decode(ids) == "<s>[user] bread?</s>[assistant] stones.</s>"
    assert ids[0] == 1


def test_a_data_set_is_read_by_name_and_split(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder OWNER/NAME stands for the Hub, as the datasets package allows."""
    folder = tmp_path / "some" / "set"
    folder.mkdir(parents=True)
    records = [{"text": sentences(400, seed)} for seed in range(40)]
    write_jsonl(folder / "train.jsonl", records)
    write_jsonl(folder / "test.jsonl", records[::-1])
    monkeypatch.chdir(tmp_path)
    tokens = load_tokens(checkpoint, asking("hub:some/set"))
    assert tokens.ids_ST.shape == (6, 32)
    assert tokens.source == "hub:some/set"
    other = load_tokens(checkpoint, asking("hub:some/set:test"))
    assert other.sha256 != tokens.sha256
    with pytest.raises(CalibrationError, match="hub:some/set:absent: cannot be read"):
        load_tokens(checkpoint, asking("hub:some/set:absent"))


def test_an_unreachable_data_set_is_one_line(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError) as caught:
        load_tokens(checkpoint, asking("hub:no-such-owner/no-such-set/en:train"))
    message = str(caught.value)
    assert message.startswith("hub:no-such-owner/no-such-set/en:train: cannot be read")
    assert "\n" not in message
    assert "--calibration" in message


def test_without_the_datasets_package_its_name_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"vllm-moe-prune\[datasets\]"):
        list(text_module.read_documents("hub:a/b", None))


@pytest.mark.parametrize("source", ["hub:", "hub:a/b/c/d", "hub:/b", "hub::train"])
def test_a_hub_name_of_another_form_is_refused(source: str) -> None:
    with pytest.raises(CalibrationError, match="expected hub:OWNER/NAME"):
        list(text_module.read_documents(source, None))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"text\0text", "NUL bytes"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8 text .byte 0xe9"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON: maximum recursion"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: not valid JSON"),
        ("a.jsonl", b'{"content": "x"}\n', "neither 'text' nor 'messages'.*content"),
        ("a.jsonl", b"[1]\n", "neither 'text' nor 'messages'"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\0\n', "NUL bytes"),
    ],
)
def test_an_unusable_text_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        load_tokens(checkpoint, asking(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (
            "{{ raise_exception('no system role') }}",
            "line 1: the chat .*no system role",
        ),
    ],
)
def test_messages_need_a_chat_template_that_takes_them(
    tmp_path: Path, template: str | None, message: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user"}]}])
    with pytest.raises(CalibrationError, match=message):
        load_tokens(open_checkpoint(folder), asking(path))


def test_too_short_a_text_is_refused_with_numbers(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tiny_text(tmp_path, 1_000)
    with pytest.raises(
        CalibrationError,
        match=r"gives \d windows of 32 tokens, but 128 are asked for. Use a longer",
    ):
        load_tokens(checkpoint, asking(path, samples=128))


def test_a_missing_file_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nothing.txt: no such text file"):
        load_tokens(checkpoint, asking(tmp_path / "nothing.txt"))


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1, tokenizer=False)
    with pytest.raises(CalibrationError, match="has no tokenizer"):
        load_tokens(open_checkpoint(folder), asking(tiny_text(tmp_path)))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1, vocab=300, tokenizer=False)
    write_tokenizer(folder, 512)
    with pytest.raises(CalibrationError, match=r"gives token \d+, but .* knows 300"):
        load_tokens(open_checkpoint(folder), asking(tiny_text(tmp_path)))


def test_a_damaged_tokenizer_is_one_line(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CalibrationError, match="tokenizer cannot be loaded") as caught:
        load_tokens(open_checkpoint(folder), asking(tiny_text(tmp_path)))
    assert "\n" not in str(caught.value)
