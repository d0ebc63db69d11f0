"""Where text comes from: a file, or a data set on the Hub.

Every source is read lazily, so that a caller who has enough stops the reading.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, require_extra
from .record_files import MAX_RECORD_CHARACTERS, Record, read_file, too_long
from .records import Document, as_document, as_prompt

__all__ = ["EXAMPLE", "HUB", "Document", "name_of", "read_documents", "read_prompts"]

HUB = "hub:"
EXAMPLE = f"{HUB}allenai/c4/en"


def name_of(source: str) -> str:
    """How provenance names a source: files without their folder."""
    return source if source.startswith(HUB) else Path(source).name


def read_documents(source: str, tokenizer: Any) -> Iterator[Document]:
    """The text of a source, piece by piece.

    Args:
        source: A file of UTF-8 text, ``.json`` or ``.jsonl``, each perhaps compressed
            by gzip; a ``.parquet`` file; or ``hub:OWNER/NAME[/CONFIG][:SPLIT]``. What
            records may look like, see ``calibrate/records.py``.
        tokenizer: Renders conversations with its chat template.

    Raises:
        CalibrationError: While reading, when the source turns out unusable.
    """
    pieces, records = _opened(source)
    for piece in pieces:
        # Pieces of one text: no end-of-text token belongs between them.
        yield Document(piece, ends=False)
    for where, record in records:
        yield as_document(record, where, tokenizer)


def read_prompts(source: str, tokenizer: Any) -> Iterator[Document]:
    """What a model is to answer: every line of a text file, every record of others.

    Args:
        source: As in ``read_documents``.
        tokenizer: Renders questions and conversations with its chat template.

    Raises:
        CalibrationError: While reading, when the source turns out unusable.
    """
    pieces, records = _opened(source)
    for where, record in chain(_lines(pieces, source), records):
        yield as_prompt(record, where, tokenizer)


def _opened(source: str) -> tuple[Iterator[str], Iterator[Record]]:
    """Pieces of plain text, and records; one of the two is empty."""
    if source.startswith(HUB):
        return iter(()), _hub_records(source)
    return read_file(Path(source))


def _lines(pieces: Iterator[str], source: str) -> Iterator[Record]:
    """Lines that are not blank; a long one goes on over several pieces."""
    line, number = "", 1
    for piece in pieces:
        first, *others = piece.split("\n")
        line += first
        if len(line) > MAX_RECORD_CHARACTERS:
            raise CalibrationError(f"{source}: line {number}: {too_long()}")
        for other in others:
            if line.strip():
                yield f"{source}: line {number}", line
            line, number = other, number + 1
    if line.strip():
        yield f"{source}: line {number}", line


def _hub_records(source: str) -> Iterator[Record]:
    name, config, split = _parse_hub(source)
    require_extra("datasets", ("datasets",), f"{source}: texts from the Hub")
    import datasets

    try:
        # Streaming: the data set is not downloaded whole.
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
