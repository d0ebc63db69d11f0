"""``make gpu-check``: what it says of its steps, which test_pretended.py runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import check
from bench.gpu.check import Step

ROOT = Path(__file__).parents[2]


def verdicts(
    steps: list[Step],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float = 60,
) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and what gpu-check.json says of each step."""
    monkeypatch.setattr(check, "STEPS", steps)
    words = ["check", "--pretend", "--out", str(tmp_path), "--seconds", str(seconds)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        check.main()
    found = json.loads((tmp_path / "gpu-check.json").read_text("utf-8"))
    assert found["pretended"]
    return int(ended.value.code or 0), {one["step"]: one for one in found["steps"]}


def shell(name: str, text: str, seconds: float = 5, **fields: Any) -> Step:
    """A step that runs a line of a shell instead of Python."""
    return Step(name, seconds, "unused", under=("bash", "-c", text), **fields)


def test_steps_that_cannot_run_or_end_are_said_to_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [
        shell("lacking", "exit 1", needs=("no_such_program", "json")),
        shell("long", "exit 1", seconds=61),
        shell("short", "true"),
    ]
    code, found = verdicts(steps, tmp_path, monkeypatch)
    assert code == 0
    assert found["lacking"]["verdict"] == "left out: no no_such_program"
    assert found["long"]["verdict"] == "left out: 60 s left, 61 needed"
    assert found["short"]["verdict"] == "ok"


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, alive = tmp_path / "seen.json", tmp_path / "alive"
    steps = [
        shell("fails", "echo because; exit 3"),
        # What a step has started ends with it.
        shell("hangs", f"(sleep 2; touch {alive}) & sleep 30", seconds=0.5),
        shell("later", f"cp {tmp_path}/gpu-check.json {seen}; sleep 2"),
    ]
    code, found = verdicts(steps, tmp_path, monkeypatch)
    assert code == 1
    assert found["fails"]["verdict"] == "FAILED (3)"
    assert found["fails"]["end"] == ["because"]
    assert found["hangs"]["verdict"] == "NOT DONE in 0 s"
    assert found["later"]["verdict"] == "ok"
    # The file was there, with what was known, before the last step.
    known = json.loads(seen.read_text("utf-8"))["steps"]
    assert [one["step"] for one in known] == ["fails", "hangs"]
    assert not alive.exists()


def test_all_steps_together_end_in_time() -> None:
    assert sum(step.seconds for step in check.STEPS) <= 480
    assert len({step.name for step in check.STEPS}) == len(check.STEPS)


def test_without_a_device_nothing_is_said_to_be_checked(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    words = [sys.executable, "-m", "bench.gpu.check", "--out", str(tmp_path / "out")]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "no CUDA device that torch can use; nothing was checked" in ended.stderr
