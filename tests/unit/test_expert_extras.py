"""Tensors below an expert that no table knows: they go where their expert goes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.gptq_awq import make
from tests.reference import (
    DROP_BLOCK,
    DROP_MOE,
    LayerCut,
    raw_bytes,
    read_tensors,
    write_plan,
)
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.convert import convert
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.predict import with_prediction
from vllm_moe_prune.cut.verify import verify
from vllm_moe_prune.decide.cut_plan import CutPlan, load_plan
from vllm_moe_prune.errors import CheckpointError, MoePruneError, PlanError

CUTS = {
    0: LayerCut(keep=(5, 0, 3)),
    1: DROP_MOE,
    2: DROP_BLOCK,
    3: LayerCut(keep=(1, 2, 4)),
}
KEPT = {0: (0, (5, 0, 3)), 1: (1, ()), 2: (3, (1, 2, 4))}
AFTER = ("w1.bias", "w2.input_scale", "w3.weight_scale_2", "w1.g_idx", "scale.a.b")


def add(folder: Path, extra: dict[str, Tensor]) -> None:
    """Add tensors to a checkpoint of one shard."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | extra, path, metadata={"format": "pt"})


def extras(
    layer: int, expert: int, after: tuple[str, ...] = AFTER
) -> dict[str, Tensor]:
    base = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
    return {
        base + name: torch.full((at + 1,), 100 * layer + expert + at / 8)
        for at, name in enumerate(after)
    }


def with_extras(folder: Path, form: str, after: tuple[str, ...] = AFTER) -> Checkpoint:
    if form in ("gptq", "awq"):
        make(folder, form, shards=1)
    else:
        fp8 = (32, 32) if form == "fp8" else None
        tiny_checkpoint(folder, experts=6, shards=1, fp8=fp8)
    for layer in range(4):
        for expert in range(6):
            add(folder, extras(layer, expert, after))
    return open_checkpoint(folder)


def planned(source: Checkpoint, tmp_path: Path) -> CutPlan:
    plan = load_plan(write_plan(tmp_path / "plan.json", source, CUTS))
    return with_prediction(source, plan)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "fp8", "gptq", "awq"])
def test_they_are_renumbered_with_their_expert(form: str, tmp_path: Path) -> None:
    # GPTQ has a g_idx of its own, which is a part of the matrix.
    after = AFTER if form != "gptq" else tuple(a for a in AFTER if "g_idx" not in a)
    source, out = with_extras(tmp_path / "model", form, after), tmp_path / "out"
    plan = planned(source, tmp_path)
    execute_plan(source, plan, out)
    verify(out)
    verify(out, source)
    assert plan.predicted is not None
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert sum(sizes) == plan.predicted.file_bytes
    before, found = read_tensors(tmp_path / "model"), read_tensors(out)
    seen = 0
    for name, tensor in found.items():
        if name.endswith(after):
            parts = name.split(".")
            layer, keep = KEPT[int(parts[2])]
            parts[2], parts[5] = str(layer), str(keep[int(parts[5])])
            assert raw_bytes(tensor) == raw_bytes(before[".".join(parts)]), name
            seen += 1
    assert seen == 6 * len(after)
    if form == "dense":
        convert(open_checkpoint(out), tmp_path / "packed", "bitmask")
        packed = open_checkpoint(tmp_path / "packed")
        assert packed.tensors.keys() == found.keys()


def test_verify_notices_those_that_kept_their_numbers(tmp_path: Path) -> None:
    source, out = with_extras(tmp_path / "model", "dense"), tmp_path / "out"
    execute_plan(source, planned(source, tmp_path), out)
    (path,) = out.glob("*.safetensors")
    tensors = load_file(path)
    right = {name: tensors.pop(name) for name in list(tensors) if name.endswith(AFTER)}
    stale = {}
    for new, (_, keep) in KEPT.items():
        for expert in range(6) if keep else ():
            stale |= extras(new, expert)
    save_file(tensors | stale, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="expert 3 found"):
        verify(out)
    # The right numbers, the wrong values.
    few = {name: stale[name] for name in right}
    save_file(tensors | few, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="values differ from the source"):
        verify(out, source)
    some = dict(list(right.items())[:1])
    save_file(tensors | some, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="none like it"):
        verify(out)


def refused(tmp_path: Path, extra: dict[str, Tensor], **options: object) -> str:
    """What a checkpoint with more tensors is refused with, opened or cut."""
    folder = tiny_checkpoint(tmp_path / "model", shards=1, **{"experts": 6} | options)
    add(folder, extra)

    def run() -> None:
        source = open_checkpoint(folder)
        execute_plan(source, planned(source, tmp_path), tmp_path / "out")

    with pytest.raises(MoePruneError) as error:
        run()
    assert not (tmp_path / "out").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("block_sparse_moe.experts.6.w1.bias", "expert 6 found"),
        ("block_sparse_moe.experts.2.w1.bias", "expert 0 has none like it"),
        ("mlp.experts.9.w1.weight", "expert 9 found"),
        ("block_sparse_moe.gate.bias", "may name experts"),
        ("block_sparse_moe.experts.w2_bias", "may name experts"),
        ("block_sparse_moe.tid2eid", "may name experts"),
    ],
)
def test_what_cannot_be_kept_in_step_is_refused_by_name(
    name: str, says: str, tmp_path: Path
) -> None:
    said = refused(tmp_path, {f"model.layers.0.{name}": torch.ones(6)})
    assert says in said
    assert name in said or "expert" in says


@pytest.mark.parametrize("layout", ["mlp.packed", "block_sparse_moe.packed"])
def test_packed_experts_have_no_extras(layout: str, tmp_path: Path) -> None:
    moe = layout.partition(".")[0]
    name = f"model.layers.0.{moe}.experts.gate_up_proj_bias"
    assert name in refused(tmp_path, {name: torch.ones(6, 4)}, layout=layout)


def test_names_that_may_count_layers_elsewhere_are_refused(tmp_path: Path) -> None:
    name = "model.memory.3.weight"
    assert name in refused(tmp_path, {name: torch.ones(6)})


def test_experts_left_in_a_layer_without_any_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        tmp_path / "model", model_type="deepseek_v2", shards=1, layers=3
    )
    add(folder, {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 2)})
    with pytest.raises(CheckpointError, match="layer 0: expert 0 found"):
        open_checkpoint(folder)


def test_means_and_quantizing_are_refused(tmp_path: Path) -> None:
    source = with_extras(tmp_path / "model", "dense", ("w1.bias",))
    path = tmp_path / "plan.json"
    cluster = LayerCut(keep=(0,), clusters=((0, 1, 2, 3, 4, 5),), reconstruct=True)
    for plan in (
        write_plan(path, source, {0: cluster}),
        write_plan(path, source, {}, quantize={"method": "rtn", "group_size": 32}),
    ):
        with pytest.raises(PlanError, match=r"w1\.bias"):
            execute_plan(source, load_plan(plan), tmp_path / "out")
