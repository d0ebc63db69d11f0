"""Wanda through the whole cut gives the zeros of its formula, layer after layer.

The models are in float32, so that rounding decides no comparison; the reference works
in float64 and shares no code with the package.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.reference import (
    DROP_BLOCK,
    DROP_MOE,
    Cuts,
    Expert,
    LayerCut,
    Reference,
    experts_of,
    raw_bytes,
    read_json,
    read_tensors,
    write_plan,
)
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.data import Tokens
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import CutResult, execute_plan
from vllm_moe_prune.cut.predict import with_prediction
from vllm_moe_prune.cut.verify import verify
from vllm_moe_prune.decide.cut_plan import load_plan

IDS_ST = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(3))
PER_EXPERT, PACKED = "block_sparse_moe.w1w2w3", "mlp.packed"
TRIMMED = {
    0: LayerCut(
        keep=(4, 0, 3),
        clusters=((1, 4), (0, 2), (3, 5)),
        reconstruct=True,
        sparsity=0.5,
    ),
    1: LayerCut(keep=(5, 1, 2, 0), sparsity=0.3),
    2: DROP_MOE,
    3: LayerCut(keep=(1, 3)),
    4: DROP_BLOCK,
    5: LayerCut(sparsity=0.7),
}
REDIRECTED = {
    0: LayerCut(keep=(2, 5), clusters=((0, 2, 4), (1, 3, 5)), sparsity=0.4),
    1: LayerCut(sparsity=0.6),
    2: LayerCut(keep=(3, 1), clusters=((3,), (0, 1, 2, 4, 5)), sparsity=0.5),
}


def make_model(folder: Path, layout: str = PER_EXPERT, layers: int = 6) -> Path:
    return tiny_checkpoint(
        folder,
        layout=layout,
        layers=layers,
        experts=6,
        hidden=16,
        width=24,
        vocab=64,
        dtype="float32",
        tokenizer=False,
    )


def slimmed(
    source: Path,
    out: Path,
    cuts: Cuts,
    *,
    routing: str = "drop",
    ids_ST: Tensor = IDS_ST,
    slim: str = "wanda",
) -> CutResult:
    checkpoint = open_checkpoint(source)
    plan_file = out.with_name(out.name + "-plan.json")
    write_plan(plan_file, checkpoint, cuts, routing=routing, slim=slim)
    plan = with_prediction(checkpoint, load_plan(plan_file))
    tokens = (
        Tokens(ids_ST=ids_ST, source="random", sha256="0" * 64)
        if slim == "wanda"
        else None
    )
    return execute_plan(checkpoint, plan, out, tokens=tokens)


def zeros_in(out: Path, new_index: int) -> list[Expert]:
    tensors = read_tensors(out)
    return [
        Expert(*(m == 0 for m in expert)) for expert in experts_of(tensors, new_index)
    ]


def differing(found: list[Expert], expected: list[Expert]) -> int:
    """How many weights only one of the two zeroes."""
    assert len(found) == len(expected)
    return sum(
        int((ours != theirs).sum())
        for one, other in zip(found, expected, strict=True)
        for ours, theirs in zip(one, other, strict=True)
    )


def count_zeros(out: Path, new_index: int) -> int:
    return sum(int(m.sum()) for expert in zeros_in(out, new_index) for m in expert)


@pytest.mark.parametrize("layout", [PER_EXPERT, PACKED])
def test_zeros_are_those_of_the_formula(tmp_path: Path, layout: str) -> None:
    model, out = make_model(tmp_path / "model", layout), tmp_path / "out"
    slimmed(model, out, TRIMMED)
    expected = Reference(model, TRIMMED).wanda(IDS_ST)
    assert set(expected.masks) == {0, 1, 5}
    assert not expected.unseen
    for old, new in {0: 0, 1: 1, 5: 4}.items():
        assert differing(zeros_in(out, new), expected.masks[old]) == 0, f"layer {old}"
    assert count_zeros(out, 3) == 0


def test_representatives_are_slimmed_on_all_tokens_redirected_to_them(
    tmp_path: Path,
) -> None:
    model, out = make_model(tmp_path / "model", layers=3), tmp_path / "out"
    slimmed(model, out, REDIRECTED, routing="redirect")
    expected = Reference(model, REDIRECTED, routing="redirect").wanda(IDS_ST)
    for layer in REDIRECTED:
        assert differing(zeros_in(out, layer), expected.masks[layer]) == 0
    alone = Reference(model, REDIRECTED).wanda(IDS_ST)
    assert differing(zeros_in(out, 0), alone.masks[0]) > 0


def test_later_layers_are_calibrated_on_the_slimmed_ones(tmp_path: Path) -> None:
    """The reference code feeds them dense activations."""
    model, out = make_model(tmp_path / "model"), tmp_path / "out"
    slimmed(model, out, TRIMMED)
    dense = Reference(model, TRIMMED).wanda(IDS_ST, propagate=False)
    assert differing(zeros_in(out, 0), dense.masks[0]) == 0
    assert differing(zeros_in(out, 1), dense.masks[1]) > 0
    assert differing(zeros_in(out, 4), dense.masks[5]) > 0


@pytest.mark.parametrize("layout", [PER_EXPERT, PACKED])
def test_what_is_not_zeroed_keeps_its_bits(tmp_path: Path, layout: str) -> None:
    model, out = make_model(tmp_path / "model", layout, layers=2), tmp_path / "out"
    keep = (5, 1, 2, 0)
    cuts = {index: LayerCut(keep=keep, sparsity=0.3) for index in range(2)}
    slimmed(model, out, cuts)
    before, after = read_tensors(model), read_tensors(out)
    for layer in range(2):
        sources = experts_of(before, layer)
        for new, expert in enumerate(experts_of(after, layer)):
            for matrix, source in zip(expert, sources[keep[new]], strict=True):
                assert raw_bytes(matrix) == raw_bytes(
                    source.masked_fill(matrix == 0, 0)
                )


def test_experts_without_tokens_are_reported_and_pruned_by_magnitude(
    tmp_path: Path,
) -> None:
    """Two tokens choose at most four of six experts."""
    model, out = make_model(tmp_path / "model", layers=2), tmp_path / "out"
    keep = (5, 4, 3, 2, 1, 0)
    cuts = {index: LayerCut(keep=keep, sparsity=0.5) for index in range(2)}
    ids_ST = IDS_ST[:1, :2]
    result = slimmed(model, out, cuts, ids_ST=ids_ST)
    expected = Reference(model, cuts).wanda(ids_ST)
    assert all(len(expected.unseen[layer]) >= 2 for layer in range(2))
    for record in result.records:
        assert record.unseen == expected.unseen[record.layer]
        found = zeros_in(out, record.layer)
        assert differing(found, expected.masks[record.layer]) == 0
    layers = read_json(out / "provenance.json")["sparsity_achieved"]["layers"]
    assert [layer["unseen_experts"] for layer in layers] == [
        expected.unseen[0],
        expected.unseen[1],
    ]


@pytest.mark.parametrize("slim", ["wanda", "magnitude"])
@pytest.mark.parametrize("layout", [PER_EXPERT, PACKED])
def test_reported_sparsity_is_what_is_in_the_files(
    tmp_path: Path, layout: str, slim: str
) -> None:
    model, out = make_model(tmp_path / "model", layout), tmp_path / "out"
    result = slimmed(model, out, TRIMMED, slim=slim)
    before, after = read_tensors(model), read_tensors(out)
    new_index = {0: 0, 1: 1, 2: 2, 3: 3, 5: 4}
    expert_size = 3 * 16 * 24
    zeros, left = {}, {}
    for old in range(6):
        new = new_index.get(old)
        zeros[old] = 0 if new is None else count_zeros(out, new)
        kept = [] if new is None else experts_of(after, new)
        left[old] = expert_size * len(kept)
    reported = result.achieved
    assert {layer.layer: layer.zeros for layer in reported.layers} == zeros
    assert sum(zeros.values()) > 0
    for layer in reported.layers:
        alive = left[layer.layer] - zeros[layer.layer]
        assert layer.sparsity == pytest.approx(1 - alive / (6 * expert_size))
    alive = sum(left.values()) - sum(zeros.values())
    assert reported.expert_sparsity == pytest.approx(1 - alive / (36 * expert_size))
    total_before = sum(tensor.numel() for tensor in before.values())
    nonzero = sum(int(torch.count_nonzero(tensor)) for tensor in after.values())
    assert reported.total_sparsity == pytest.approx(1 - nonzero / total_before)
    plan = load_plan(out / "plan.json")
    assert plan.predicted is not None
    assert plan.predicted.zeros == reported.zeros == sum(zeros.values())
    assert plan.predicted.expert_sparsity == pytest.approx(reported.expert_sparsity)
    assert plan.predicted.total_sparsity == pytest.approx(reported.total_sparsity)
    verified = verify(out, open_checkpoint(model))
    assert verified.zeros == reported.zeros
    assert verified.expert_sparsity == pytest.approx(reported.expert_sparsity)
    assert verified.total_sparsity == pytest.approx(reported.total_sparsity)


@pytest.mark.parametrize("experts_dtype", [torch.bfloat16, torch.float16])
def test_experts_of_another_type_than_the_rest_keep_theirs(
    tmp_path: Path, experts_dtype: torch.dtype
) -> None:
    model, out = make_model(tmp_path / "model", layers=2), tmp_path / "out"
    tensors = {
        name: tensor.to(experts_dtype) if ".experts." in name else tensor
        for name, tensor in read_tensors(model).items()
    }
    for path in model.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    cuts = {index: LayerCut(sparsity=0.5) for index in range(2)}
    slimmed(model, out, cuts)
    expected = Reference(model, cuts).wanda(IDS_ST)
    for layer in range(2):
        assert differing(zeros_in(out, layer), expected.masks[layer]) == 0
    after = read_tensors(out)
    assert all(after[name].dtype == tensor.dtype for name, tensor in tensors.items())
    verify(out, open_checkpoint(model))
