"""What a cut does with refitted projections: states, bytes, resuming, families."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.killing import Killed, at_layer
from tests.reference import DROP_BLOCK, DROP_MOE, LayerCut, folder_bytes
from tests.refitting import HALF, MERGED, Cuts, model, plan_of, run
from tests.streamed import hidden_states
from vllm_moe_prune.calibrate import boundary
from vllm_moe_prune.calibrate.data import Tokens, sha256_of
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_expert, read_tensor
from vllm_moe_prune.errors import OutputError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return model(tmp_path_factory.mktemp("refit") / "model")


EVERYTHING: dict[str, tuple[Cuts, list[int], dict[str, Any]]] = {
    "merged": ({0: MERGED, 2: HALF}, [0, 2], {}),
    "redirected": ({1: MERGED}, [1], {"routing": "redirect"}),
    "with dropped ones": ({0: HALF, 1: DROP_BLOCK, 2: HALF}, [0, 2], {}),
    "behind a dropped sublayer": ({0: DROP_MOE}, [1], {}),
    "before a dropped block": ({1: DROP_BLOCK}, [0], {}),
    "behind a dropped start": ({0: DROP_BLOCK}, [1], {}),
    "slimmed": (
        {0: LayerCut(keep=(0, 3, 5), sparsity=0.3), 1: LayerCut(sparsity=0.3)},
        [0],
        {"slim": "wanda"},
    ),
    "slimmed by magnitude": (
        {0: LayerCut(keep=(0, 3, 5), sparsity=0.3)},
        [0],
        {"slim": "magnitude"},
    ),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_hidden_states_come_nearer_the_original(
    checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    cuts, refit, how = EVERYTHING[name]
    fresh = torch.randint(3, 64, (4, 40), generator=torch.Generator().manual_seed(9))
    goal = hidden_states(StreamingModel(checkpoint), fresh)
    distances = []
    for layers in ([], refit):
        plan = plan_of(checkpoint, cuts, layers, **how)
        pruned, result = run(checkpoint, plan, tmp_path / f"out-{len(layers)}")
        distances.append(
            float((hidden_states(StreamingModel(pruned), fresh) - goal).norm())
        )
        assert plan.needs_activations or not layers
        refitted = [record for record in result.records if record.refit]
        assert [record.layer for record in refitted] == layers
    assert distances[1] < 0.985 * distances[0]


@pytest.mark.parametrize("layout", ["block_sparse_moe.w1w2w3", "mlp.packed"])
def test_a_plan_that_changes_nothing_gives_identical_bytes(
    tmp_path: Path, layout: str
) -> None:
    checkpoint = model(tmp_path / "model", layout=layout)
    copied, _ = run(checkpoint, plan_of(checkpoint, {}, []), tmp_path / "copied")
    refitted, result = run(
        checkpoint, plan_of(checkpoint, {}, [0, 1, 2]), tmp_path / "refitted"
    )
    shards = [
        {
            name: data
            for name, data in folder_bytes(one.folder).items()
            if name.endswith(".safetensors")
        }
        for one in (copied, refitted)
    ]
    assert shards[0]
    assert shards[0] == shards[1]
    assert not any(record.refit for record in result.records)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [{}, {"method": "gptq", "group_size": 32}])
def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: dict[str, Any]
) -> None:
    monkeypatch.setattr(boundary, "MAX_OVERHEAD", float("inf"))
    checkpoint = model(tmp_path / "model", layers=5, width=32)
    cuts = {1: HALF, 2: DROP_BLOCK, 3: HALF, 4: MERGED}
    if quantize:
        cuts[4] = HALF
    plan = plan_of(checkpoint, cuts, [1, 3, 4], quantize=quantize)
    how: dict[str, Any] = {"max_shard_bytes": 20_000}
    _, whole = run(checkpoint, plan, tmp_path / "whole", **how)
    for stop in range(1, 6):
        out = tmp_path / f"out-{stop}"
        with pytest.raises(Killed):
            run(checkpoint, plan, out, report=at_layer(stop), **how)
        _, resumed = run(checkpoint, plan, out, resume=True, **how)
        assert folder_bytes(out) == folder_bytes(tmp_path / "whole")
        assert resumed.records == whole.records
    # What was done is told again from the output alone.
    _, told = run(checkpoint, plan, tmp_path / "whole", resume=True, **how)
    assert [one.refit for one in told.records] == [one.refit for one in whole.records]


def test_a_boundary_without_the_original_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "MAX_OVERHEAD", float("inf"))
    plan = plan_of(checkpoint, dict.fromkeys(range(3), HALF), [0, 1, 2])
    how: dict[str, Any] = {"max_shard_bytes": 20_000}
    with pytest.raises(Killed):
        run(checkpoint, plan, tmp_path / "out", report=at_layer(2), **how)
    monkeypatch.setattr(boundary, "ORIGINAL", "something else")
    with pytest.raises(OutputError, match=r"damaged: it holds no hidden states"):
        run(checkpoint, plan, tmp_path / "out", resume=True, **how)


FAMILIES = (
    "arctic",
    "deepseek",
    "deepseek_v2",
    "deepseek_v3",
    "olmoe",
    "qwen3_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "minimax_m2",
    "qwen2_moe",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str) -> None:
    """Dense parts, shared experts and groups; MTP layers read what layers give."""
    mtp = {"num_nextn_predict_layers": 1} if family == "deepseek_v3" else {}
    checkpoint = model(tmp_path / "model", model_type=family, **mtp)
    layers = [layer.index for layer in checkpoint.moe_layers]
    experts = checkpoint.moe_layers[0].num_experts
    keep = tuple(expert for expert in range(experts) if expert % 4 < 2)
    plan = plan_of(checkpoint, dict.fromkeys(layers, LayerCut(keep=keep)), layers)
    _, result = run(checkpoint, plan, tmp_path / "out")
    for record in result.records:
        assert record.refit is not None
        assert record.refit.ridge is not None
        assert all(one.after < one.before for one in record.refit.sources)


def test_shared_experts_are_slimmed_once(tmp_path: Path) -> None:
    """Refits need what they give before it is added to the layer's output."""
    checkpoint = model(tmp_path / "model", model_type="deepseek_v3")
    (*_, last) = checkpoint.moe_layers
    keep = tuple(expert for expert in range(last.num_experts) if expert % 4 < 2)
    cuts = {last.index: LayerCut(keep=keep, sparsity=0.5)}
    outputs, zeros = [], []
    for layers in ([], [last.index]):
        plan = plan_of(checkpoint, cuts, layers, slim="wanda")
        plan = plan.model_copy(update={"slim_parts": ("experts", "shared")})
        out, result = run(checkpoint, plan, tmp_path / f"out-{len(layers)}")
        names = [name for name in out.tensors if ".shared_experts." in name]
        outputs.append({name: read_tensor(out.tensors[name]) for name in names})
        zeros.append(sum(record.dense_zeros for record in result.records))
    written = sum(int((matrix == 0).sum()) for matrix in outputs[0].values())
    assert zeros == [written, written] != [0, 0]
    assert all(torch.equal(outputs[1][name], outputs[0][name]) for name in outputs[0])


def test_an_expert_that_nobody_chooses_keeps_its_projection(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "model", layers=2, model_type="mixtral", experts=6)
    keep = (0, 3, 5)
    plan = plan_of(checkpoint, {0: LayerCut(keep=keep)}, [0])
    # One token per window and few windows: some expert is left without any.
    ids_ST = torch.full((5, 2), 7)
    tokens = Tokens(ids_ST=ids_ST, source="one", sha256=sha256_of(ids_ST))
    pruned, result = run(checkpoint, plan, tmp_path / "out", tokens=tokens)
    (record,) = result.records
    assert record.unseen
    for old in record.unseen:
        found = read_expert(pruned, pruned.layers[0], keep.index(old))
        source = read_expert(checkpoint, checkpoint.layers[0], old)
        assert torch.equal(found.down_DF, source.down_DF)
