"""Ways to spoil a file: what it is made of stays mostly right, one thing is not.

Every choice is Hypothesis's, through ``draw``, so a case can be had again and be made
smaller.
"""

import copy
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
Place = tuple[Any, ...]

# JSON text, some of it none: what nobody expects in the place of a value.
HOSTILE = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1", "-0.0", "0", "1", "2", "3", "7"),
    *("1e308", "-1e308", "1e-320", "0.1", "0.999999999", "1.0", "16", "65536"),
    *("2147483648", "4294967296", "9223372036854775807", "9223372036854775808"),
    *("1000000000000000000000000000000", "-1000000000000", "1000000"),
    *("9" * 39, "9" * 400, "9" * 5000, "true", "false", "null", "[]", "{}"),
    *('""', '"\\ud800"', '"\\u0000"', '"../../etc/passwd"', '"/dev/zero"', '"a\\nb"'),
    *('"1"', '"\\u0661"', '"NaN"', '"re:(a+)+$"', '"\\u202e\\u001b[31m"', '"{}"'),
    *("[[]]", '{"a": {}}', "[NaN]", "[0, 0]", "[-1]", "[1e999]", "01", "+1", "1,"),
    *('"' + "x" * 70_000 + '"', "[" + "0," * 50_000 + "0]", "[" * 40 + "]" * 40),
    *("[" * 5000 + "]" * 5000, '{"a":' * 5000 + "0" + "}" * 5000, "[" * 100_000),
    *("[" + "[]," * 200_000 + "[]]", "[" + '"a",' * 50_000 + "1]"),
)
NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 1e308, -1e308, 1e-320, 0.5)
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_TEXTS = (
    *("!!python/object/apply:os.system [id]", "!!binary aGk=", "!!set {a, b}", ".nan"),
    *(".inf", "-.inf", "0x" + "f" * 5000, "1" + ":59" * 20_000, "2024-02-31", "~"),
    *("[" * 3000 + "]" * 3000, "{a: " * 3000 + "1" + "}" * 3000, "- " * 3000 + "a"),
    *("&a [*a]", "{<<: {a: 1}, b: 2}", "!!timestamp 9999-99-99", "0o7777777777", "'"),
    *("1_000_000_000_000_000_000_000", "? a\n: b", "|\n  text", "\t", "!!int abc"),
    *("!!float 1e400", "!!omap [a: 1]", "x" * 70_000, "[" + "0," * 30_000 + "0]"),
)
SPECIAL = ("fifo", "zero", "huge", "folder", "gone", "loop", "dangling", "socket")


def spoilt_json(draw: Draw, data: bytes) -> bytes:
    """JSON with something else in one to three places."""
    value = json.loads(data)
    raw: dict[str, str] = {}
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        value = _changed(draw, value, raw)
    text = json.dumps(value)
    for mark, fragment in raw.items():
        text = text.replace(json.dumps(mark), fragment)
    return text.encode()


def _changed(draw: Draw, value: Any, raw: dict[str, str]) -> Any:
    places = list(_places(value))
    place = draw(st.sampled_from(places))
    if not place:
        return _hostile(draw, raw)
    *path, last = place
    holder = value
    for key in path:
        holder = holder[key]
    how = draw(st.sampled_from(("put", "put", "put", *_ways(holder))))
    if how == "put":
        holder[last] = _hostile(draw, raw)
    elif how == "other":
        holder[last] = copy.deepcopy(_at(value, draw(st.sampled_from(places))))
    elif how == "gone":
        del holder[last]
    elif how == "renamed":
        name = draw(st.sampled_from(("", "x", "\n", "0", "-1", "99999999999", "a.b")))
        holder[name] = holder.pop(last)
    elif how == "twice":
        # Two keys of one name: written as a fragment behind the first.
        mark = f"twice-{len(raw)}"
        raw[mark] = f"{json.dumps(holder[last])}, {json.dumps(last)}: 1"
        holder[last] = mark
    elif how == "repeated":
        holder.extend(copy.deepcopy(holder) * draw(st.sampled_from((1, 1, 40))))
    elif how == "swapped":
        other = draw(st.integers(0, len(holder) - 1))
        holder[last], holder[other] = holder[other], holder[last]
    elif isinstance(holder[last], int | float):
        tweak = draw(st.sampled_from((-1, 1, 2, 1000, -1000, 0.5)))
        holder[last] += tweak
    return value


def _ways(holder: Any) -> tuple[str, ...]:
    common = ("other", "gone", "tweak", "tweak")
    if isinstance(holder, dict):
        return (*common, "renamed", "twice")
    return (*common, "repeated", "swapped")


def _hostile(draw: Draw, raw: dict[str, str]) -> Any:
    mark = f"raw-{len(raw)}"
    raw[mark] = draw(st.sampled_from(HOSTILE))
    return mark


def _at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def _places(value: Any, path: Place = ()) -> Iterator[Place]:
    yield path
    if len(path) > 20:
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*path, key))
    elif isinstance(value, list):
        for key, item in enumerate(value[:50]):
            yield from _places(item, (*path, key))


def spoilt_lines(draw: Draw, data: bytes) -> bytes:
    """Lines of JSON: one spoilt, twice there, gone, or cut short."""
    lines = data.split(b"\n")
    at = draw(st.integers(0, max(0, len(lines) - 2)))
    how = draw(
        st.sampled_from(("json", "json", "json", "twice", "gone", "cut", "deep"))
    )
    if how == "json" and lines[at].strip():
        lines[at] = spoilt_json(draw, lines[at])
    elif how == "twice":
        lines.insert(at, lines[at])
    elif how == "gone":
        del lines[at]
    elif how == "cut":
        lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))]
    else:
        lines[at] = b"[" * 100_000
    return b"\n".join(lines)


def spoilt_yaml(draw: Draw, data: bytes) -> bytes:
    """YAML that is a little wrong, or none at all."""
    how = draw(st.sampled_from(("json", "json", "put", "put", "bomb", "twice")))
    if how == "bomb":
        return BOMB.encode() + data
    value = yaml.safe_load(data)
    if how == "json":
        return spoilt_json(draw, json.dumps(value).encode())
    lines = data.decode().splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    if how == "twice":
        lines.insert(at, lines[at])
    else:
        key, _, _ = lines[at].partition(":")
        lines[at] = f"{key}: {draw(st.sampled_from(YAML_TEXTS))}"
    return "\n".join(lines).encode()


def spoilt_safetensors(draw: Draw, data: bytes) -> bytes:
    """A wrong header, more or fewer bytes behind it, or numbers that cannot be."""
    (length,) = struct.unpack("<Q", data[:8])
    head, body = data[8 : 8 + length], bytearray(data[8 + length :])
    ways = ("header", "header", "metadata", "numbers", "numbers", "length", "many")
    how = draw(st.sampled_from((*ways, "body")))
    if how == "numbers" and body:
        _spoil_numbers(draw, json.loads(head), body)
    elif how == "length":
        length = draw(st.sampled_from((0, 1, length - 1, length + 1, 2**31, 2**63)))
        return struct.pack("<Q", length) + head + bytes(body)
    elif how == "many":
        header = json.loads(head)
        end = len(body)
        for at in range(draw(st.sampled_from((10, 60_000)))):
            entry = {"dtype": "BF16", "shape": [0], "data_offsets": [end, end]}
            header[f"x.{at}"] = entry
        head = json.dumps(header).encode()
    elif how == "body":
        body = body[: draw(st.integers(0, len(body)))]
    elif how == "metadata":
        head = _spoilt_metadata(draw, head)
    else:
        head = spoilt_json(draw, head)
    return struct.pack("<Q", len(head)) + head + bytes(body)


def _spoilt_metadata(draw: Draw, head: bytes) -> bytes:
    """JSON inside a header's strings."""
    header = json.loads(head)
    metadata = header.setdefault("__metadata__", {"format": "pt"})
    key = draw(st.sampled_from(sorted(metadata)))
    try:
        text = spoilt_json(draw, metadata[key].encode()).decode()
    except ValueError:
        text = draw(st.sampled_from(HOSTILE))
    metadata[key] = text
    return json.dumps(header).encode()


def _spoil_numbers(draw: Draw, header: dict[str, Any], body: bytearray) -> None:
    header.pop("__metadata__", None)
    name = draw(st.sampled_from(sorted(header)))
    first, last = header[name]["data_offsets"]
    kind = {"F64": "<f8", "F32": "<f4"}.get(header[name]["dtype"], "<u2")
    size = np.dtype(kind).itemsize
    if last - first < size:
        return
    at = first + size * draw(st.integers(0, (last - first) // size - 1))
    if kind == "<u2":  # BF16 and F16: NaN, infinity, -1, large
        value = draw(st.sampled_from((0x7FC0, 0x7F80, 0xFF80, 0xBF80, 0x7F7F)))
    else:
        value = draw(st.sampled_from(NUMBERS))
    with np.errstate(over="ignore"):
        number = np.array(value).astype(kind).tobytes()
    count = draw(st.sampled_from((1, 1, (last - at) // size)))
    body[at : at + size * count] = number * count


def spoilt_bytes(draw: Draw, data: bytes) -> bytes:
    """Bytes as a bad disk, a bad editor or a bad download leave them."""
    at = draw(st.integers(0, len(data)))
    ways = ("cut", "empty", "flip", "insert", "bom", "utf16", "zeros", "twice", "crlf")
    how = draw(st.sampled_from(ways))
    if how == "cut":
        return data[:at]
    if how == "empty":
        return b""
    if how == "flip":
        return (
            data[:at] + bytes(255 - byte for byte in data[at : at + 1]) + data[at + 1 :]
        )
    if how == "insert":
        rubbish = (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[2J", b"\r", b"{", b'"')
        return data[:at] + draw(st.sampled_from(rubbish)) + data[at:]
    if how == "bom":
        return b"\xef\xbb\xbf" + data
    if how == "utf16":
        return data.decode("latin-1").encode("utf-16")
    if how == "zeros":
        return data[:at] + bytes(len(data) - at)
    if how == "twice":
        return data + data
    return data.replace(b"\n", b"\r\n")


def put_special(kind: str, path: Path) -> None:
    """What is no ordinary file, in the place of one."""
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(6 << 30)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "socket":
        os.mknod(path, 0o140644)  # stat.S_IFSOCK


def spoilt_card(draw: Draw, data: bytes) -> bytes:
    """A model card with something else between its two rulers."""
    _, front, rest = data.split(b"---\n", 2)
    return b"---\n" + spoilt_yaml(draw, front) + b"\n---\n" + rest


SPOILERS: dict[str, Callable[[Draw, bytes], bytes]] = {
    "json": spoilt_json,
    "lines": spoilt_lines,
    "yaml": spoilt_yaml,
    "card": spoilt_card,
    "safetensors": spoilt_safetensors,
    "text": spoilt_bytes,
}
