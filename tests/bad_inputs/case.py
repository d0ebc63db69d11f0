"""What one bad input is, and the tools to make it out of a good one."""

import hashlib
import json
import shlex
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from vllm_moe_prune import cli

Spoil = Callable[[Path], object]
Edit = Callable[[dict[str, Any]], object]
Change = Callable[[torch.Tensor], object]

SMALL = "--samples 2 --sequence-length 32"
# --overwrite: what stands in out from an earlier run must survive every refusal.
PAPER = "--recipe stun40-paper"
RUN = f"run ckpt out --overwrite --calibration text.txt {SMALL} {PAPER} --json"
CUT = "cut ckpt --plan plan.json -o out --overwrite --calibration text.txt --json"
SHARD = "ckpt/model-00002-of-00003.safetensors"
INDEX = "ckpt/model.safetensors.index.json"
CONFIG = "ckpt/config.json"
LARGE = 1 << 26


def leave_alone(folder: Path) -> None:
    """Spoil nothing: the command line itself is what is wrong."""


@dataclass(frozen=True)
class Case:
    """One bad input: how it comes about, the command that meets it, what it says."""

    name: str
    command: str
    """Run in a folder with ckpt, stats.safetensors, plan.json, out and text.txt."""
    says: tuple[str, ...]
    """Fragments of the one line on stderr."""
    spoil: Spoil = leave_alone
    leaves: tuple[str, ...] = ()
    """What a run that had begun its work may leave beside what was there."""
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    status: object
    stdout: str
    stderr: str


@cache
def built_app() -> object:
    """The command line, built once; that takes longer than most refusals."""
    return typer.main.get_command(cli.app)


def run_cli(
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Ran:
    """Run a command line in this process, as the console script would."""
    monkeypatch.setattr(sys, "argv", ["vllm-moe-prune", *shlex.split(command)])
    monkeypatch.setattr(cli, "app", built_app())
    capsys.readouterr()
    status: object = 0
    try:
        cli.main()
    except SystemExit as done:
        status = done.code
    return Ran(status, *capsys.readouterr())


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder, with a hash of its bytes or where it leads.

    Of files too large to be anything but full of holes, the size.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"link to {path.readlink()}"
        elif path.is_dir():
            what = "folder"
        elif not path.is_file():
            what = "special"
        elif path.stat().st_size > LARGE:
            what = f"{path.stat().st_size} bytes"
        else:
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = what
    return found


def in_json(name: str, edit: Edit) -> Spoil:
    """Change a JSON file in place."""

    def spoil(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text("utf-8"))
        edit(data)
        path.write_text(json.dumps(data), "utf-8")

    return spoil


def with_keys(name: str, **values: Any) -> Spoil:
    """Set top-level keys of a JSON file."""
    return in_json(name, lambda data: data.update(values))


def without_key(name: str, key: str) -> Spoil:
    """Delete a top-level key of a JSON file."""
    return in_json(name, lambda data: data.pop(key))


def holding(name: str, content: str | bytes) -> Spoil:
    """Put something else into a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def deleted(name: str) -> Spoil:
    """Delete a file."""
    return lambda folder: (folder / name).unlink()


def in_tensors(name: str, changes: Mapping[str, Change]) -> Spoil:
    """Change tensors: each becomes what its function returns; nothing, if no tensor."""

    def spoil(folder: Path) -> None:
        path = folder / name
        tensors = load_file(path)
        for tensor, change in changes.items():
            changed = change(tensors.pop(tensor))
            if isinstance(changed, torch.Tensor):
                tensors[tensor] = changed.contiguous()
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def added(name: str, tensor: str, data: torch.Tensor) -> Spoil:
    """Add a tensor to a safetensors file."""

    def spoil(folder: Path) -> None:
        path = folder / name
        save_file(load_file(path) | {tensor: data}, path, metadata={"format": "pt"})

    return spoil


def gone(tensor: object) -> None:
    """No tensor in its place."""


def in_header(name: str, edit: Edit) -> Spoil:
    """Change the header of a safetensors file, leaving the bytes behind it alone."""

    def spoil(folder: Path) -> None:
        path = folder / name
        header, rest = split_header(path)
        edit(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + rest)

    return spoil


def split_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes behind it."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def in_tensor(name: str, edit: Callable[[torch.Tensor], object]) -> Spoil:
    """Change a tensor of the checkpoint in place."""

    def spoil(folder: Path) -> None:
        path = shard_of(folder / "ckpt", name)
        tensors = load_file(path)
        edit(tensors[name])
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def without_tensor(name: str) -> Spoil:
    """Delete a tensor of the checkpoint, from its shard and from the index."""

    def spoil(folder: Path) -> None:
        path = shard_of(folder / "ckpt", name)
        tensors = load_file(path)
        del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
        in_json(INDEX, lambda index: index["weight_map"].pop(name))(folder)

    return spoil


def with_tensor(name: str, tensor: torch.Tensor) -> Spoil:
    """Add a tensor to the checkpoint, or put another in its place."""

    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        file_name = index.setdefault(name, Path(SHARD).name)
        path = folder / "ckpt" / file_name
        tensors = load_file(path) | {name: tensor}
        save_file(tensors, path, metadata={"format": "pt"})
        with_keys(INDEX, weight_map=index)(folder)

    return spoil


def shard_of(checkpoint: Path, name: str) -> Path:
    """The shard that holds a tensor."""
    index = checkpoint / "model.safetensors.index.json"
    file_name: str = json.loads(index.read_text())["weight_map"][name]
    return checkpoint / file_name


def both(*spoils: Spoil) -> Spoil:
    """One after the other."""

    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil
