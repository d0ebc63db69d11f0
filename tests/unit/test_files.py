"""Files from strangers are read within limits, or refused in one line."""

import json
import os
import time
from pathlib import Path

import pytest

from tests.fuzz.spoil import BOMB, SPECIAL, put_special
from vllm_moe_prune.errors import PlanError
from vllm_moe_prune.files.atomic import copy_file
from vllm_moe_prune.files.json_file import MAX_DEPTH, parse_json, read_json
from vllm_moe_prune.files.regular import (
    Kind,
    read_bounded,
    read_file,
    read_text,
)
from vllm_moe_prune.files.yaml_file import parse_yaml

KIND = Kind(
    name="thing",
    max_bytes=1000,
    error=PlanError,
    absent="no such thing.",
    remedy="Make it again.",
)
SAYS = {
    "fifo": "is a FIFO, not a regular file; expected a thing",
    "zero": "is a device, not a regular file; expected a thing",
    "huge": "6442450944 bytes, but at most 1000 are read; expected a thing",
    "folder": "is a folder, not a regular file; expected a thing",
    "gone": "no such thing",
    "loop": "Too many levels of symbolic links",
    "dangling": "no such thing",
    "socket": "No such device or address",
}


@pytest.mark.parametrize("special", SPECIAL)
def test_what_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, special: str
) -> None:
    path = tmp_path / "thing"
    path.touch()
    put_special(special, path)
    with pytest.raises(PlanError, match=f"{path}: {SAYS[special]}"):
        read_file(path, KIND)


def test_a_file_without_a_size_is_read_up_to_the_limit() -> None:
    status = Path("/proc/self/status")
    assert status.stat().st_size == 0
    assert b"VmHWM" in read_bounded(status, 1 << 20)
    with pytest.raises(OSError, match="more, but at most 10 are read"):
        read_bounded(status, 10)


def test_a_limit_is_met_exactly(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    path.write_bytes(b"x" * 1000)
    assert read_file(path, KIND) == b"x" * 1000
    path.write_bytes(b"x" * 1001)
    with pytest.raises(PlanError, match="1001 bytes, but at most 1000"):
        read_file(path, KIND)


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    path.mkdir()
    before = open_descriptors()
    for _ in range(3):
        with pytest.raises(PlanError):
            read_file(path, KIND)
    assert open_descriptors() == before


def test_copies_are_of_regular_files_only(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(3 << 20))
    copy_file(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == bytes(3 << 20)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="is a FIFO"):
        copy_file(tmp_path / "fifo", tmp_path / "three")
    assert not (tmp_path / "three").exists()


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thing").write_bytes(b"ab\xff")
    with pytest.raises(PlanError, match="byte 2 is not UTF-8; expected a thing"):
        read_text(tmp_path / "thing", KIND)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": NaN}', "it holds NaN"),
        ('{"a": -Infinity}', "it holds -Infinity"),
        ('{"a": 1e999}', "it holds 1e999, which no float can be"),
        ('{"a": -1e400}', "no float"),
        ("9" * 41, "a whole number of 41 digits"),
        ("9" * 5000, "a whole number of 5000 digits"),
        ('{"a": 1, "b": 2, "a": 1}', "it holds 'a' twice"),
        ('[{"a": {"b": 1, "b": 1}}]', "it holds 'b' twice"),
        ('{"a": "\\ud800"}', "half a UTF-16 pair"),
        ('{"\\uDFFF": 1}', "half a UTF-16 pair"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "deeper than 64 levels"),
        ("[" * 900 + "]" * 900, "deeper than 64 levels"),
        ("[" * 1_000_000, "deeper than 64 levels|more than"),
        ('{"a":' * 100_000 + "0" + "}" * 100_000, "deeper than 64 levels"),
        ("[" + "0," * 1_000_001 + "0]", "more than 1,000,000 values"),
        (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
        (b"\xff\xfe{\x00}\x00", "byte 0 is not UTF-8"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_json_that_others_read_differently_or_not_at_all_is_refused(
    text: str | bytes, says: str
) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=says) as refused:
        parse_json(text)
    assert str(refused.value).isprintable()
    assert time.process_time() - began < 2


def test_json_that_is_unusual_is_read() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    for text in (
        *(deep, "1e308", "-0.0", "9" * 40, '"\\ud83d\\ude00"', '["[[[[", "a,b"]'),
        "[" + "0," * 900_000 + "0]",
    ):
        assert parse_json(text) == json.loads(text)


def test_json_in_a_file_must_be_an_object(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    for text in ("[]", "1", '"a"', "null"):
        path.write_text(text)
        with pytest.raises(PlanError, match=r"expected a JSON object.*Make it again"):
            read_json(path, KIND)
    path.write_text('{"a": [1]}')
    assert read_json(path, KIND) == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "aliases are not read"),
        ("a: &a [*a]", "aliases are not read"),
        ("a: 1\nb: 2\na: 3", "'a' is there twice"),
        ("a: {b: 1, b: 1}", "'b' is there twice"),
        ("a: " + "[" * 100 + "]" * 100, "deeper than 32 levels"),
        ("a: " + "[" * 50_000, "deeper than 32 levels"),
        ("a: 0x" + "f" * 100, "a number of 102 digits"),
        ("a: 1" + ":59" * 50_000, "a number of 150001 digits"),
        ("a: 2024-02-31", "a value that is none"),
        ("a: !!python/object/apply:os.system [id]", "could not determine a constr"),
        ("a: !!int abc", "a value that is none"),
        ("a: [1", "line 1, column 6"),
        (b"\xff\xfe\x00", "codec|unacceptable|not valid|can't decode"),
    ],
)
def test_yaml_beyond_plain_values_is_refused(text: str | bytes, says: str) -> None:
    began = time.process_time()
    with pytest.raises(ValueError, match=says) as refused:
        parse_yaml(text)
    assert str(refused.value).isprintable()
    assert time.process_time() - began < 5


def test_yaml_is_read_as_ever() -> None:
    assert parse_yaml("a: [1, 2.5, x]\nb: {c: null}") == {
        "a": [1, 2.5, "x"],
        "b": {"c": None},
    }
