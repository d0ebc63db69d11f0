"""Where text comes from: a file, a JSONL file, or a data set on the Hub.

Every source is read lazily, so that a caller who has enough stops the reading.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CalibrationError, require_extra

HUB = "hub:"
EXAMPLE = f"{HUB}allenai/c4/en"
PIECE_CHARACTERS = 1 << 16


class Document(NamedTuple):
    """A piece of text."""

    text: str
    ends: bool
    """Whether unrelated text follows, so that an end-of-text token fits between."""


def name_of(source: str) -> str:
    """How provenance names a source: files without their folder."""
    return source if source.startswith(HUB) else Path(source).name


def read_documents(source: str, tokenizer: Any) -> Iterator[Document]:
    """The text of a source, piece by piece.

    Args:
        source: A UTF-8 text file; a ``.jsonl`` file whose records have ``text`` or
            ``messages``; or ``hub:OWNER/NAME[/CONFIG][:SPLIT]``.
        tokenizer: Renders ``messages`` with its chat template.

    Raises:
        CalibrationError: While reading, when the source turns out unusable.
    """
    if source.startswith(HUB):
        return _from_records(_hub_records(source), source, tokenizer)
    path = Path(source)
    if not path.is_file():
        raise CalibrationError(
            f"{source}: no such text file. Pass a UTF-8 text file, a .jsonl file, or "
            f"a data set such as {EXAMPLE}."
        )
    if path.suffix in {".jsonl", ".ndjson"}:
        return _from_records(_jsonl_records(path), source, tokenizer)
    return _text_pieces(path)


def _text_pieces(path: Path) -> Iterator[Document]:
    """Pieces that end at a line break; a tokenizer is slow on one endless string."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(PIECE_CHARACTERS):
                piece += file.readline(PIECE_CHARACTERS)
                _refuse_binary(piece, path)
                yield Document(piece, ends=False)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} near "
            f"position {error.start}). Convert it to UTF-8."
        ) from error


def _refuse_binary(text: str, path: Path) -> None:
    if "\0" in text:
        raise CalibrationError(
            f"{path}: holds NUL bytes, so it is not text. Pass a UTF-8 text file."
        )


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                _refuse_binary(line, path)
                if line.strip():
                    yield f"{path}: line {number}", json.loads(line)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text. Convert it.") from error
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))
        raise CalibrationError(
            f"{path}: line {number}: not valid JSON: {reason}. "
            "A .jsonl file has one JSON object per line."
        ) from error


def _hub_records(source: str) -> Iterator[tuple[str, Any]]:
    name, config, split = _parse_hub(source)
    require_extra("datasets", ("datasets",), f"{source}: texts from the Hub")
    import datasets

    try:
        records = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, record in enumerate(records):
            yield f"{source}: record {number}", record
    except Exception as error:  # datasets lets through whatever its readers raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CalibrationError(
            f"{source}: cannot be read: {reason}. Check the name and the network, or "
            "pass a text file with --calibration."
        ) from error


def _parse_hub(source: str) -> tuple[str, str | None, str]:
    path, _, split = source.removeprefix(HUB).partition(":")
    owner_and_name, config = path.split("/")[:2], path.split("/")[2:]
    if not all(owner_and_name) or len(config) > 1:
        raise CalibrationError(
            f"{source}: expected {HUB}OWNER/NAME[/CONFIG][:SPLIT], as in {EXAMPLE}."
        )
    return "/".join(owner_and_name), config[0] if config else None, split or "train"


def _from_records(
    records: Iterable[tuple[str, Any]], source: str, tokenizer: Any
) -> Iterator[Document]:
    for where, record in records:
        text = record.get("text") if isinstance(record, dict) else None
        messages = record.get("messages") if isinstance(record, dict) else None
        if isinstance(text, str):
            yield Document(text, ends=True)
        elif isinstance(messages, list):
            yield Document(_render(messages, where, tokenizer), ends=False)
        else:
            found = sorted(record) if isinstance(record, dict) else type(record)
            raise CalibrationError(
                f"{where}: has neither 'text' nor 'messages', but {found}."
            )


def _render(messages: list[Any], where: str, tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{where}: holds messages, but the checkpoint's tokenizer has no chat "
            "template. Pass records with 'text', or another file."
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template can raise anything
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"{where}: the chat template refuses the messages: {reason}."
        ) from error
