"""Headers and index: every tensor's bytes are found where the library finds them."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.bad_inputs.case import split_header
from tests.reference import raw_bytes, read_json, read_tensors
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint import index
from vllm_moe_prune.checkpoint.fingerprint import difference
from vllm_moe_prune.checkpoint.index import read_bytes, read_header, read_index
from vllm_moe_prune.checkpoint.reader import DTYPES, read_row, read_tensor
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"


def make_model(folder: Path, **changes: int | str) -> Path:
    small = {"layers": 2, "experts": 4, "hidden": 16, "width": 8, "vocab": 32}
    return tiny_checkpoint(folder, tokenizer=False, **small | changes)  # type: ignore[arg-type]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


def one_of_each_type() -> dict[str, Tensor]:
    values = torch.arange(24).reshape(2, 3, 4)
    return {
        name: (values % 2 if dtype == torch.bool else values).to(dtype)
        for name, dtype in DTYPES.items()
    } | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4)}


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_read_as_the_library_reads_it(
    tmp_path: Path, shards: int
) -> None:
    model = make_model(tmp_path / "model", shards=shards)
    found, expected = read_index(model), read_tensors(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(read_tensor(found[name]), tensor)
        assert found[name].nbytes == tensor.nbytes
        assert found[name].numel == tensor.numel()


def test_every_type_is_read_whole_and_by_rows(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(one_of_each_type(), path)
    found = read_index(tmp_path)
    for name, tensor in load_file(path).items():
        info = found[name]
        assert raw_bytes(read_tensor(info)) == raw_bytes(tensor)
        assert read_tensor(info).dtype == tensor.dtype
        if name in DTYPES:
            assert info.dtype == name
            assert raw_bytes(read_row(info, 1)) == raw_bytes(tensor[1])


def test_names_may_be_anything(tmp_path: Path) -> None:
    names = ["a b", 'quo"te', "new\nline", "größe", "\U0001f9e0", "x" * 5000, "..", "/"]
    save_file(
        {name: torch.full((3,), float(number)) for number, name in enumerate(names)},
        tmp_path / "model.safetensors",
    )
    found = read_index(tmp_path)
    for number, name in enumerate(names):
        assert read_tensor(found[name]).tolist() == [number] * 3


def test_a_tensor_in_two_shards_is_refused(model: Path) -> None:
    index = read_json(model / INDEX)
    name = next(key for key, at in index["weight_map"].items() if at == SHARD)
    first = model / "model-00001-of-00003.safetensors"
    save_file(load_file(first) | {name: torch.zeros(2)}, first)
    with pytest.raises(CheckpointError, match=f"holds '{name}', which the index"):
        read_index(model)


def test_a_header_read_again_after_the_file_shrank_is_an_error(model: Path) -> None:
    """A download that is replaced while we read it."""
    info = max(
        read_header(model / SHARD).tensors.values(), key=lambda item: item.offset
    )
    os.truncate(model / SHARD, info.offset + 1)
    with pytest.raises(CheckpointError, match=f"{SHARD}: ended at byte"):
        read_bytes(info)


def test_a_link_within_the_folder_is_followed(model: Path) -> None:
    (model / "blob").mkdir()
    (model / SHARD).rename(model / "blob" / "abc")
    (model / SHARD).symlink_to(Path("blob") / "abc")
    assert open_checkpoint(model).parameters > 0


def test_links_of_a_hub_snapshot_are_followed(model: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--acme--model"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert open_checkpoint(snapshot).parameters > 0


@pytest.mark.parametrize("shards", [1, 3])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, shards: int) -> None:
    model = make_model(tmp_path / "model", shards=shards)
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    said = r"is a link to .*/elsewhere, which is not inside the folder.*--allow-links"
    with pytest.raises(CheckpointError, match=said):
        read_index(model)
    whole = make_model(tmp_path / "whole", shards=shards)
    expected = open_checkpoint(whole).fingerprint
    assert open_checkpoint(model, allow_links=True).fingerprint == expected


@pytest.mark.parametrize("allow_links", [False, True])
def test_a_link_that_leads_nowhere_is_said_to_be_one(
    tmp_path: Path, allow_links: bool
) -> None:
    model = make_model(tmp_path / "model", shards=3)
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to("/nowhere/at/all")
    said = "shard is missing" if allow_links else "a link that leads nowhere"
    with pytest.raises(CheckpointError, match=said):
        read_index(model, allow_links=allow_links)


def test_a_cache_whose_files_lie_elsewhere_is_read_if_allowed(tmp_path: Path) -> None:
    """As the Hub's library leaves it where ``blobs`` was moved to another disk."""
    repo, disk = tmp_path / "models--a--b", tmp_path / "disk"
    snapshot = repo / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    make_model(snapshot)
    disk.mkdir()
    (repo / "blobs").symlink_to(disk)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(disk / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    with pytest.raises(CheckpointError, match=r"is a link to .*/disk/\d+, .*--allow-"):
        open_checkpoint(snapshot)
    assert open_checkpoint(snapshot, allow_links=True).parameters > 0


def into_a_folder_below(model: Path) -> None:
    """Move every shard but the first."""
    (model / "sub" / "deep").mkdir(parents=True)
    weight_map = read_json(model / INDEX)["weight_map"]
    for shard in sorted(model.glob("*.safetensors"))[1:]:
        shard.rename(model / "sub" / "deep" / shard.name)
        for name, at in weight_map.items():
            if at == shard.name:
                weight_map[name] = f"sub/deep/{shard.name}"
    (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_in_a_folder_below_are_read(tmp_path: Path) -> None:
    flat = open_checkpoint(make_model(tmp_path / "flat", shards=3))
    model = make_model(tmp_path / "model", shards=3)
    into_a_folder_below(model)
    opened = open_checkpoint(model)
    assert opened.fingerprint == flat.fingerprint
    assert {info.file.parent.name for info in opened.tensors.values()} == {
        "model",
        "deep",
    }
    outside = tmp_path / "outside"
    (model / "sub").rename(outside)
    (model / "sub").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"is a link to .*/outside/deep/model-"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "name", ["/etc/x", "sub/../../x", "sub//x", "./x", "sub/", "../x", "sub/.."]
)
def test_no_path_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "model", shards=3)
    index = read_json(model / INDEX)
    for tensor in index["weight_map"]:
        index["weight_map"][tensor] = name
    (model / INDEX).write_text(json.dumps(index))
    for allow_links in (False, True):
        with pytest.raises(CheckpointError, match="not inside the folder"):
            read_index(model, allow_links=allow_links)


def test_a_header_that_is_large_for_its_tensors_is_refused_unread(
    model: Path,
) -> None:
    """1.3 million tensors without elements took 17 s."""
    header, body = split_header(model / SHARD)
    end = len(body)
    for number in range(30_000):
        entry = {"dtype": "BF16", "shape": [0], "data_offsets": [end, end]}
        header[f"x.{number}"] = entry
    text = json.dumps(header).encode()
    (model / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + body)
    with pytest.raises(CheckpointError, match=f"header takes {len(text)} bytes"):
        read_header(model / SHARD)
    # Beside as many bytes of tensors it is a matter of number alone.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "HEADER_SLACK", len(text))
        patch.setattr(index, "MAX_HEADER_VALUES", 100_000)
        with pytest.raises(CheckpointError, match="more than 100,000 values"):
            read_header(model / SHARD)


def test_an_entry_of_a_header_must_be_an_object(model: Path) -> None:
    """The library takes a list of three for one."""
    header, body = split_header(model / SHARD)
    name = next(name for name in header if name != "__metadata__")
    header[name] = list(header[name].values())
    text = json.dumps(header).encode()
    (model / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + body)
    with pytest.raises(CheckpointError, match=r"entry is no object|invalid type"):
        read_header(model / SHARD)


def fingerprint_after(model: Path, tmp_path: Path, **changes: int | str) -> str:
    changed = make_model(tmp_path / "changed", **changes)
    found = open_checkpoint(changed).fingerprint
    shutil.rmtree(changed)
    return found


def test_the_fingerprint_does_not_depend_on_files(model: Path, tmp_path: Path) -> None:
    found = open_checkpoint(model).fingerprint
    assert fingerprint_after(model, tmp_path, shards=1) == found
    index = read_json(model / INDEX)
    (model / INDEX).write_text(json.dumps(index | {"metadata": {"mood": "good"}}))
    config = read_json(model / "config.json")
    reordered = dict(sorted(config.items(), reverse=True))
    (model / "config.json").write_text(json.dumps(reordered))
    assert open_checkpoint(model).fingerprint == found


def test_the_fingerprint_tells_models_apart(model: Path, tmp_path: Path) -> None:
    found = {
        open_checkpoint(model).fingerprint,
        fingerprint_after(model, tmp_path, seed=1),
        fingerprint_after(model, tmp_path, dtype="float16"),
        fingerprint_after(model, tmp_path, vocab=48),
        fingerprint_after(model, tmp_path, rope_theta="7"),
        fingerprint_after(model, tmp_path, layout="mlp.packed"),
    }
    assert len(found) == 6


def test_one_bit_of_one_router_changes_the_fingerprint(model: Path) -> None:
    before = open_checkpoint(model).fingerprint
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        name = "model.layers.1.block_sparse_moe.gate.weight"
        if name in tensors:
            tensors[name].view(torch.int16)[3, 3] ^= 1
            save_file(tensors, path)
    assert open_checkpoint(model).fingerprint != before


def with_a_bit_flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_one_bit_of_any_tensor_of_a_small_model_changes_the_fingerprint(
    model: Path,
) -> None:
    checkpoint = open_checkpoint(model)
    found = {checkpoint.fingerprint}
    for info in checkpoint.tensors.values():
        with_a_bit_flipped(info.file, info.offset + info.nbytes // 2)
        found.add(open_checkpoint(model).fingerprint)
    assert len(found) == 1 + len(checkpoint.tensors)


def test_every_tensor_and_expert_of_a_large_model_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large models are: not whole, three blocks of each tensor and expert."""
    monkeypatch.setattr("vllm_moe_prune.checkpoint.fingerprint.WHOLE_BYTES", 0)
    monkeypatch.setattr("vllm_moe_prune.checkpoint.fingerprint.BLOCKS", 0)
    monkeypatch.setattr("vllm_moe_prune.checkpoint.fingerprint.BLOCK_BYTES", 16)
    folder = make_model(tmp_path / "packed", layout="mlp.packed")
    checkpoint = open_checkpoint(folder)
    found = {checkpoint.fingerprint}
    changes = 0
    for info in checkpoint.tensors.values():
        step = info.row_bytes if len(info.shape) == 3 else info.nbytes
        for first in range(0, info.nbytes, step):
            for at in (first, first + (step - 16) // 2, first + step - 1):
                with_a_bit_flipped(info.file, info.offset + at)
                found.add(open_checkpoint(folder).fingerprint)
                changes += 1
    assert len(found) == 1 + changes
    unseen = next(info for info in checkpoint.tensors.values() if info.nbytes > 200)
    with_a_bit_flipped(unseen.file, unseen.offset + 17)
    assert open_checkpoint(folder).fingerprint in found


def test_fingerprints_of_earlier_versions_are_compared_by_what_they_cover() -> None:
    assert difference("a.b", "a.b") is None
    assert difference("a", "a.b") is None
    assert difference("a.b", "a") is None
    assert "another model" in str(difference("a", "c.b"))
    assert "another model" in str(difference("a.b", "c.b"))
    assert "other weights" in str(difference("a.b", "a.c"))
