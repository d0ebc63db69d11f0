"""The tokenizer is what the files say, whatever class they name, on every path."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from tests.bad_inputs.case import run_cli
from tests.tiny import tiny_checkpoint, write_tokenizer
from tests.tokenizers_of import (
    TEXTS,
    byte_level,
    ids_by_file,
    ids_by_sentencepiece,
    model_type,
    sentencepiece_only,
    tiktoken_with_code,
)
from vllm_moe_prune import configs
from vllm_moe_prune.calibrate.data import TokenReader
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.checkpoint.tokenizer import (
    corrections,
    load_tokenizer,
    needs_code,
    tokenizer_folder,
)
from vllm_moe_prune.errors import CalibrationError, OutputError
from vllm_moe_prune.plugin.launch import serve_command

FAMILIES = ("mixtral", "arctic", "deepseek", "deepseek_v2", "deepseek_v3")
CLASSES = (
    *("LlamaTokenizerFast", "LlamaTokenizer", "CodeLlamaTokenizer", "GPT2Tokenizer"),
    *("Qwen2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "NoSuchClass"),
)
LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
}


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CLASSES)
def test_tokenizer_json_decides_and_a_corrected_folder_gives_everybody_its_ids(
    tmp_path: Path, family: str, name: str
) -> None:
    folder = model_type(byte_level(tmp_path / "model", name), family)
    configs.register()
    tokenizer = load_tokenizer(folder)
    with tokenizer_folder(folder, trust_code=False) as corrected:
        elsewhere = AutoTokenizer.from_pretrained(corrected)
        for text in TEXTS:
            expected = ids_by_file(folder, text)
            assert ids(tokenizer, text) == ids(elsewhere, text) == expected
            assert tokenizer.decode(expected) == elsewhere.decode(expected) == text
    assert tokenizer("a").input_ids[0] == 1
    assert tokenizer.chat_template == elsewhere.chat_template
    assert tokenizer.name_or_path == str(folder)


def test_only_a_class_that_gives_other_ids_is_corrected(tmp_path: Path) -> None:
    """The failing case: DeepSeek-MoE, whose settings name LlamaTokenizerFast."""
    for family, name, wrong in (
        ("deepseek", "LlamaTokenizerFast", True),
        ("deepseek_v3", "LlamaTokenizerFast", False),
        ("mixtral", "LlamaTokenizer", False),
    ):
        folder = byte_level(tmp_path / family, name, model_max_length=9)
        model_type(folder, family)
        configs.register()
        text = TEXTS[0]
        picked = AutoTokenizer.from_pretrained(folder)
        assert (ids(picked, text) != ids_by_file(folder, text)) == wrong
        files = corrections(folder)
        assert set(files) == ({"tokenizer_config.json"} if wrong else set())
        if wrong:
            before = json.loads((folder / "tokenizer_config.json").read_text())
            after = json.loads(files["tokenizer_config.json"])
            assert after == before | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_tokenizer_json_needs_no_code_though_code_is_named(tmp_path: Path) -> None:
    folder = byte_level(
        tmp_path / "model",
        "OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]},
    )
    for family in FAMILIES:
        model_type(folder, family)
        assert ids(load_tokenizer(folder), TEXTS[0]) == ids_by_file(folder, TEXTS[0])
        with tokenizer_folder(folder, trust_code=False) as corrected:
            picked = AutoTokenizer.from_pretrained(corrected)
            assert ids(picked, TEXTS[0]) == ids_by_file(folder, TEXTS[0])


MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "trained with defaults": {
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "byte_fallback": False,
    },
    "identity, spaces removed": {"remove_extra_whitespaces": True},
    "unigram": {
        "model_type": "unigram",
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
    "no space in front": {"add_dummy_prefix": False},
    "symbols of the user": {"user_defined_symbols": ["<x>", "<xy>", "No."]},
    "unigram, symbols": {"model_type": "unigram", "user_defined_symbols": ["<x>"]},
    "space behind": {"treat_whitespace_as_suffix": True},
    "characters": {"model_type": "char"},
}


@pytest.mark.parametrize("how", MODELS.values(), ids=MODELS)
def test_sentencepiece_alone_gives_what_sentencepiece_gives(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    configs.register()
    folder = sentencepiece_only(tmp_path / "model", LLAMA, **how)
    for family in ("mixtral", "deepseek"):
        tokenizer = load_tokenizer(model_type(folder, family))
        with tokenizer_folder(folder, trust_code=False) as corrected:
            elsewhere = AutoTokenizer.from_pretrained(corrected)
        for text in (*TEXTS, "a<x>b <xy> No. <x", "<x>", " ▁ "):
            expected = ids_by_sentencepiece(folder, text)
            assert ids(tokenizer, text) == ids(elsewhere, text) == expected
        assert tokenizer("a").input_ids[0] == elsewhere("a").input_ids[0] == 1
        assert tokenizer.eos_token == elsewhere.eos_token == "</s>"


@pytest.fixture(scope="module")
def like_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = sentencepiece_only(tmp_path_factory.mktemp("llama"), LLAMA)
    return folder, load_tokenizer(model_type(folder, "mixtral"))


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=strategies.text(alphabet=strategies.characters(exclude_categories=["Cs"])))
def test_sentencepiece_and_its_conversion_agree_on_any_text(
    like_llama: tuple[Path, Any], text: str
) -> None:
    folder, tokenizer = like_llama
    if not any(name in text for name in ("<s>", "</s>", "<unk>")):
        assert ids(tokenizer, text) == ids_by_sentencepiece(folder, text)


def test_pieces_get_the_names_that_the_settings_give_them(tmp_path: Path) -> None:
    """Arctic's: tokens of the chat template stand where unused pieces were."""
    folder = sentencepiece_only(tmp_path / "model", None)
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [model.IdToPiece(at) for at in range(model.GetPieceSize())]
    # Letters of which no other piece is made.
    alone = (sum(one in other for other in pieces) == 1 for one in pieces)
    start, end = [at for at, only in enumerate(alone) if only][-2:]
    named = {
        str(start): {"content": "<|im_start|>", "special": True},
        str(end): {"content": "<|im_end|>", "special": True},
    }
    given = LLAMA | {"added_tokens_decoder": named, "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    tokenizer = load_tokenizer(model_type(folder, "arctic"))
    assert ids(tokenizer, "<|im_start|>") == [start]
    assert tokenizer.eos_token_id == end
    with tokenizer_folder(folder, trust_code=False) as corrected:
        elsewhere = AutoTokenizer.from_pretrained(corrected)
        assert ids(elsewhere, "<|im_start|>") == [start]


def test_tokens_behind_the_pieces_have_the_ids_of_the_settings(tmp_path: Path) -> None:
    folder = model_type(sentencepiece_only(tmp_path / "model", None), "mixtral")
    size = len(load_tokenizer(folder))
    for place, fits in ((size, True), (size + 7, False), (2**31, False)):
        given = LLAMA | {"added_tokens_decoder": {str(place): {"content": "<new>"}}}
        (folder / "tokenizer_config.json").write_text(json.dumps(given))
        if fits:
            assert ids(load_tokenizer(folder), "<new>") == [place]
            continue
        with pytest.raises(CalibrationError, match=f"{place}, but it would get {size}"):
            load_tokenizer(folder)


def test_sentencepiece_without_settings_names_its_own_tokens(tmp_path: Path) -> None:
    folder = model_type(sentencepiece_only(tmp_path / "model", None), "mixtral")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer("a").input_ids[0] == 1
    settings = json.loads(corrections(folder)["tokenizer_config.json"])
    assert settings["bos_token"] == "<s>"


def test_what_only_code_can_tokenize_is_refused_unless_allowed(tmp_path: Path) -> None:
    """Moonlight's, which transformers would split by a rule of its own."""
    folder = model_type(tiktoken_with_code(tmp_path / "model"), "deepseek_v3")
    with pytest.raises(CalibrationError, match=r"OwnTokenizer.*--trust-remote-code"):
        load_tokenizer(folder)
    with pytest.raises(CalibrationError, match="--trust-remote-code"):
        needs_code(folder, trust_code=False)
    tokenizer = load_tokenizer(folder, trust_code=True)
    assert ids(tokenizer, "Aé") == [ord("A") * 7 % 256, ord("é") * 7 % 256]
    assert needs_code(folder, trust_code=True)
    assert corrections(folder) == {}
    with tokenizer_folder(folder, trust_code=True) as same:
        assert same == folder


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer.model", "x.tiktoken"])
def test_pieces_without_a_rule_of_splitting_are_refused(
    tmp_path: Path, name: str
) -> None:
    folder = model_type(tiktoken_with_code(tmp_path / "model"), "deepseek_v3")
    (folder / "tiktoken.model").rename(folder / name)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "OwnTokenizer"}')
    for trusted in (False, True):
        with pytest.raises(CalibrationError, match="how text is split"):
            load_tokenizer(folder, trust_code=trusted)


def test_settings_alone_are_no_tokenizer(tmp_path: Path) -> None:
    folder = model_type(byte_level(tmp_path / "model", "LlamaTokenizer"), "mixtral")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CalibrationError, match="tokenizer"):
        load_tokenizer(folder)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text("utf-8"))
        change(content)
        path.write_text(json.dumps(content), "utf-8")

    return edit


def far_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary.update({name: at + 2**31 for name, at in vocabulary.items()})


def pattern(regex: str) -> Callable[[dict[str, Any]], object]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}
    return lambda content: content.update(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, content["pre_tokenizer"]],
        }
    )


def nested(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[" * 10**5)


def endless(folder: Path) -> None:
    byte_level(folder, "LlamaTokenizer", model_max_length=[])


def fifo(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def device(folder: Path) -> None:
    (folder / "special_tokens_map.json").symlink_to("/dev/zero")


SPOILED = {
    "ids from 2**31": (edited(far_ids), "has id 2147"),
    "an added id of 2**31": (
        edited(lambda content: content["added_tokens"][0].update(id=2**31)),
        "has id 2147483648",
    ),
    "a negative id": (
        edited(lambda content: content["model"]["vocab"].update({"a": -1})),
        "has id -1",
    ),
    "a pattern that is none": (edited(pattern("(")), "parenthesis"),
    "a normalizer that panics": (
        edited(
            lambda content: content.update(
                normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
            )
        ),
        "Precompiled",
    ),
    "nested": (nested, "not valid JSON"),
    "a length that is none": (endless, "cannot be loaded"),
    "a FIFO": (fifo, "not a regular file"),
    "a device": (device, "not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "says"), SPOILED.values(), ids=SPOILED)
def test_a_hostile_tokenizer_is_refused_in_one_line(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    says: str,
) -> None:
    folder = model_type(byte_level(tmp_path / "model", "LlamaTokenizer"), "mixtral")
    spoil(folder)
    with pytest.raises(CalibrationError, match=says) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert corrections(folder) == {}
    assert capfd.readouterr().err == ""


def test_without_room_for_a_copy_nothing_is_left_uncorrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_type(byte_level(tmp_path / "model", "LlamaTokenizer"), "deepseek")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    for load in (corrections, load_tokenizer):
        with pytest.raises(OutputError, match="absent: a copy of the tokenizer cannot"):
            load(folder)


def test_a_pattern_that_panics_on_a_text_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1)
    write_tokenizer(folder)
    edited(pattern(r"(a|aa)+$|(?:x+x+)+y"))(folder)
    path = tmp_path / "text.txt"
    path.write_text(("a" * 60 + " ") * 9)
    with pytest.raises(
        CalibrationError, match=r"gives up on .*text\.txt: .*retry-limit"
    ):
        TokenReader(open_checkpoint(folder), str(path)).read()
    assert capfd.readouterr().err == ""


def test_calibration_ids_are_those_of_the_file(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", layers=1, vocab=512)
    config = json.loads((folder / "config.json").read_text())
    byte_level(folder, "LlamaTokenizerFast")
    (folder / "config.json").write_text(json.dumps(config))
    path = tmp_path / "text.txt"
    path.write_text(TEXTS[0], "utf-8")
    found = TokenReader(open_checkpoint(folder), str(path)).read()
    assert found.tolist() == ids_by_file(folder, TEXTS[0])
    shutil.rmtree(folder)


def with_code(folder: Path) -> Path:
    """A tiny DeepSeek-V3 whose tokenizer is code, as Moonlight is."""
    tiny_checkpoint(
        folder, model_type="deepseek_v3", layers=2, vocab=512, tokenizer=False
    )
    return tiktoken_with_code(folder)


def test_the_command_line_asks_before_code_tokenizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with_code(tmp_path / "model")
    (tmp_path / "text.txt").write_text("plain words, all of them short. " * 200)
    for command in (
        "eval model --text text.txt --sequence-length 64 --max-tokens 200 --json",
        "run model out --recipe wanda50 --samples 2 --sequence-length 32 --json "
        "--calibration text.txt",
    ):
        assert run_cli(command, monkeypatch, capsys).status == 2
        allowed = run_cli(f"{command} --trust-remote-code", monkeypatch, capsys)
        assert allowed.status == 0, allowed
    assert (tmp_path / "out/tokenization_own.py").is_file()


def test_the_server_is_not_started_where_code_would_have_to_tokenize(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(with_code(tmp_path / "model"))
    with pytest.raises(CalibrationError, match="--trust-remote-code"):
        serve_command(folder)
    for allowed in (
        ["--trust-remote-code"],
        ["--skip-tokenizer-init"],
        ["--tokenizer=elsewhere"],
        ["--tokenizer", "elsewhere"],
    ):
        assert serve_command(folder, extra=allowed)[-len(allowed) :] == allowed
