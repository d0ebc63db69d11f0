"""Every bad input is refused in one line, with status 2, and nothing is changed."""

import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from . import (
    cases_checkpoint,
    cases_compressed,
    cases_config,
    cases_judge,
    cases_output,
    cases_plan,
    cases_quantized,
    cases_recover,
    cases_remap,
    cases_report,
    cases_search,
    cases_special,
    cases_text,
)
from .case import Case, run_cli, snapshot

CASES = [
    *cases_checkpoint.CASES,
    *cases_compressed.CASES,
    *cases_config.CASES,
    *cases_judge.CASES,
    *cases_output.CASES,
    *cases_plan.CASES,
    *cases_quantized.CASES,
    *cases_recover.CASES,
    *cases_remap.CASES,
    *cases_report.CASES,
    *cases_search.CASES,
    *cases_special.CASES,
    *cases_text.CASES,
]


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in CASES]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused(
    case: Case,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(good, folder, symlinks=True)
    case.spoil(folder)
    monkeypatch.chdir(folder)
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    before = snapshot(folder)

    ran = run_cli(case.command, monkeypatch, capsys)

    assert ran.status == 2, ran
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.endswith("\n")
    assert ran.stderr[:-1].isprintable(), "one line, without control characters"
    for fragment in case.says:
        assert fragment in ran.stderr
    after = snapshot(folder)
    assert {name: after.get(name) for name in before} == before
    left = [
        name
        for name in after.keys() - before.keys()
        if not any(
            fnmatch(name, pattern) or name == os.path.dirname(pattern)  # noqa: PTH120
            for pattern in case.leaves
        )
    ]
    assert left == []


@pytest.mark.slow
def test_warnings_of_libraries_do_not_stand_before_the_error(tmp_path: Path) -> None:
    # compressed-tensors warns of `dynamic` without an observer, once a process.
    cases_quantized.block(
        config_groups={
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "group_size": 32, "dynamic": True}
                | {"strategy": "group", "observer": "minmax"},
            }
        }
    )(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-m", "vllm_moe_prune", "serve", "quantized", "--dry-run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: "), ran.stderr
    assert ran.stderr.count("\n") == 1, ran.stderr
