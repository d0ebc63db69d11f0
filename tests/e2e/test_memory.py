"""Memory is bounded by a layer: twice the layers need no more of it.

The peak is what the kernel says of the process's own address space. (``ru_maxrss``
would not do: over fork and exec it inherits the parent's.)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine import ENVIRONMENT, python_path
from tests.reference import LayerCut, read_json, write_plan
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

FEW, MANY, EXPERTS = 3, 6, 8
# The command line, and then a line with the peak in KiB.
SCRIPT = """
import re, pathlib
from vllm_moe_prune.cli import main
try:
    main()
finally:
    status = pathlib.Path("/proc/self/status").read_text()
    print("\\npeak", re.search(r"VmHWM:\\s*(\\d+) kB", status)[1])
"""


def make_model(folder: Path, layers: int, *, hidden: int = 384) -> Path:
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
    """About 1, 65 and 130 MB."""
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
        keep=(0, 2),
        clusters=((0, 1, 7), (2, 3, 4, 5, 6)),
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
            "calibration": {"source": str(text), "samples": 2, "sequence_length": 32}
        },
    )
    command = [sys.executable, "-c", SCRIPT, "cut", str(model), "--json"]
    command += ["--plan", str(plan), "-o", str(scratch / "out")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    peak = 1024 * int(process.stdout.rsplit("peak ", 1)[1])
    recorded = read_json(scratch / "out" / "run.json")["peak_rss_bytes"]
    assert 0.9 * peak < recorded <= peak
    return peak


@pytest.mark.parametrize("method", ["none", "wanda"])
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


# What vLLM allocates while it builds and fills a model: at the most, and in the end.
LOADING = """
import json, re, sys, threading
from vllm import LLM
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

def held():
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"RssAnon:\\s*(\\d+) kB", status.read())[1])

load = BaseModelLoader.load_model
def watched(*args, **options):
    before, found, done = held(), [0], threading.Event()
    def watch():
        while not done.wait(0.002):
            found.append(held())
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(*args, **options)
    done.set()
    watcher.join()
    end = held()
    print("\\nheld", json.dumps([max(found + [end]) - before, end - before]))
    return model

BaseModelLoader.load_model = watched
LLM(sys.argv[1], quantization="moe_prune", enforce_eager=True, max_model_len=64,
    max_num_batched_tokens=64, max_num_seqs=2, skip_tokenizer_init=True)
"""


@pytest.mark.vllm
def test_zeros_are_left_out_one_layer_at_a_time(tmp_path: Path) -> None:
    source = open_checkpoint(make_model(tmp_path / "original", MANY, hidden=768))
    cuts = {index: LayerCut(sparsity=0.75) for index in range(MANY)}
    plan = write_plan(tmp_path / "plan.json", source, cuts, slim="magnitude")
    execute_plan(source, load_plan(plan), tmp_path / "zeros")
    zeros = open_checkpoint(tmp_path / "zeros")
    ran = subprocess.run(
        [sys.executable, "-c", LOADING, str(zeros.folder)],
        env=os.environ
        | ENVIRONMENT
        | {"PYTHONPATH": python_path(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    peak, end = json.loads(ran.stdout.split("held ", 1)[1].splitlines()[0])
    experts = 2 * zeros.expert_parameters
    packed = experts * (2 * 0.25 + 1 / 8) / 2
    others = zeros.tensor_bytes - experts
    spare = 16 << 20
    most = packed + others + experts / MANY + spare
    assert packed < end <= peak < most
    assert most < 0.6 * experts, "says nothing"
