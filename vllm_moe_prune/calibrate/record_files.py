"""Files of text: opened safely, unpacked, and parted into pieces or records.

Everything is read lazily and in bounded memory, whatever the size of the file.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Any

from ..errors import CalibrationError, require_extra
from ..files.regular import open_regular
from .records import READ_FIELDS, found_in

READ = (
    "Pass a text file in UTF-8, .json, .jsonl (each may be .gz) or .parquet, or a data "
    "set of the Hub, such as hub:allenai/c4/en."
)
JSON_LINES = {".jsonl", ".ndjson"}
LINES_HINT = "A .jsonl file has one JSON object per line."
JSON_HINT = "A .json file holds one array of records, or one record after another."
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
# Formats that are recognized by their first bytes, and what to do about them.
FOREIGN = {
    b"PK\3\4": "is a zip archive. Unpack it.",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd. Decompress it, or use gzip.",
    b"BZh": "is compressed by bzip2. Decompress it, or use gzip.",
    b"\xfd7zXZ": "is compressed by xz. Decompress it, or use gzip.",
    b"ARROW1": "is an Arrow file. Save it as .parquet or .jsonl.",
    b"%PDF-": "is a PDF. Extract its text.",
}
PIECE_CHARACTERS = 1 << 16
CHUNK_CHARACTERS = 1 << 18
# Of one record; a whole corpus in one JSON string is no record.
MAX_RECORD_CHARACTERS = 1 << 26
PARQUET_ROWS = 256
SPACE = re.compile(r"[ \t\r\n]*")

Record = tuple[str, Any]
"""How errors name a record, and what it holds."""


def read_file(path: Path) -> tuple[Iterator[str], Iterator[Record]]:
    """Pieces of plain text, and records; one of the two is empty.

    Raises:
        CalibrationError: Now or while reading: the file cannot be used.
    """
    with _opened(path) as file:
        start = file.read(8)
    # Contents decide; a name that promises gzip or Parquet must keep it.
    for magic, advice in FOREIGN.items():
        if start.startswith(magic):
            raise CalibrationError(f"{path}: {advice}")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = start.startswith(GZIP)
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
        if start and not packed:
            raise CalibrationError(
                f"{path}: is not compressed by gzip, whatever its name says."
            )
    suffix = suffixes[-1] if suffixes else ""
    if start.startswith(PARQUET):
        return iter(()), _parquet_records(path)
    if suffix == ".parquet":
        raise CalibrationError(f"{path}: is no Parquet file, whatever its name says.")
    if suffix in JSON_LINES:
        return iter(()), _line_records(path, packed=packed)
    if suffix == ".json":
        return iter(()), _json_records(path, packed=packed)
    return _pieces(path, packed=packed), iter(())


def _opened(path: Path) -> FileIO:
    """A regular file for reading: pipes and devices may never end."""
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        raise CalibrationError(f"{path}: no such text file. {READ}") from error
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise CalibrationError(f"{path}: {reason}. {READ}") from error


@contextmanager
def _text(path: Path, *, packed: bool) -> Iterator[IO[str]]:
    """A file as text; what is wrong with it while it is read becomes one line."""
    try:
        with _opened(path) as file:
            plain: Any = (
                gzip.GzipFile(fileobj=file) if packed else io.BufferedReader(file)
            )
            # utf-8-sig: a byte order mark is no text.
            with io.TextIOWrapper(plain, encoding="utf-8-sig") as text:
                yield text
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x} near "
            f"position {error.start}). Convert it to UTF-8."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CalibrationError(
            f"{path}: damaged or truncated gzip file: {error}. Download it again."
        ) from error


def _pieces(path: Path, *, packed: bool) -> Iterator[str]:
    """Pieces that end at a line break; a tokenizer is slow on one endless string."""
    with _text(path, packed=packed) as file:
        while piece := file.read(PIECE_CHARACTERS):
            # Bounded too: the whole file may be one line.
            piece += file.readline(PIECE_CHARACTERS)
            _refuse_binary(piece, path)
            yield piece


def _refuse_binary(text: str, path: Path) -> None:
    if "\0" in text:
        raise CalibrationError(
            f"{path}: holds NUL bytes, so it is not text. Pass a UTF-8 text file."
        )


def _line_records(path: Path, *, packed: bool) -> Iterator[Record]:
    with _text(path, packed=packed) as file:
        number = 0
        # One character more than allowed tells a longer line without reading it whole.
        while line := file.readline(MAX_RECORD_CHARACTERS + 1):
            number += 1
            where = f"{path}: line {number}"
            _refuse_binary(line, path)
            if len(line) > MAX_RECORD_CHARACTERS:
                raise CalibrationError(f"{where}: {too_long()} {LINES_HINT}")
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    # Deep nesting is a RecursionError of the decoder, not a ValueError.
                    raise _not_json(where, error, LINES_HINT) from error
                yield where, record


def _not_json(where: str, error: Exception | str, hint: str) -> CalibrationError:
    # msg is without the position, which counts from where the buffer begins.
    reason = getattr(error, "msg", str(error))
    return CalibrationError(f"{where}: not valid JSON: {reason}. {hint}")


def too_long() -> str:
    """What is wrong with more than ``MAX_RECORD_CHARACTERS``."""
    return f"longer than {MAX_RECORD_CHARACTERS:,} characters, which is no record."


def _json_records(path: Path, *, packed: bool) -> Iterator[Record]:
    """The records of an array, of an object, or those that stand one after another."""
    with _text(path, packed=packed) as file:
        start = ""
        while not start and (chunk := file.read(CHUNK_CHARACTERS)):
            _refuse_binary(chunk, path)
            start = chunk.lstrip(" \t\r\n")
        array = start.startswith("[")
        found = enumerate(_values(file, start.removeprefix("["), path, array=array))
        # Whether an object stands alone is known only when no second one follows.
        first = next(found, None)
        second = next(found, None)
        if first and second is None and not array:
            yield from _listed(first[1], path)
            return
        for number, record in filter(None, (first, second)):
            yield f"{path}: record {number}", record
        for number, record in found:
            yield f"{path}: record {number}", record


def _values(file: IO[str], text: str, path: Path, *, array: bool) -> Iterator[Any]:
    """JSON values of a file that may be larger than memory.

    Args:
        file: Goes on after ``text``.
        text: Its beginning, without the bracket that opens an array.
        path: Of the file.
        array: Whether commas part the values, and a bracket ends them.
    """
    decode = json.JSONDecoder().raw_decode
    start, number, ended = 0, 0, False
    while True:
        where = f"{path}: record {number}"
        at = _after_space(text, start)
        if array and text[at : at + 1] == "]":
            if text[at + 1 :].strip() or file.read(CHUNK_CHARACTERS).strip():
                raise _not_json(str(path), "text follows the array", JSON_HINT)
            return
        if array and number and at < len(text):
            if text[at] != ",":
                raise _not_json(where, "expected ',' before it", JSON_HINT)
            at = _after_space(text, at + 1)
        error: ValueError | None = None
        if at < len(text):
            try:
                value, end = decode(text, at)
            except RecursionError as deep:
                raise _not_json(where, deep, JSON_HINT) from deep
            except ValueError as wrong:
                error = wrong
            else:
                # What ends with the text may go on beyond it, if it is a number.
                if end < len(text) or ended:
                    yield value
                    start, number = end, number + 1
                    continue
        if ended:
            if error is None and not array:
                return
            raise _not_json(where, error or "the array does not end", JSON_HINT)
        if len(text) - start > MAX_RECORD_CHARACTERS:
            reason = f"; read as JSON: {error}" if error else ""
            raise CalibrationError(f"{where}: {too_long()}{reason}. {JSON_HINT}")
        # Doubled: every try decodes the record from its start, so all take linear time.
        chunk = file.read(max(CHUNK_CHARACTERS, len(text) - start))
        _refuse_binary(chunk, path)
        # What was yielded is dropped: memory holds a chunk, or one long record.
        text, start, ended = text[start:] + chunk, 0, not chunk


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def _listed(value: Any, path: Path) -> Iterator[Record]:
    """A lone object: a record itself, or the only list of records in it."""
    fields = value.items() if isinstance(value, dict) else ()
    lists = [
        key
        for key, items in fields
        if isinstance(items, list) and items and isinstance(items[0], dict | str)
    ]
    if READ_FIELDS & dict(fields).keys() or len(lists) != 1:
        yield str(path), value
        return
    for number, record in enumerate(value[lists[0]]):
        yield f"{path}: {lists[0][:40]}[{number}]", record


def _parquet_records(path: Path) -> Iterator[Record]:
    require_extra("datasets", ("pyarrow",), f"{path}: Parquet files")
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with _opened(path) as file, parquet.ParquetFile(file) as table:
            kinds = {field.name: str(field.type) for field in table.schema_arrow}
            known = [name for name in kinds if name in READ_FIELDS]
            if not known:
                raise CalibrationError(found_in(str(path), kinds, kinds))
            # Other columns are not decoded, however large.
            for batch in table.iter_batches(PARQUET_ROWS, columns=known):
                for record in batch.to_pylist():
                    yield f"{path}: row {number}", record
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"{path}: damaged Parquet file: {reason}. Download it again."
        ) from error
