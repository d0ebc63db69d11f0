"""Checkpoint folders with tokenizers of every kind, for tests."""

import base64
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer

from tests.tiny import sentences, write_tokenizer

TEXT = (
    "CamelCase getHTTPServer  two spaces\n\n    indented\tline 一行中文\uff0c没有空格。"
    " émoji 😀 don't 1234567 trailing  \n"
)
TEXTS = (TEXT, "  leading spaces", "\nnewline first", "中文", "x", TEXT * 3)
CODE = '''
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    """Letters by their number, and a mark that only code makes."""

    vocab_files_names = {"vocab_file": "tiktoken.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file=None, **kwargs):
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return 256

    def get_vocab(self):
        return {chr(at): at for at in range(256)}

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return (ord(token) * 7) % 256

    def _convert_id_to_token(self, index):
        return chr(index)

    def save_vocabulary(self, folder, filename_prefix=None):
        return ()
'''


def byte_level(folder: Path, tokenizer_class: str, **settings: Any) -> Path:
    """A byte-level tokenizer.json, and settings that name some class."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text("utf-8")) | settings
    known["tokenizer_class"] = tokenizer_class
    path.write_text(json.dumps(known, indent=1), "utf-8")
    return folder


def sentencepiece_only(
    folder: Path, settings: dict[str, Any] | None, **how: Any
) -> Path:
    """A tokenizer.model and perhaps settings."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [*sentences(20_000).splitlines(), *[TEXT.replace("\n", " ")] * 20]
    trained = folder / "model.txt"
    trained.write_text("\n".join(texts), "utf-8")
    like_llama = {
        "model_type": "bpe",
        "vocab_size": 500,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(trained),
        model_prefix=str(folder / "tokenizer"),
        **{**like_llama, **how},
    )
    trained.unlink()
    (folder / "tokenizer.vocab").unlink()
    if settings is not None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(settings), "utf-8")
    return folder


def tiktoken_with_code(folder: Path) -> Path:
    """Ranks, and code that says how text is split; as Moonlight's."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = (base64.b64encode(bytes([at])) + f" {at}\n".encode() for at in range(256))
    (folder / "tiktoken.model").write_bytes(b"".join(ranks))
    (folder / "tokenization_own.py").write_text(CODE, "utf-8")
    settings = {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    return folder


def model_type(folder: Path, name: str) -> Path:
    """Say in config.json whose tokenizer it is."""
    (folder / "config.json").write_text(json.dumps({"model_type": name}), "utf-8")
    return folder


def ids_by_file(folder: Path, text: str) -> list[int]:
    """What tokenizer.json says."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def ids_by_sentencepiece(folder: Path, text: str) -> list[int]:
    """What tokenizer.model says."""
    model = sentencepiece.SentencePieceProcessor()
    model.Load(str(folder / "tokenizer.model"))
    ids: list[int] = model.EncodeAsIds(text)
    return ids
