"""``measure`` under torchrun: any number of processes writes the file that one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_checkpoint, tiny_text


def moe_prune(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in one process, or in several that torchrun starts."""
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(ranks)]
    torchrun += ["--standalone", "-m"]
    start = torchrun if ranks > 1 else []
    return subprocess.run(
        [sys.executable, "-m", *start, "vllm_moe_prune", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 7 experts: no number of ranks divides them.
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), layers=2, experts=7)


RECIPES = {
    # Contributions and mean outputs: what owners of experts find.
    "reap": {
        "experts": {"method": "score", "criterion": "reap", "keep": 4},
        "routing": "mean",
        "spelling": "stock-vllm",
    },
}


@pytest.mark.parametrize(("name", "sizes"), [("reap", (3,))])
def test_any_number_of_ranks_measures_the_same_bytes(
    model: Path, tmp_path: Path, name: str, sizes: tuple[int, ...]
) -> None:
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(json.dumps({"name": name, **RECIPES[name]}))
    text = tiny_text(tmp_path, 20_000)
    asked = [str(model), "--recipe", str(recipe), "--calibration", str(text)]
    asked += ["--samples", "4", "--sequence-length", "64"]
    found = []
    for ranks in (1, *sizes):
        out = tmp_path / f"{ranks}.safetensors"
        done = moe_prune(ranks, "measure", *asked, "-o", str(out))
        assert done.returncode == 0, done.stderr
        # One of them speaks, and nothing is left beside the file.
        assert done.stdout.count("Wrote ") == 1
        found.append(out.read_bytes())
    assert found[1:] == found[:1] * len(sizes)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {recipe.name, text.name} | {
        f"{ranks}.safetensors" for ranks in (1, *sizes)
    }


def test_other_commands_refuse_torchrun(model: Path, tmp_path: Path) -> None:
    done = moe_prune(2, "run", str(model), str(tmp_path / "out"))
    assert done.returncode
    assert "error: run runs in one process; torchrun is for `measure`" in done.stderr
    assert not (tmp_path / "out").exists()


DIFFERENT = """
import sys
from pathlib import Path
from vllm_moe_prune.errors import RanksError
from vllm_moe_prune.ranks.group import joined

with joined() as ranks:
    shared = Path(sys.argv[1]) / str(ranks.rank)
    shared.mkdir()
    for check in (
        lambda: ranks.agree(calibration_text=ranks.rank // 2),
        lambda: ranks.check_shared(shared),
    ):
        try:
            check()
        except RanksError as error:
            print(error)
"""


def test_ranks_with_another_input_or_folder_are_named(tmp_path: Path) -> None:
    script = tmp_path / "different.py"
    script.write_text(DIFFERENT)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "3", str(script), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("rank 2 has another calibration text than rank 0") == 3
    assert done.stdout.count("rank 1 does not see what rank 0 wrote") == 3
    assert not list(tmp_path.glob("*/.ranks-*"))
