"""The files in examples/ that the guides show run as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "example", [*SCRIPTS, EXAMPLES / "api.py"], ids=lambda path: path.name
)
def test_an_example_runs_and_writes_a_checkpoint(example: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = [sys.executable] if example.suffix == ".py" else ["bash"]
    # The scripts call vllm-moe-prune, which lies beside this Python.
    found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*program, str(example), str(out)],
        env=os.environ | {"PATH": found},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "provenance.json").is_file()
    assert list(out.glob("*.safetensors"))
