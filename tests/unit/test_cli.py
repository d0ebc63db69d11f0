"""What the command line makes of errors, sizes and times."""

import errno
import sys
from pathlib import Path

import pytest

from tests.bad_inputs.case import run_cli
from tests.bad_inputs.permissions import permissions_count
from vllm_moe_prune import __version__
from vllm_moe_prune.checkpoint.output_path import check_file, check_folder
from vllm_moe_prune.cli import main
from vllm_moe_prune.cli.output.draw import duration, facts, resumable, table, watching
from vllm_moe_prune.cli.output.show import experts_text
from vllm_moe_prune.errors import Interrupted, OutputError, said_by
from vllm_moe_prune.progress import Progress, gib

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0.00 MiB"),
        (8 * MIB, "8.00 MiB"),
        (GIB // 2, "0.50 GiB"),
        (86.9 * GIB, "86.90 GiB"),
    ],
)
def test_sizes_have_a_unit_that_suits_them(size: float, shown: str) -> None:
    assert gib(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (59.96, "1 min 0 s"),
        (61, "1 min 1 s"),
        (119.7, "2 min 0 s"),
        (3599.8, "1 h 0 min"),
        (7260, "2 h 1 min"),
    ],
)
def test_times_are_said_as_people_say_them(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_counts_of_experts() -> None:
    assert experts_text([8, 8, 8]) == "8"
    assert experts_text([5, 8, 6]) == "5-8 (mean 6.3)"


def test_tables_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    odd = "a[red]b:smile:[/]"
    table(odd, (odd, "n"), [(odd, 7)])
    facts(odd, [(odd, odd)])
    shown = capsys.readouterr().out
    assert shown.count(odd) == 6
    assert "\x1b" not in shown


def test_progress_shows_the_last_step_of_every_stage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with watching() as report:
        for stage in ("measure", "cut"):
            for layer in range(1, 5):
                report(
                    Progress(
                        stage=stage,
                        layer=layer,
                        layers=4,
                        bytes_done=layer * GIB,
                        bytes_total=4 * GIB,
                    )
                )
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("layer 4 of 4, 4.00 of 4.00 GiB") == 2
    assert len(shown.err.splitlines()) <= 3, "at most the first and the last ones"


def test_progress_is_silent_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(quiet=True) as report:
        report(Progress(stage="cut", layer=1, layers=1, bytes_done=1, bytes_total=1))
    assert capsys.readouterr() == ("", "")


def test_an_error_of_python_about_a_file_loses_its_number() -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "plan.json")
    assert said_by(error) == "plan.json: Permission denied."
    assert said_by(OSError("odd")) == "odd"


def test_ctrl_c_and_a_failing_disk_say_how_to_go_on() -> None:
    with pytest.raises(Interrupted, match=r"Go on so\."), resumable("Go on so."):
        raise KeyboardInterrupt
    full = pytest.raises(OutputError, match=r"^x: Full\. When that is mended: Go on")
    with full, resumable("Go on so."):
        raise OSError(errno.ENOSPC, "Full", "x")


def test_a_file_that_must_not_be_read_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").touch(mode=0)
    with permissions_count():
        ran = run_cli(f"inspect {tmp_path}", monkeypatch, capsys)
    assert ran.status == 2
    assert ran.stderr == f"error: {tmp_path}/config.json: Permission denied.\n"


def test_what_a_file_name_hides_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm-moe-prune", "inspect", "a\x1b[2J\nb"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: a [2J b: no such folder")
    assert shown.count("\n") == 1


def test_no_arguments_show_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = run_cli("", monkeypatch, capsys)
    assert bare.status == 0
    assert bare == run_cli("--help", monkeypatch, capsys)
    assert "Usage: vllm-moe-prune" in bare.stdout


def test_the_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_cli("--version", monkeypatch, capsys)
    assert (ran.status, ran.stdout) == (0, f"vllm-moe-prune {__version__}\n")


def test_a_mount_point_is_no_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a mount point"):
        check_folder(Path("/proc"), tmp_path)


def test_an_output_beside_its_input_may_begin_with_the_same_name(
    tmp_path: Path,
) -> None:
    source = tmp_path / "model"
    source.mkdir()
    check_folder(tmp_path / "model-pruned", source)
    check_folder(tmp_path / "new" / "folders" / "out", source)
    check_file(tmp_path / "model.json", source)
