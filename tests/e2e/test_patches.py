"""The diffs for upstream do what they say: stock vLLM, patched, without the plugin.

One process, vLLM's own classes: the installed vLLM with the patched files laid over it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import family_cases
from tests.engine import ENVIRONMENT, assert_same, python_path
from tests.family_cases import keep
from tests.patched import FOLDER, PATCHES, VERSION, overlay
from tests.reference import DROP_MOE, LayerCut, Reference, read_json, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan

pytestmark = pytest.mark.vllm

MIXTRAL = {
    0: LayerCut(keep=(0, 2, 3, 5, 7)),
    1: LayerCut(keep=(4,)),
    2: DROP_MOE,
    3: LayerCut(keep=(6, 0, 2)),
}
# Groups stay equal: unequal ones are what the third diff refuses.
V2 = family_cases.Case("deepseek_v2", {1: family_cases.EQUAL, 2: keep(*range(16))})
SCRIPT = """
import json, sys
import torch
import vllm
from tests.engine import served
from vllm_moe_prune.plugin.compat import allow_amx, mend_cpu_rotary

assert vllm.__file__.startswith({overlay!r})
# Defects of the CPU build that are none of these diffs' business.
allow_amx()
mend_cpu_rotary()
torch.save(served({mixtral!r}), {mixtral_out!r})
torch.save(served({v2!r}, attention_backend="CPU_MLA"), {v2_out!r})
told = {{}}
try:
    served({incomplete!r})
except ValueError as error:
    told["incomplete"] = str(error)

from vllm.model_executor.layers.fused_moe.experts.cpu_moe import _apply_expert_map
weights, ids = _apply_expert_map(
    torch.tensor([[0.75, 0.25]]),
    torch.tensor([[1, 3]], dtype=torch.int32),
    torch.tensor([-1, -1, 0, 1], dtype=torch.int32),
    False,
)
told["map"] = [weights.tolist(), ids.tolist(), str(ids.dtype)]
import pytest
# As vLLM's own: without this project's conftest and settings.
alone = ["-q", "-c", "/dev/null", "-p", "no:cacheprovider"]
told["tests"] = int(pytest.main([*alone, "--rootdir", {tests!r}, {tests!r}]))
print("TOLD", json.dumps(told))
"""


def as_stock(folder: Path, architecture: str) -> Path:
    """The same checkpoint under the name of vLLM's own class."""
    path = folder / "config.json"
    config = read_json(path) | {"architectures": [architecture]}
    path.write_text(json.dumps(config), "utf-8")
    return folder


def without_expert(folder: Path, out: Path, prefix: str) -> Path:
    """A copy whose weights lack one expert."""
    from safetensors.torch import load_file, save_file

    out.mkdir()
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    left = {name: value for name, value in tensors.items() if prefix not in name}
    assert len(left) == len(tensors) - 3
    save_file(left, out / "model.safetensors")
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


@pytest.mark.timeout(600)
def test_patched_vllm_serves_uneven_layers_and_refuses_the_rest(
    tmp_path: Path,
) -> None:
    original = tiny_checkpoint(
        tmp_path / "mixtral", experts=8, vocab=128, dtype="float32", tokenizer=False
    )
    source = open_checkpoint(original)
    plan = write_plan(tmp_path / "plan.json", source, MIXTRAL)
    mixtral = tmp_path / "mixtral-pruned"
    execute_plan(source, load_plan(plan), mixtral)
    mixtral = as_stock(mixtral, "MixtralForCausalLM")
    v2, expected_v2, _ = family_cases.make_pruned(tmp_path, V2)
    v2 = as_stock(v2, "DeepseekV2ForCausalLM")
    incomplete = without_expert(
        mixtral, tmp_path / "incomplete", "layers.3.block_sparse_moe.experts.1."
    )

    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    patched = overlay(tmp_path / "overlay", Path(spec.origin).parents[1], PATCHES)
    outs = [tmp_path / "mixtral.pt", tmp_path / "v2.pt"]
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(
            overlay=str(patched),
            mixtral=str(mixtral),
            mixtral_out=str(outs[0]),
            v2=str(v2),
            v2_out=str(outs[1]),
            incomplete=str(incomplete),
            tests=str(FOLDER / f"vllm-{VERSION}" / "pull_requests"),
        )
    )
    run = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ
        | ENVIRONMENT
        | {
            "PYTHONPATH": python_path(patched),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_PLUGINS": "none",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    expected = Reference(original, MIXTRAL).logits(torch.tensor([family_cases.TOKENS]))
    assert_same(torch.load(outs[0]), expected[0].log_softmax(dim=-1))
    assert_same(torch.load(outs[1]), expected_v2)
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("TOLD ")]
    told = json.loads(line.removeprefix("TOLD "))
    assert "layers.3" in told["incomplete"]
    assert "the first is 1" in told["incomplete"]
    assert told["tests"] == 0, run.stdout[-4000:]
    assert "11 passed" in run.stdout
    assert told["map"] == [[[0.0, 0.25]], [[0, 1]], "torch.int32"]
