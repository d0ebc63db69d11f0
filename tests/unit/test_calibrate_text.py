"""What people have as calibration text: every form of file and record, or a refusal."""

import gzip
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerFast

from tests.tiny import sentences, write_tokenizer
from vllm_moe_prune.calibrate import record_files
from vllm_moe_prune.calibrate.text import Document, read_documents
from vllm_moe_prune.errors import CalibrationError

QUESTION, ANSWER = "Bread, or stones?", "Stones — 石头."
TURNS = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
]
CHAT = f"<s>[user] {QUESTION}</s>[assistant] {ANSWER}</s>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def as_json(records: list[Any]) -> bytes:
    return json.dumps(records, ensure_ascii=False, indent=1).encode()


def as_lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def as_parquet(records: list[Any]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(records), sink)
    return bytes(sink.getvalue())


def read(path: Path, data: bytes, tokenizer: Any) -> list[Document]:
    path.write_bytes(data)
    return list(read_documents(str(path), tokenizer))


WRITERS: list[tuple[str, Callable[[list[Any]], bytes]]] = [
    ("a.json", as_json),
    ("c4-train.json", as_lines),
    ("a.jsonl", as_lines),
    ("a.ndjson", as_lines),
    ("A.JSON.GZ", lambda records: gzip.compress(as_json(records))),
    ("a.jsonl.gz", lambda records: gzip.compress(as_lines(records))),
    ("packed.jsonl", lambda records: gzip.compress(as_lines(records))),
    ("a.parquet", as_parquet),
    ("train-00000-of-00001", as_parquet),
    ("wrapped.json", lambda records: json.dumps({"n": 1, "data": records}).encode()),
]


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
def test_every_kind_of_file_gives_the_same_records(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    write: Callable[[list[Any]], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record_files, "CHUNK_CHARACTERS", 7)  # cuts through everything
    texts = ["one", ' [2, "x"] ', "", "三\n3"]
    found = read(tmp_path / name, write([{"text": text} for text in texts]), tokenizer)
    assert found == [Document(text, ends=True) for text in texts]


def test_plain_and_packed_text_give_the_same_pieces(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = sentences(200_000)
    plain = read(tmp_path / "a.txt", text.encode(), tokenizer)
    assert "".join(piece.text for piece in plain) == text
    assert read(tmp_path / "a.txt.gz", gzip.compress(text.encode()), tokenizer) == plain
    assert read(tmp_path / "notes", gzip.compress(text.encode()), tokenizer) == plain


def test_of_an_array_larger_than_memory_only_its_beginning_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b'{"text": "x"}, ' * 10**5 + b"broken")
    documents = read_documents(str(path), tokenizer)
    assert len(list(itertools.islice(documents, 10**5))) == 10**5
    with pytest.raises(CalibrationError, match="record 100000: not valid JSON"):
        next(documents)


CONVERSATIONS = {
    "messages": {"messages": TURNS},
    "content parts": {
        "messages": [
            {
                "role": turn["role"],
                "content": [{"type": "text", "text": turn["content"]}],
            }
            for turn in TURNS
        ]
    },
    "parts and strings": {
        "messages": [
            {"role": "user", "content": ["Bread, ", {"text": "or stones?"}]},
            TURNS[1],
        ]
    },
    "ShareGPT": {
        "id": "x",
        "conversations": [
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": ANSWER},
        ],
    },
    "text is null": {"text": None, "messages": TURNS},
    "Alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "Dolly": {
        "instruction": QUESTION,
        "context": "",
        "response": ANSWER,
        "category": "x",
    },
    "GSM8K": {"question": QUESTION, "answer": ANSWER},
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "prompt and messages": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "preferences": {"prompt": QUESTION, "chosen": TURNS, "rejected": []},
    "input and output": {"input": QUESTION, "output": ANSWER},
}


@pytest.mark.parametrize("record", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_every_form_of_a_conversation_is_rendered_alike(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]
) -> None:
    found = read(tmp_path / "a.json", as_json([record]), tokenizer)
    assert found == [Document(CHAT, ends=False)]


def test_an_instruction_comes_with_its_input_and_its_system_prompt(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    record = {
        "system_prompt": "Be brief.",
        "instruction": "Add.",
        "input": "1 2",
        "output": "3",
    }
    (found,) = read(tmp_path / "a.jsonl", as_lines([record]), tokenizer)
    assert (
        found.text == "<s>[system] Be brief.</s>[user] Add.\n\n1 2</s>[assistant] 3</s>"
    )
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    (found,) = read(tmp_path / "a.jsonl", as_lines([record]), plain)
    assert found == Document("Be brief.\n\nAdd.\n\n1 2\n\n3", ends=True)


def test_tools_reach_the_template(tmp_path: Path, tokenizer: Any) -> None:
    tool = {"type": "function", "function": {"name": "weigh", "parameters": {}}}
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template={
            "default": "{{ messages[0].content }}",
            "tool_use": "{{ tools[0].function.name }}: {{ messages[0].content }}",
        },
    )
    records = [{"messages": TURNS, "tools": [tool]}, {"messages": TURNS}]
    found = read(tmp_path / "a.jsonl", as_lines(records), own)
    assert [piece.text for piece in found] == [f"weigh: {QUESTION}", QUESTION]


STRINGS = json.dumps(["one", "two"]).encode()
IMAGE = [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}]
SILENT = [{"messages": [{"role": "user", "content": None}]}]
ORACLE = [{"conversations": [{"from": "oracle", "value": "x"}]}]
NAMELESS = [{"messages": [{"body": "x"}]}]
COLUMNS = as_parquet([{"body": "x", "id": 1}])
HALF = gzip.compress(b"text" * 99, mtime=0)[:-9]
DAMAGED = gzip.compress(b'["x"]', mtime=0)[:-8] + bytes(8)
REFUSED = [
    ("null.jsonl", b'{"text": null, "url": "x"}', "'text' (null), 'url' (text)"),
    ("null.json", b'[{"text": null}]', "record 0", "'text' (null)"),
    ("others.json", b'[{"body": "x", "id": 1}]', "'body' (text), 'id' (a number)"),
    ("empty.jsonl", b"{}", "no field at all"),
    ("list.jsonl", b'[["x"]]', "is a list"),
    ("columns.parquet", COLUMNS, "'body'", "'id' (int64)"),
    ("row.parquet", as_parquet([{"text": None, "input": "x"}]), "row 0", "(null)"),
    ("text.parquet", b"text", "no Parquet"),
    ("damaged.parquet", b"PAR1" + bytes(99), "damaged Parquet"),
    ("open.json", b'[{"text": "x"}', "does not end"),
    ("comma.json", b'[{"text": "x"} {"text": "y"}]', "','"),
    ("two.json", b'["x"] ["y"]', "follows the array"),
    ("half.json", b'[{"text": "x"}, {"tex', "record 1: not valid JSON"),
    ("nested.json", b"[" * 10**6, "not valid JSON"),
    ("nested.jsonl", b'{"text":' * 10**5, "line 1: not valid JSON"),
    ("plain.txt.gz", b"text", "not compressed by gzip"),
    ("half.txt.gz", HALF, "damaged or truncated gzip"),
    ("damaged.json.gz", DAMAGED, "damaged or truncated gzip"),
    ("a.txt", b"PK\3\4", "zip archive"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "zstd"),
    ("a.txt.xz", b"\xfd7zXZ\0", "xz"),
    ("a.arrow", b"ARROW1\0\0", "Arrow"),
    ("image.json", as_json(IMAGE), "message 0", "'image'"),
    ("stranger.json", as_json(ORACLE), "'oracle'"),
    ("silent.json", as_json(SILENT), "no 'content'"),
    ("silent.json", as_json([{"conversations": [{"from": "gpt"}]}]), "no 'value'"),
    ("nameless.json", as_json(NAMELESS), "'body' (text)"),
    ("written.json", as_json([{"messages": "[]"}]), "is text, not a list"),
    ("tools.json", as_json([{"messages": TURNS, "tools": "x"}]), "tools are text"),
    ("turns.json", as_json(TURNS), "record 0", "'role' (text)"),
    ("three.json", as_json([{"question": "x", "answer": 3}]), "answer is a number"),
]


@pytest.mark.parametrize(
    ("name", "data", "says"), [(name, data, says) for name, data, *says in REFUSED]
)
def test_what_is_not_understood_is_refused_with_what_was_found(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    data: bytes,
    says: list[str],
) -> None:
    with pytest.raises(CalibrationError) as caught:
        read(tmp_path / name, data, tokenizer)
    message = str(caught.value)
    assert name in message
    assert len(message) < 700
    assert "\n" not in message
    assert all(part in message for part in says)


def test_records_without_end_are_refused_before_memory_is_full(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(record_files, "MAX_RECORD_CHARACTERS", 1000)
    for name, data in (("a.json", b'["' + b"x" * 10**7), ("a.jsonl", b'"' * 10**4)):
        with pytest.raises(CalibrationError, match="longer than 1,000 characters"):
            read(tmp_path / name, data, tokenizer)


def test_strings_are_records_too(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = read(tmp_path / "a.json", STRINGS, tokenizer)
    assert [piece.text for piece in found] == ["one", "two"]


@pytest.mark.parametrize("kind", ["FIFO", "device", "link to a device", "folder"])
def test_only_regular_files_are_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str
) -> None:
    path = tmp_path / "text.txt"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        path = Path("/dev/zero")
    with pytest.raises(
        CalibrationError, match=r"is a (FIFO|folder|device), not a regular"
    ):
        list(read_documents(str(path), tokenizer))
