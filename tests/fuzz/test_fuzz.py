"""The fuzzer itself: a minute of cases, and proof that it would notice faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.fuzz import run
from tests.fuzz.command import Ran, run_command
from tests.fuzz.spoil import SPOILERS
from tests.fuzz.targets import TARGETS
from vllm_moe_prune import cli

ROOT = Path(__file__).parents[2]
SECONDS = os.environ.get("MOE_PRUNE_FUZZ_SECONDS", "60")


@pytest.mark.slow
@pytest.mark.timeout(float(SECONDS) + 300)
def test_a_minute_of_spoilt_files_finds_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", "--seconds", SECONDS, "--seed", "0"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'serve'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout.splitlines()[-1]


def test_every_target_can_be_spoilt() -> None:
    assert {target.how for target in TARGETS} <= SPOILERS.keys()
    assert len({(target.file, target.how, target.commands) for target in TARGETS}) == (
        len(TARGETS)
    )


@pytest.mark.parametrize(
    ("ran", "fault"),
    [
        (Ran(0, "", "some words\n"), None),
        (Ran(2, "", "error: it is refused.\n"), None),
        (Ran(1, "", "error: it is refused.\n"), "status 1"),
        (Ran(2, "", "error: one\nerror: two\n"), "not one line"),
        (Ran(2, "", "Traceback\n"), "not one line"),
        (Ran(2, "", "error: internal error, KeyError: 'x'\n"), "unexpected"),
        (Ran(2, "", "error: out of memory. \n"), "unexpected"),
    ],
)
def test_what_counts_as_a_fault(ran: Ran, fault: str | None) -> None:
    assert ran.fault == fault


class Panic(BaseException):
    """What pyo3 raises when Rust code panics is no ``Exception``."""


def hang() -> None:
    """Wait for a writer that never comes, as opening a FIFO does."""
    os.mkfifo("fifo")
    Path("fifo").read_bytes()


def spin() -> None:
    """Compute for ever."""
    while True:
        pass


def swell() -> None:
    """Take more memory than any file is worth."""
    Path("swollen").write_bytes(b"x" * (run.MAX_GROWTH + (64 << 20)))


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "found"),
    [
        (lambda: fail(KeyError("layer")), "unexpected"),
        (lambda: fail(RecursionError("deep")), "unexpected"),
        (lambda: fail(MemoryError()), "unexpected"),
        (lambda: fail(Panic("in\nRust")), "unexpected"),
        (hang, "waits for"),
        (spin, "busy for"),
        (swell, "MiB more memory"),
    ],
    ids=["bug", "deep", "memory", "panic", "hang", "spin", "growth"],
)
def test_faults_are_noticed(
    command: object, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted faults, through the same command line and the same limits."""
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("go")(command)  # type: ignore[arg-type]
    monkeypatch.setattr("tests.fuzz.command._built_app", lambda: app)
    monkeypatch.setattr(run, "MAX_SECONDS", 0.5 if command is spin else 60.0)
    monkeypatch.setattr(run, "MAX_WAIT_SECONDS", 0.5 if command is hang else 600.0)
    monkeypatch.chdir(tmp_path)
    ran = Ran("late", "", "")
    with run.limited() as beyond:
        ran = run_command("go")
    assert found in "; ".join([*beyond, ran.fault or ""])


def test_what_nobody_foresaw_is_one_line_with_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("go")(lambda: fail(Panic("in\nRust")))
    monkeypatch.setattr("tests.fuzz.command._built_app", lambda: app)
    ran = run_command("go")
    assert ran.status == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: internal error, Panic: in Rust (")
    assert f"{Path(__file__).name}:" in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert "--debug" in ran.stderr


def test_a_long_message_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.callback()(lambda: None)
    app.command("go")(lambda: fail(OSError("x" * 1_000_000)))
    monkeypatch.setattr("tests.fuzz.command._built_app", lambda: app)
    assert len(run_command("go").stderr) < 2 * cli.MAX_LINE
