"""Work that cannot be finished: Ctrl-C, a full disk; and the real program refusing."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.reference import LayerCut, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import CheckpointError

from .case import deleted, run_cli, snapshot

CUT = "cut ckpt --plan plan.json -o new --calibration text.txt --json"
PROGRAM = [sys.executable, "-m", "vllm_moe_prune"]


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the good files, which is the current folder."""
    copy = tmp_path / "work"
    shutil.copytree(good, copy)
    monkeypatch.chdir(copy)
    return copy


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond a size; the error is that of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def weights(out: Path) -> dict[str, str]:
    """Everything in an output but the record of the run."""
    return {name: what for name, what in snapshot(out).items() if name != "run.json"}


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume_and_resuming_gives_the_same_bytes(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Large enough to be far from done when the signal arrives.
    large = tiny_checkpoint(
        folder / "large", layers=6, experts=16, hidden=256, width=1024, dtype="float32"
    )
    cuts = dict.fromkeys(range(6), LayerCut(sparsity=0.5))
    write_plan(folder / "large.json", open_checkpoint(large), cuts, slim="magnitude")
    command = "cut large --plan large.json -o new --json"
    process = subprocess.Popen(
        [*PROGRAM, *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell inherit that it is ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not (folder / "new.partial").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr == (
        "interrupted: what is finished is kept. "
        "Run the same command with --resume to continue.\n"
    )
    assert not (folder / "new").exists()
    assert run_cli(f"{command} --resume", monkeypatch, capsys).status == 0
    undisturbed = command.replace("-o new", "-o undisturbed")
    assert run_cli(undisturbed, monkeypatch, capsys).status == 0
    assert weights(folder / "new") == weights(folder / "undisturbed")
    assert not (folder / "new.partial").exists()


# More than the tokenizer's files, which are copied to be loaded.
@pytest.mark.parametrize("size", [40_000, 60_000])
def test_a_full_disk_stops_a_cut_that_can_be_resumed(
    size: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = snapshot(folder / "out")
    command = CUT.replace("-o new", "-o out --overwrite")
    with disk_of(size):
        ran = run_cli(command, monkeypatch, capsys)
    assert ran.status == 2, ran
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    for fragment in ("error: out.partial/", "File too large", "--resume"):
        assert fragment in ran.stderr
    assert snapshot(folder / "out") == before

    assert run_cli(f"{command} --resume", monkeypatch, capsys).status == 0
    assert run_cli(CUT, monkeypatch, capsys).status == 0
    assert weights(folder / "new") == weights(folder / "out")


@pytest.mark.parametrize(
    "command",
    [
        "plan ckpt --stats stats.safetensors -o plan.json --recipe stun40-paper --json",
        "measure ckpt -o stats.safetensors --calibration text.txt "
        "--samples 2 --sequence-length 32 --recipe stun40-paper --json",
    ],
    ids=["plan", "measure"],
)
def test_a_full_disk_leaves_an_earlier_file_as_it_was(
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = snapshot(folder)
    with disk_of(100):
        ran = run_cli(command, monkeypatch, capsys)
    assert ran.status == 2, ran
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    after = snapshot(folder)
    assert {name: after[name] for name in before} == before
    assert not list(folder.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["inspect", "ckpt"], ("model-00002-of-00003", "missing")),
        (["inspect", "no-one/nothing"], ("no-one/nothing", "HF_HUB_OFFLINE")),
    ],
    ids=["shard", "hub"],
)
def test_the_program_refuses_in_one_line(
    arguments: list[str], fragments: tuple[str, ...], folder: Path
) -> None:
    deleted("ckpt/model-00002-of-00003.safetensors")(folder)
    ran = subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    for fragment in fragments:
        assert fragment in ran.stderr


def test_debug_lets_the_error_through(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOE_PRUNE_DEBUG", "")  # put back when the test is over
    with pytest.raises(CheckpointError, match="nowhere"):
        run_cli("--debug inspect nowhere", monkeypatch, capsys)
