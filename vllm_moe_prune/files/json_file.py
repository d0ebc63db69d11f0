"""JSON from strangers: every limit that the standard reader lacks.

Refused are a name twice in one object, since each reader picks another; numbers that
are none or that no float can hold; halves of UTF-16 pairs, which cannot be written
again; and what is too deep or too much.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from .regular import Kind, read_file

MAX_DEPTH = 64
"""Objects in objects; provenance has one more with every further cut."""
MAX_VALUES = 1_000_000
"""Each takes up to about 100 bytes of memory; a large model's index has 400,000."""
MAX_DIGITS = 40
"""Of a whole number: what transformers writes for "no limit" has 31."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(data: bytes | str, max_values: int = MAX_VALUES) -> Any:
    """What a JSON text says.

    Args:
        data: The text, if bytes in UTF-8.
        max_values: How many values it may have.

    Raises:
        ValueError: It is none, or one that is refused; the message is one line.
    """
    if isinstance(data, str):
        data = data.encode()
    # Marks inside strings are counted too; they are few in honest files.
    opened = data.count(b"[") + data.count(b"{")
    if data.count(b",") + opened > max_values:
        raise ValueError(f"it has more than {max_values:,} values")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_whole,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    # No text is deeper than it opens brackets: most need no walk.
    if opened > MAX_DEPTH:
        _refuse_depth(value)
    # Escaped pairs are legal; only a lone half fails to encode.
    if _SURROGATE.search(data):
        _refuse_surrogates(value)
    return value


def read_json(path: Path, kind: Kind, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        MoePruneError: ``kind.error``: it cannot be read, or holds something else.
    """
    data = read_file(path, kind)
    try:
        value = parse_json(data, max_values)
    except ValueError as error:
        raise kind.error(f"{path}: not valid JSON: {error}. {kind.remedy}") from error
    if not isinstance(value, dict):
        raise kind.error(
            f"{path}: expected a JSON object, found a {type(value).__name__}. "
            f"{kind.remedy}"
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it holds {twice[:100]!r} twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _whole(digits: str) -> int:
    # int() takes time that grows with the square of the digits.
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds a whole number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    # float() makes infinity of 1e999.
    if not math.isfinite(number):
        raise ValueError(f"it holds {digits[:MAX_DIGITS]}, which no float can be")
    return number


def _refuse_depth(value: Any) -> None:
    # Level by level, not by recursion, which would have a limit of its own.
    holders = [value]
    for _ in range(MAX_DEPTH):
        holders = [
            child
            for holder in holders
            for child in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(child, dict | list)
        ]
        if not holders:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _refuse_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a UTF-16 pair (\\ud800 to \\udfff)") from None
