"""What a cut of each family computes: that of the original with experts barred.

The reference is plain float64 (``tests/reference_families.py``) and removes nothing.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference import LayerCut, raw_bytes, read_json, read_tensors, write_plan
from tests.reference_families import FamilyReference, Removed
from tests.streamed import streamed_loss
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.block_fp8 import ScaleBlocks
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.verify import verify
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError, PlanError

FAMILIES = (
    *("arctic", "deepseek", "deepseek_v2", "deepseek_v3"),
    "olmoe",
    "qwen3_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "minimax_m2",
    "qwen2_moe",
)
UNEVEN_8 = {1: (0, 3, 4, 6, 7), 2: (1, 2, 5)}
# Groups of four experts; two of each must stay.
UNEVEN_16 = {1: (0, 3, 4, 5, 6, 7, 8, 9, 12, 15), 2: (1, 2, 4, 7, 9, 10, 11, 13, 14)}
EQUAL_16 = {1: (0, 1, 3, 4, 5, 6, 8, 10, 11, 13, 14, 15)}
EQUAL_16 |= {layer: EQUAL_16[1] for layer in (2, 3)}


@pytest.fixture(scope="module")
def ids_ST() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, 512, (2, 20), generator=generator)


def tiny(folder: Path, family: str, **options: Any) -> Path:
    options = {"dtype": "float32", "shards": 2} | options
    return tiny_checkpoint(folder, model_type=family, **options)


def uneven(family: str) -> dict[int, tuple[int, ...]]:
    return UNEVEN_16 if family in ("deepseek_v2", "deepseek_v3") else UNEVEN_8


def pruned(folder: Path, cuts: dict[int, LayerCut], **options: Any) -> Path:
    """Cut by a hand-made plan, and verified."""
    checkpoint = open_checkpoint(folder)
    plan = write_plan(folder.parent / "plan.json", checkpoint, cuts, **options)
    out = folder.parent / "out"
    execute_plan(checkpoint, load_plan(plan), out)
    verify(out, checkpoint)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_at_once(family: str, tmp_path: Path, ids_ST: torch.Tensor) -> None:
    """Uneven experts, a dropped MoE sublayer and a dropped block in one plan."""
    folder = tiny(tmp_path / "in", family, layers=5)
    cuts = {layer: LayerCut(keep=keep) for layer, keep in uneven(family).items()}
    cuts |= {3: LayerCut(action="drop-moe"), 0: LayerCut(action="drop-block")}
    out = pruned(folder, cuts)
    removed = Removed(keep=uneven(family), moe=(3,), blocks=(0,))
    expected = FamilyReference(folder, removed).loss(ids_ST)
    assert streamed_loss(out, ids_ST).mean == pytest.approx(expected, rel=1e-5)
    intact = FamilyReference(folder).loss(ids_ST)
    assert abs(expected - intact) > 1e-4
    config = read_json(out / "config.json")
    assert config["architectures"][0].startswith("MoePrune")
    assert config["num_hidden_layers"] == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_redirected_experts(family: str, tmp_path: Path, ids_ST: torch.Tensor) -> None:
    folder = tiny(tmp_path / "in", family, layers=3)
    experts = 16 if family in ("deepseek_v2", "deepseek_v3") else 8
    keep = tuple(range(0, experts, 2))
    clusters = tuple((expert, expert + 1) for expert in keep)
    out = pruned(
        folder, {2: LayerCut(keep=keep, clusters=clusters)}, routing="redirect"
    )
    redirect = {2: {expert + 1: expert for expert in keep}}
    expected = FamilyReference(folder, Removed(redirect=redirect)).loss(ids_ST)
    assert streamed_loss(out, ids_ST).mean == pytest.approx(expected, rel=1e-5)


UNIFORM_8 = dict.fromkeys(range(4), (0, 3, 4, 6, 7))


@pytest.mark.parametrize(
    ("family", "keeps"),
    [
        *(("deepseek_v2", EQUAL_16), ("deepseek_v3", EQUAL_16)),
        *(("olmoe", UNIFORM_8), ("qwen3_moe", UNIFORM_8)),
        *(("minimax_m2", UNIFORM_8), ("qwen2_moe", UNIFORM_8)),
        ("glm4_moe", {layer: UNIFORM_8[0] for layer in range(1, 5)}),
    ],
)
def test_uniform_plans_are_what_transformers_computes(
    family: str,
    keeps: dict[int, tuple[int, ...]],
    tmp_path: Path,
    ids_ST: torch.Tensor,
) -> None:
    """Groups, where there are any, lose as many experts each."""
    from transformers import AutoModelForCausalLM

    folder = tiny(tmp_path / "in", family)
    cuts = {layer: LayerCut(keep=keep) for layer, keep in keeps.items()}
    out = pruned(folder, cuts)
    config = read_json(out / "config.json")
    assert "per_layer_config" not in config
    assert not config["architectures"][0].startswith("MoePrune")
    model = AutoModelForCausalLM.from_pretrained(out, dtype="float32").eval()
    with torch.no_grad():
        stock = float(model(ids_ST, labels=ids_ST).loss)
    expected = FamilyReference(folder, Removed(keep=keeps)).loss(ids_ST)
    assert stock == pytest.approx(expected, rel=1e-5)
    assert streamed_loss(out, ids_ST).mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize(
    "keep",
    [
        # 12 experts in every layer, which 4 groups would divide.
        (0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13),
        # 4, 3, 4 and 3 of each group: what rounding makes of 14 rows in 4 groups.
        (0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14),
    ],
    ids=["12", "14"],
)
def test_uneven_groups_are_refused_by_who_knows_none(
    family: str, keep: tuple[int, ...], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.integrations.heterogeneity import (
        AmbiguousGlobalPerLayerAttributeError,
    )

    folder = tiny(tmp_path / "in", family, layers=2, first_k_dense_replace=0)
    out = pruned(folder, {0: LayerCut(keep=keep), 1: LayerCut(keep=keep)})
    assert read_json(out / "config.json")["per_layer_config"] == {
        "0": {"n_group": 0},
        "1": {"n_group": 0},
    }
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError, match="n_group"):
        AutoModelForCausalLM.from_pretrained(out)


def test_uneven_groups_are_in_the_table_and_named(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "in", "deepseek_v3", layers=2)
    # As many from every group would be 12 experts as well.
    keep = (0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13)
    out = pruned(folder, {1: LayerCut(keep=keep)})
    entry = read_json(out / "expert_remap.json")["layers"][1]
    assert entry["groups"] == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert read_json(out / "config.json")["architectures"] == [
        "MoePruneDeepseekV3ForCausalLM"
    ]
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    before, after = read_tensors(folder)[bias], read_tensors(out)[bias]
    assert torch.equal(after, before[list(keep)])
    config = read_json(out / "config.json") | {"n_group": 13}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rows do not divide into 13 groups"):
        open_checkpoint(out)


def test_a_group_below_its_floor_is_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "in", "deepseek_v3", layers=2)
    keep = (0, 4, 5, 8, 9, 12, 13, 14)
    with pytest.raises(PlanError, match="keeps 1 experts of group 0"):
        pruned(folder, {1: LayerCut(keep=keep)})


def test_a_cut_of_a_cut_keeps_the_original_groups(
    tmp_path: Path, ids_ST: torch.Tensor
) -> None:
    folder = tiny(tmp_path / "in", "deepseek_v2", layers=3)
    first = pruned(folder, {1: LayerCut(keep=UNEVEN_16[1])}).rename(tmp_path / "mid")
    second = pruned(first, {1: LayerCut(keep=(0, 1, 2, 4, 6, 7, 8, 9))})
    left = tuple(UNEVEN_16[1][at] for at in (0, 1, 2, 4, 6, 7, 8, 9))
    entry = read_json(second / "expert_remap.json")["layers"][1]
    assert tuple(entry["kept"]) == left
    assert entry["groups"] == [expert // 4 for expert in left]
    expected = FamilyReference(folder, Removed(keep={1: left})).loss(ids_ST)
    assert streamed_loss(second, ids_ST).mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "fields", "dropped"),
    [
        ("arctic", {"moe_layer_frequency": 2}, (0,)),
        ("arctic", {"moe_layer_frequency": 2}, (0, 2)),
        ("deepseek", {"moe_layer_freq": 2}, (1,)),
        ("deepseek", {"first_k_dense_replace": 2}, (0,)),
        ("deepseek", {"moe_layer_freq": 2, "first_k_dense_replace": 3}, (3, 5)),
        ("glm4_moe_lite", {}, (0,)),
        ("glm4_moe_lite", {"first_k_dense_replace": 3}, (1, 5)),
    ],
)
def test_which_layers_are_dense_survives_dropped_blocks(
    family: str, fields: dict[str, int], dropped: tuple[int, ...], tmp_path: Path
) -> None:
    folder = tiny(tmp_path / "in", family, layers=6, **fields)
    before = [layer.has_moe for layer in open_checkpoint(folder).layers]
    out = pruned(folder, {index: LayerCut(action="drop-block") for index in dropped})
    after = [layer.has_moe for layer in open_checkpoint(out).layers]
    assert after == [moe for at, moe in enumerate(before) if at not in dropped]
    if family == "glm4_moe_lite":
        types = read_json(out / "config.json")["mlp_layer_types"]
        assert [one == "sparse" for one in types] == after
    overridden = read_json(out / "config.json").get("per_layer_config", {})
    allowed = {"moe_layer_frequency", "moe_layer_freq", "first_k_dense_replace"}
    assert all(set(values) <= allowed for values in overridden.values())


@pytest.mark.parametrize(
    ("family", "keep"), [("deepseek_v3", EQUAL_16[1]), ("qwen3_moe", UNEVEN_8[1])]
)
def test_fp8_experts_are_copied_with_their_scales(
    family: str, keep: tuple[int, ...], tmp_path: Path
) -> None:
    folder = tiny(tmp_path / "in", family, layers=2, fp8=(32, 32))
    experts = open_checkpoint(folder).layers[1].num_experts
    out = pruned(folder, {1: LayerCut(keep=keep)})
    before, after = read_tensors(folder), read_tensors(out)
    for new, old in enumerate(keep):
        for part in ("gate", "up", "down"):
            for suffix in ("weight", "weight_scale_inv"):
                at = "model.layers.1.mlp.experts.{}.{}_proj." + suffix
                source, copied = (
                    before[at.format(old, part)],
                    after[at.format(new, part)],
                )
                assert raw_bytes(source) == raw_bytes(copied)
    assert len(after) == len(before) - 6 * (experts - len(keep))
    config, source = (read_json(path / "config.json") for path in (out, folder))
    assert config["quantization_config"] == source["quantization_config"]


def test_fp8_zeros_change_one_byte_each_and_no_scale(
    tmp_path: Path, ids_ST: torch.Tensor
) -> None:
    folder = tiny(tmp_path / "in", "deepseek_v3", layers=2, fp8=(32, 32))
    cuts = {1: LayerCut(keep=EQUAL_16[1], sparsity=0.5)}
    out = pruned(folder, cuts, slim="magnitude")
    before, after = read_tensors(folder), read_tensors(out)
    dense = FamilyReference(folder)
    for new, old in enumerate(EQUAL_16[1]):
        for part in ("gate", "up", "down"):
            at = "model.layers.1.mlp.experts.{}.{}_proj.weight"
            source, slim = before[at.format(old, part)], after[at.format(new, part)]
            zero = slim.float() == 0
            assert zero.float().mean() >= 0.5
            kept, original = slim.view(torch.uint8)[~zero], source.view(torch.uint8)
            assert torch.equal(kept, original[~zero])
            # The smallest go, as the model sees them: scaled.
            size = dense.weight(at.format(old, part)).abs().float().bfloat16()
            assert size[zero].max() <= size[~zero].min()
            name = at.format(new, part) + "_scale_inv"
            assert torch.equal(after[name], before[at.format(old, part) + "_scale_inv"])
    assert streamed_loss(out, ids_ST).mean == pytest.approx(
        FamilyReference(out).loss(ids_ST), rel=0.01
    )


def test_fp8_blocks_may_be_larger_than_any_matrix() -> None:
    weight_RC = torch.randn(3, 5).to(torch.float8_e4m3fn)
    dense_RC = ScaleBlocks(1 << 60, 1 << 60).dequantize(
        weight_RC, torch.tensor([[0.5]]), torch.float32
    )
    assert torch.equal(dense_RC, weight_RC.float() / 2)


def test_fp8_means_are_refused(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "in", "deepseek_v3", layers=2, fp8=(32, 32))
    keep = tuple(range(0, 16, 2))
    clusters = tuple((expert, expert + 1) for expert in keep)
    means = LayerCut(keep=keep, clusters=clusters, reconstruct=True)
    with pytest.raises(PlanError, match="reconstruct: never"):
        pruned(folder, {1: means})


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("action", ["keep", "drop-block"])
def test_the_mtp_layer_is_pruned_or_dropped_and_said_so(
    action: str, family: str, tmp_path: Path
) -> None:
    sizes = {"layers": 2, "experts": 16, "num_nextn_predict_layers": 1}
    folder = tiny(tmp_path / "in", family, **sizes)
    cuts = {2: LayerCut(keep=EQUAL_16[1] if action == "keep" else None, action=action)}
    cuts |= {0: LayerCut(action="drop-block")}
    out = pruned(folder, cuts)
    config, remap = (
        read_json(out / name) for name in ("config.json", "expert_remap.json")
    )
    left = 1 if action == "keep" else 0
    said = json.loads((out / "provenance.json").read_text())["mtp_layers"]
    assert said == {"before": 1, "after": left}
    assert config["num_nextn_predict_layers"] == len(remap["mtp_layers"]) == left
    assert remap["original_mtp_layers"] == 1
    names = [name for name in read_tensors(out) if ".layers.1." in name]
    if not left:
        assert not names
        return
    assert remap["mtp_layers"][0]["layer"] == 1
    assert config["mtp_per_layer_config"] == {"0": {"n_routed_experts": 12}}
    assert "model.layers.1.eh_proj.weight" in names
    assert open_checkpoint(out).layers[1].num_experts == 12
