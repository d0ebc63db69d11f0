"""The GPU check and the pipeline on a device that is not there."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import check, prune, slim
from tests.limits import above_limits
from tests.pretended.cuda import PretendedCuda
from tests.pretended.pipeline import compared, plain_attention
from tests.tiny import tiny_text

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = {
    step.name: step
    for step in check.STEPS
    if not step.under and not check.missing(step.needs)
}
LAYERS = 2
RECIPES = (("arctic", "redirect + sparsegpt 2:4"),)
"""Beside the check's own; ``make gpu-pretended`` does all."""


def arguments(name: str, out: Path) -> list[str]:
    """Module and arguments of a step, as the check starts it."""
    options = check.options_of(["--pretend", "--out", str(out)])
    said = check.command(STEPS[name], out / f"{name}.json", options)
    return said[said.index("tests.pretended.run") + 1 :]


@pytest.mark.timeout(300)
def test_every_step_of_the_gpu_check_starts_ends_and_writes(tmp_path: Path) -> None:
    """In one process: imports take longer than steps. Those below import more."""
    names = [name for name in STEPS if name not in ("prune", "methods")]
    words = [word for name in names for word in ("+", *arguments(name, tmp_path))]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.pretended.run", *words],
        cwd=ROOT,
        env=check.environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = {
        name: json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
        for name in names
    }
    assert all(found.values())
    assert found["right"] == {"checked": 2, "wrong": []}
    assert "left_out" not in json.dumps(found)


def test_the_check_prunes_twice_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", arguments("prune", tmp_path))
    with PretendedCuda(), plain_attention(), pytest.raises(SystemExit) as ended:
        prune.main()
    assert not ended.value.code
    (found,) = json.loads((tmp_path / "prune.json").read_text("utf-8"))
    assert (found["verdict"], found["as_on_cpu"]) == ("ok", True)


def test_the_check_runs_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", arguments("methods", tmp_path))
    with PretendedCuda():
        slim.main()
    found = json.loads((tmp_path / "methods.json").read_text("utf-8"))
    methods = [one["method"] for one in found]
    assert methods == [*slim.METHODS, *slim.quantizing()]
    assert all("seconds" in one for one in found)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What became of each recipe, by family and recipe."""
    out, found = tmp_path_factory.mktemp("pretended"), {}
    text = tiny_text(out)
    for family, name in RECIPES:
        checkpoint = prune.source(out, family, LAYERS, 64)
        recipe = prune.recipe(name, text)
        with PretendedCuda(), plain_attention():
            of = compared(checkpoint, LAYERS, recipe, out / f"{family}-out")
        found[f"{family}: {name}"] = of
    return found


def test_pruning_on_a_device_gives_the_bytes_of_a_cpu(
    pruned: Mapping[str, Any],
) -> None:
    assert all(of["same"] for of in pruned.values())


def test_a_layer_waits_and_launches_no_more_than_it_did(
    pruned: Mapping[str, Any], update_golden: bool
) -> None:
    """More must be accepted by hand: --update-golden."""
    counts = {
        name: {what: of[what] for what in ("launches", "waits")}
        for name, of in pruned.items()
    }
    # Experts are copied while others compute.
    assert all(of["copied ahead"] for of in pruned.values())
    assert not above_limits(counts, "pretended.json", update=update_golden)
