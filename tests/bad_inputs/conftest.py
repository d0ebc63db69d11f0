"""The good files that every bad input is made from."""

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.cli import main

from .case import PAPER, SMALL
from .permissions import permissions_count


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its statistics, a plan, two outputs, a text: all as it should be.

    ``out`` was pruned the same in both layers, ``uneven`` was not.
    """
    folder = tmp_path_factory.mktemp("good")
    tiny_checkpoint(folder / "ckpt", layers=2, experts=4, hidden=32, width=48)
    tiny_text(folder, 8000)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            f"run ckpt out --calibration text.txt --stats stats.safetensors {SMALL} "
            f"{PAPER} --keep 3 --budget per-layer --total 0.4",
            f"run ckpt uneven --calibration text.txt --stats stats.safetensors {SMALL} "
            f"{PAPER} --drop 0.125 --total 0.2",
            "plan ckpt --stats stats.safetensors -o plan.json --calibration text.txt "
            f"{SMALL} {PAPER} --keep 3 --total 0.4",
        ):
            patch.setattr(sys, "argv", ["vllm-moe-prune", *shlex.split(command)])
            with pytest.raises(SystemExit) as done:
                main()
            assert done.value.code == 0, command
    return folder


@pytest.fixture(autouse=True)
def surroundings(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """No Hub, a ``vllm`` that is only found, not run, and root bound by permissions."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    programs = tmp_path_factory.mktemp("bin")
    (programs / "vllm").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    with permissions_count():
        yield
