"""Memory is bounded by a layer: twice the layers need no more of it.

Peaks are what the kernel says of the finished process (``wait4``), in bytes.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reference import LayerCut, write_plan
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.checkpoint.source import open_checkpoint

pytestmark = pytest.mark.slow

FEW, MANY, EXPERTS = 3, 6, 8
METHODS = ["none", "magnitude", "wanda"]


def make_model(folder: Path, layers: int, *, hidden: int = 512) -> Path:
    return tiny_checkpoint(
        folder,
        layers=layers,
        experts=EXPERTS,
        hidden=hidden,
        width=3 * hidden,
        heads=4,
        kv_heads=2,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """About 1, 110 and 220 MB."""
    folder = tmp_path_factory.mktemp("memory")
    return {
        "none": make_model(folder / "none", FEW, hidden=32),
        "few": make_model(folder / "few", FEW),
        "many": make_model(folder / "many", MANY),
    }


def layer_bytes(model: Path) -> int:
    checkpoint = open_checkpoint(model)
    names = checkpoint.layer_names(0)
    return sum(checkpoint.tensors[name].nbytes for name in names)


def peak_of_a_cut(model: Path, scratch: Path, method: str) -> int:
    checkpoint = open_checkpoint(model)
    half = LayerCut(
        keep=(0, 2, 5),
        clusters=((0, 1), (2, 3, 4), (5, 6, 7)),
        reconstruct=True,
        sparsity=0.5,
    )
    text = tiny_text(scratch)
    plan = write_plan(
        scratch / "plan.json",
        checkpoint,
        {layer.index: half for layer in checkpoint.layers},
        slim=method,
        recipe={
            "calibration": {"source": str(text), "samples": 4, "sequence_length": 64}
        },
    )
    command = [sys.executable, "-m", "vllm_moe_prune", "cut", str(model)]
    command += ["--plan", str(plan), "-o", str(scratch / "out"), "--json"]
    with (scratch / "said.txt").open("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        assert process.returncode == 0, said.read()
    return usage.ru_maxrss * 1024


@pytest.mark.parametrize("method", METHODS)
def test_peak_memory_does_not_grow_with_the_layers(
    models: dict[str, Path], tmp_path: Path, method: str
) -> None:
    peaks = {}
    for size, model in models.items():
        (tmp_path / size).mkdir()
        peaks[size] = peak_of_a_cut(model, tmp_path / size, method)
    layer = layer_bytes(models["few"])
    more_weights = (MANY - FEW) * layer
    assert peaks["many"] - peaks["few"] < more_weights / 4
    assert peaks["few"] - peaks["none"] < 2 * layer
