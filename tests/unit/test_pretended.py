"""The GPU check and the pipeline on a device that is not there, in one process."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import check

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "pretended.json"
STEPS = [
    step for step in check.STEPS if not step.under and not check.missing(step.needs)
]
RECIPES = (("arctic", "redirect + sparsegpt 2:4"),)
"""Beside the check's own; each costs 4 s."""
Found = Mapping[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each wrote, by the name of a step, or "pipeline"."""
    out = tmp_path_factory.mktemp("pretended")
    options = check.options_of(["--pretend", "--out", str(out)])
    words = ["tests.pretended.pipeline", "--json", str(out / "pipeline.json")]
    words += ["--layers", "2", "--width", "64"]
    for pair in RECIPES:
        words += ["--only", *pair]
    # As the check starts them, but together: imports take longer than most steps.
    for step in STEPS:
        said = check.command(step, out / f"{step.name}.json", options)
        words += ["+", *said[said.index("tests.pretended.run") + 1 :]]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.pretended.run", *words],
        cwd=ROOT,
        env=check.environment(out),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    names = [*(step.name for step in STEPS), "pipeline"]
    return {
        name: json.loads((out / f"{name}.json").read_text("utf-8")) for name in names
    }


@pytest.mark.timeout(300)
def test_every_step_of_the_gpu_check_starts_ends_and_writes(found: Found) -> None:
    assert all(found.values())
    assert found["right"] == {"checked": 2, "wrong": []}
    assert [one["verdict"] for one in found["prune"]] == ["ok"]
    assert "left_out" not in json.dumps(found)


@pytest.mark.timeout(300)
def test_pruning_on_a_device_gives_the_bytes_of_a_cpu(found: Found) -> None:
    same = [one["same"] for one in found["pipeline"]]
    assert same == [True] * len(RECIPES)
    assert [one["as_on_cpu"] for one in found["prune"]] == [True]


@pytest.mark.timeout(300)
def test_a_layer_waits_and_launches_no_more_than_it_did(
    found: Found, update_golden: bool
) -> None:
    """More must be accepted by hand: --update-golden."""
    counts = {
        f"{one['family']}: {one['recipe']}": {
            what: one[what] for what in ("launches", "waits")
        }
        for one in found["pipeline"]
    }
    # Each expert but the first is copied while another computes.
    assert all(one["copied ahead"] for one in found["pipeline"])
    if update_golden:
        GOLDEN.write_text(json.dumps(counts, indent=1) + "\n", "utf-8")
    limits = json.loads(GOLDEN.read_text("utf-8"))
    assert counts.keys() == limits.keys()
    more = {
        name: (counted, limits[name])
        for name, counted in counts.items()
        if any(counted[what] > limits[name][what] for what in counted)
    }
    assert not more
