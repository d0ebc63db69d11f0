"""Shards written by hand: the safetensors library reads back what was put in."""

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.reference import raw_bytes, read_tensors
from vllm_moe_prune.checkpoint.index import read_index
from vllm_moe_prune.checkpoint.reader import DTYPES
from vllm_moe_prune.checkpoint.writer import (
    JOURNAL_NAME,
    ShardPlan,
    ShardWriter,
    append_journal,
    finished_shards,
    index_json,
    index_needed,
    plan_shards,
    read_journal,
    rewrite_journal,
    tensor_bytes,
)
from vllm_moe_prune.errors import OutputError
from vllm_moe_prune.files.atomic import writing

TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """What the plan needs to know of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def specs_of(tensors: dict[str, Tensor]) -> list[Spec]:
    return [
        Spec(name, TYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def counting(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor whose bytes differ from place to place."""
    size = torch.empty(shape, dtype=dtype).nbytes
    data = torch.arange(size).remainder(120).to(torch.uint8)
    if dtype == torch.bool:
        data = data % 2
    return data.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors of any types and shapes, scalars and empty ones among them."""
    shapes = st.lists(st.integers(0, 5), max_size=3)
    names = st.text(min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__" and name.isprintable()
    )
    found = draw(
        st.dictionaries(
            names,
            st.tuples(st.sampled_from(list(DTYPES.values())), shapes),
            min_size=1,
            max_size=8,
        )
    )
    return {name: counting(dtype, *shape) for name, (dtype, shape) in found.items()}


def write_all(
    folder: Path,
    shards: Sequence[ShardPlan],
    tensors: dict[str, Tensor],
    *,
    finished: dict[str, dict[str, str]] | None = None,
    step: int = 7,
) -> ShardWriter:
    """Write every tensor in pieces; the last tensor first, to be difficult."""
    writer = ShardWriter(folder=folder, shards=shards, finished=finished or {})
    for name, tensor in reversed(tensors.items()):
        data = raw_bytes(tensor)
        for start in range(0, len(data), step):
            writer.write(name, memoryview(data[start : start + step]), start)
    writer.close()
    return writer


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(found[name]) == raw_bytes(tensor)


@settings(max_examples=40)
@given(tensors=tensor_sets(), size=st.sampled_from([1, 16, 64, 10**6]))
def test_the_library_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], size: int
) -> None:
    folder = tmp_path_factory.mktemp("written")
    shards = plan_shards(specs_of(tensors), size)
    writer = write_all(folder, shards, tensors)
    assert_same(read_tensors(folder), tensors)
    hashes = {name: digest(tensor) for name, tensor in tensors.items()}
    assert writer.hashes() == hashes
    journal = read_journal(folder)
    again = finished_shards(folder, shards, journal)
    assert ShardWriter(folder=folder, shards=shards, finished=again).hashes() == hashes
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [JOURNAL_NAME, *(shard.file_name for shard in shards)]
    )
    for shard in shards:
        path = folder / shard.file_name
        assert path.stat().st_size == shard.file_bytes
        header = path.read_bytes()[: len(shard.header)]
        assert len(header) % 8 == 0
        for name, offset in shard.offsets.items():
            assert offset % tensors[name].element_size() == 0
    if index_needed(shards):
        (folder / "model.safetensors.index.json").write_bytes(index_json(shards, 1))
    assert read_index(folder).keys() == tensors.keys()


def test_headers_are_those_of_the_library(tmp_path: Path) -> None:
    """Byte for byte, so that nobody can tell who wrote a file."""
    from safetensors.torch import save_file

    tensors = {
        "b.weight": counting(torch.float32, 3, 5),
        "a.weight": counting(torch.float32, 2),
    }
    (shard,) = plan_shards(specs_of(dict(sorted(tensors.items()))))
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    theirs = (tmp_path / "theirs").read_bytes()
    (length,) = struct.unpack("<Q", theirs[:8])
    assert json.loads(theirs[8 : 8 + length]) == json.loads(shard.header[8:])
    assert len(shard.header) == 8 + length


def test_shards_are_filled_in_order_up_to_their_size() -> None:
    specs = [Spec(f"t{number}", "F32", (10,)) for number in range(5)]
    large = Spec("large", "F32", (1000,))
    shards = plan_shards([*specs[:3], large, *specs[3:]], max_bytes=80)
    names = {shard.file_name: set(shard.offsets) for shard in shards}
    assert sorted(names) == [
        f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)
    ]
    assert {"large"} in names.values()
    others = [shard for shard in shards if "large" not in shard.sizes]
    assert all(sum(shard.sizes.values()) <= 80 for shard in others)


def test_one_shard_has_the_plain_name_and_no_index() -> None:
    (shard,) = shards = plan_shards([Spec("a", "BF16", (2, 2))])
    assert shard.file_name == "model.safetensors"
    assert index_needed(shards) is None
    assert tensor_bytes(Spec("a", "BF16", (2, 2))) == 8
    assert tensor_bytes(Spec("a", "F32", ())) == 4


def test_the_index_lists_every_tensor_sorted() -> None:
    specs = [Spec(name, "F32", (10,)) for name in "cab"]
    shards = plan_shards(specs, max_bytes=40)
    index = json.loads(index_json(shards, parameters=30))
    assert index["metadata"] == {"total_parameters": 30, "total_size": 120}
    assert list(index["weight_map"]) == ["a", "b", "c"]
    assert set(index["weight_map"].values()) == {shard.file_name for shard in shards}


def two_shards() -> tuple[dict[str, Tensor], list[ShardPlan]]:
    tensors = {name: counting(torch.float32, 10) for name in "ab"}
    return tensors, plan_shards(specs_of(tensors), max_bytes=40)


def test_finished_shards_are_left_alone(tmp_path: Path) -> None:
    tensors, shards = two_shards()
    first = shards[0].file_name
    (tmp_path / first).write_bytes(b"as it was")
    writer = write_all(tmp_path, shards, tensors, finished={first: {"a": "0" * 64}})
    assert (tmp_path / first).read_bytes() == b"as it was"
    assert writer.bytes_written == 40
    assert writer.hashes() == {"a": "0" * 64, "b": digest(tensors["b"])}
    assert not writer.needs("a")
    assert writer.needs("b")
    assert writer.journalled() == {shard.file_name for shard in shards}
    assert [entry["shard"] for entry in read_journal(tmp_path)] == [shards[1].file_name]


def test_a_shard_counts_only_when_it_is_complete(tmp_path: Path) -> None:
    tensors, shards = two_shards()
    writer = ShardWriter(folder=tmp_path, shards=shards)
    data = memoryview(raw_bytes(tensors["a"]))
    writer.write("a", data[:39])
    assert writer.journalled() == set()
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    writer.abort()
    assert read_journal(tmp_path) == []


def test_a_tensor_that_nobody_wrote_is_our_bug(tmp_path: Path) -> None:
    tensors, shards = two_shards()
    writer = ShardWriter(folder=tmp_path, shards=shards)
    writer.write("a", memoryview(raw_bytes(tensors["a"]))[:8])
    with pytest.raises(AssertionError, match="unfinished"):
        writer.close()
    writer.abort()


def test_what_cannot_be_written_says_how_to_go_on(tmp_path: Path) -> None:
    tensors, shards = two_shards()
    writer = ShardWriter(folder=tmp_path / "gone", shards=shards)
    with pytest.raises(OutputError, match=r"model-00001.*No such file.*--resume"):
        writer.write("a", memoryview(raw_bytes(tensors["a"])))
    writer.abort()
    for write in (
        lambda: append_journal(tmp_path / "gone", {"a": 1}),
        lambda: rewrite_journal(tmp_path / "gone", []),
    ):
        with pytest.raises(OutputError, match=r"gone/journal\.jsonl.*--resume"):
            write()


def test_a_rename_that_fails_in_the_background_is_told(tmp_path: Path) -> None:
    tensors, shards = two_shards()
    writer = ShardWriter(folder=tmp_path, shards=shards)
    (tmp_path / shards[0].file_name).mkdir()
    (tmp_path / shards[0].file_name / "in the way").touch()
    with pytest.raises(OutputError, match="model-00001"):  # noqa: PT012
        for name, tensor in tensors.items():
            writer.write(name, memoryview(raw_bytes(tensor)))
        writer.close()
    writer.abort()


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        _ = 1 // 0


def test_the_journal_is_read_up_to_what_a_kill_spoilt(tmp_path: Path) -> None:
    append_journal(tmp_path, {"key": "k"})
    append_journal(tmp_path, {"shard": "a", "größe": 1})
    path = tmp_path / JOURNAL_NAME
    whole = path.read_bytes()
    entries = [{"key": "k"}, {"shard": "a", "größe": 1}]
    for tail in (
        b'{"shard": "b"',
        b'{"shard": "b"}',
        b"\xff\n",
        b"\0\0\n",
        b"[]\n",
        b"",
    ):
        path.write_bytes(whole + tail)
        assert read_journal(tmp_path) == entries
    rewrite_journal(tmp_path, entries[:1])
    assert read_journal(tmp_path) == entries[:1]
    assert [item.name for item in tmp_path.iterdir()] == [JOURNAL_NAME]
    assert read_journal(tmp_path / "nowhere") == []


def test_only_shards_with_their_recorded_bytes_count_as_finished(
    tmp_path: Path,
) -> None:
    tensors, shards = two_shards()
    write_all(tmp_path, shards, tensors)
    journal = read_journal(tmp_path)
    names = {shard.file_name for shard in shards}
    assert finished_shards(tmp_path, shards, journal).keys() == names
    first = tmp_path / shards[0].file_name
    recorded = {entry["shard"]: entry["sha256"] for entry in journal}
    assert recorded[first.name] == {"a": digest(tensors["a"])}
    data = first.read_bytes()
    header = data.replace(b"F32", b"I32")
    for spoilt in (data[:-1], data + b"\0", data[:-1] + b"\xff", header):
        first.write_bytes(spoilt)
        left = finished_shards(tmp_path, shards, journal)
        assert left == {shards[1].file_name: {"b": digest(tensors["b"])}}
    first.unlink()
    left = finished_shards(tmp_path, shards, journal)
    assert left.keys() == {shards[1].file_name}
    whole: dict[str, object] = {"shard": shards[1].file_name, "sha256": "0" * 64}
    strange: list[dict[str, object]] = [{"shard": 7}, {"shard": "../x"}, {}, whole]
    assert finished_shards(tmp_path, shards, strange) == {}


def test_an_empty_tensor_alone_in_a_shard_is_written(tmp_path: Path) -> None:
    tensors = {
        "empty": torch.empty(0, 4),
        "large": counting(torch.float32, 100),
    }
    shards = plan_shards(specs_of(tensors), max_bytes=40)
    assert len(shards) == 2
    write_all(tmp_path, shards, tensors)
    for shard in shards:
        assert load_file(tmp_path / shard.file_name).keys() == shard.offsets.keys()
