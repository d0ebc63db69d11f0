"""What a cut writes: the input's own bytes, of the promised size, always the same."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.reference import (
    DROP_BLOCK,
    DROP_MOE,
    Cuts,
    LayerCut,
    experts_of,
    folder_bytes,
    raw_bytes,
    read_json,
    read_tensors,
    router_of,
    write_plan,
)
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.data import Tokens
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.predict import with_prediction
from vllm_moe_prune.decide.cut_plan import CutPlan, load_plan

LAYERS, EXPERTS = 4, 5
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
LAYOUTS = [
    f"{moe}.{spelling}"
    for moe in ("block_sparse_moe", "mlp")
    for spelling in ("w1w2w3", "gate_up_down", "packed")
]
STOCK_IN_VLLM = {"block_sparse_moe.w1w2w3", "block_sparse_moe.gate_up_down"}
SHARD_SIZES = st.sampled_from([2_000, 5_000, 20_000, 10**9])


def make_model(folder: Path, layout: str = LAYOUTS[0], **config: Any) -> Path:
    return tiny_checkpoint(
        folder,
        layout=layout,
        **{
            "layers": LAYERS,
            "experts": EXPERTS,
            "hidden": 16,
            "width": 12,
            "vocab": 40,
            "tokenizer": False,
        }
        | config,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("files") / "model")


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("files") / "model", "mlp.packed")


def hand_plan(checkpoint: Checkpoint, cuts: Cuts, **options: str) -> CutPlan:
    with scratch() as folder:
        return load_plan(write_plan(folder / "plan.json", checkpoint, cuts, **options))


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def pruned(source: Path, out: Path, cuts: Cuts, **options: str) -> Path:
    checkpoint = open_checkpoint(source)
    execute_plan(checkpoint, hand_plan(checkpoint, cuts, **options), out)
    return out


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = read_tensors(found), read_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert raw_bytes(ours[name]) == raw_bytes(tensor), name


@st.composite
def keeps(draw: st.DrawFn, experts: int = EXPERTS) -> LayerCut:
    order = draw(st.permutations(range(experts)))
    return LayerCut(keep=tuple(order[: draw(st.integers(1, experts))]))


@st.composite
def plans(draw: st.DrawFn, experts: tuple[int, ...] = (EXPERTS,) * LAYERS) -> Cuts:
    """Cuts of a model that has so many experts in its layers (0: MoE dropped)."""
    spared = draw(st.sampled_from([i for i, count in enumerate(experts) if count]))
    cuts: dict[int, LayerCut] = {}
    for index, count in enumerate(experts):
        fates = [keeps(count)] * 3 if count else [st.just(LayerCut())]
        if index != spared:
            fates += [st.just(DROP_BLOCK), st.just(DROP_MOE)]
        cuts[index] = draw(st.one_of(fates))
    return cuts


@st.composite
def slimmed(draw: st.DrawFn) -> Cuts:
    sparsities = st.sampled_from([0.0, 0.01, 0.3, 0.5, 0.95])
    return {
        index: cut
        if cut.action != "keep"
        else LayerCut(keep=cut.keep, sparsity=draw(sparsities))
        for index, cut in draw(plans()).items()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plan_that_changes_nothing_copies_every_byte(
    tmp_path: Path, layout: str, dtype: str
) -> None:
    model = make_model(tmp_path / "model", layout, dtype=dtype, tokenizer=True)
    checkpoint = open_checkpoint(model)
    out = tmp_path / "out"
    execute_plan(checkpoint, hand_plan(checkpoint, {}), out, max_shard_bytes=9_000)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert_same_tensors(out, model)
    assert {tensor.dtype for tensor in read_tensors(out).values()} == {DTYPES[dtype]}
    config = read_json(out / "config.json")
    assert set(config.pop("moe_prune")) == {
        "format_version",
        "tool_version",
        "remap",
        "remap_sha256",
    }
    expected = read_json(model / "config.json")
    if layout not in STOCK_IN_VLLM:
        expected["architectures"] = ["MoePruneMixtralForCausalLM"]
    assert config == expected
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()


@settings(max_examples=8)
@given(cuts=plans())
def test_survivors_and_their_router_rows_keep_their_bytes(
    model: Path, packed_model: Path, cuts: Cuts
) -> None:
    for source in (model, packed_model):
        before = read_tensors(source)
        with scratch() as folder:
            after = read_tensors(pruned(source, folder / "out", cuts))
        new = 0
        for index, layer in cuts.items():
            if layer.action == "drop-block":
                continue
            kept = layer.kept(EXPERTS)
            if kept:
                rows = router_of(before, index)[list(kept)]
                assert raw_bytes(router_of(after, new)) == raw_bytes(rows)
            sources = experts_of(before, index)
            found = experts_of(after, new)
            assert len(found) == len(kept)
            for expert, old in zip(found, kept, strict=True):
                assert [raw_bytes(m) for m in expert] == [
                    raw_bytes(m) for m in sources[old]
                ]
            new += 1
        assert f"model.layers.{new}.input_layernorm.weight" not in after


@pytest.mark.slow
@settings(max_examples=12)
@given(data=st.data())
def test_cutting_twice_equals_cutting_once(model: Path, data: st.DataObject) -> None:
    first = data.draw(plans())
    survivors = [index for index in first if first[index].action != "drop-block"]
    counts = tuple(len(first[index].kept(EXPERTS)) for index in survivors)
    second = data.draw(plans(counts))
    composed = dict(first)
    for new, old in enumerate(survivors):
        composed[old] = composition(first[old], second[new])
    with scratch() as folder:
        once = pruned(model, folder / "once", composed)
        between = pruned(model, folder / "model", first)
        twice = pruned(between, folder / "twice", second)
        assert_same_tensors(twice, once)
        for name in ("config.json", "expert_remap.json"):
            assert read_json(twice / name) == read_json(once / name)


def composition(first: LayerCut, second: LayerCut) -> LayerCut:
    """The one cut that does what two in a row do."""
    if first.action != "keep" or second.action != "keep":
        return DROP_BLOCK if second.action == "drop-block" else DROP_MOE
    kept = first.kept(EXPERTS)
    return LayerCut(keep=tuple(kept[expert] for expert in second.kept(len(kept))))


def test_clusters_of_two_cuts_are_told_in_original_ids(
    model: Path, tmp_path: Path
) -> None:
    first = {1: LayerCut(keep=(3, 0, 1), clusters=((3, 4), (0, 2), (1,)))}
    second = {1: LayerCut(keep=(2, 0), clusters=((1, 2), (0,)))}
    between = pruned(model, tmp_path / "model", first)
    out = pruned(between, tmp_path / "out", second)
    layer = read_json(out / "expert_remap.json")["layers"][1]
    assert layer["kept"] == [1, 3]
    assert layer["clusters"] == [[0, 1, 2], [3, 4]]
    assert layer["experts_before"] == EXPERTS


@settings(max_examples=12)
@example(cuts={0: LayerCut(keep=(2,))}, size=1, slim="none", packed=True)
@given(
    cuts=slimmed(),
    size=SHARD_SIZES,
    slim=st.sampled_from(["none", "magnitude"]),
    packed=st.booleans(),
)
def test_the_size_on_disk_is_what_the_plan_promised(
    model: Path, packed_model: Path, cuts: Cuts, size: int, slim: str, packed: bool
) -> None:
    checkpoint = open_checkpoint(packed_model if packed else model)
    plan = with_prediction(checkpoint, hand_plan(checkpoint, cuts, slim=slim), size)
    predicted = plan.predicted
    assert predicted is not None
    with scratch() as folder:
        out = folder / "out"
        result = execute_plan(checkpoint, plan, out, max_shard_bytes=size)
        files = sorted(out.glob("*.safetensors"))
        assert len(files) == predicted.shards
        on_disk = sum(path.stat().st_size for path in files)
        assert on_disk == predicted.file_bytes == result.file_bytes
        tensors = read_tensors(out)
        check_index(out, files, predicted.tensor_bytes, predicted.parameters)
    tensor_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert tensor_bytes == predicted.tensor_bytes
    parameters = sum(tensor.numel() for tensor in tensors.values())
    assert parameters == predicted.parameters
    assert result.achieved.parameters_after == parameters
    zeros = sum(int((tensor == 0).sum()) for tensor in tensors.values())
    assert zeros == predicted.zeros == result.achieved.zeros


def check_index(out: Path, files: list[Path], size: int, parameters: int) -> None:
    """With several files there is an index, and it is right; else there is none."""
    path = out / "model.safetensors.index.json"
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        assert not path.exists()
        return
    index = read_json(path)
    assert index["metadata"] == {"total_size": size, "total_parameters": parameters}
    assert set(index["weight_map"].values()) == {file.name for file in files}
    opened = open_checkpoint(out)
    assert {name: info.file.name for name, info in opened.tensors.items()} == index[
        "weight_map"
    ]


@pytest.mark.parametrize("slim", ["magnitude", "wanda"])
def test_the_same_cut_gives_the_same_bytes_and_leaves_its_input_alone(
    packed_model: Path, tmp_path: Path, slim: str
) -> None:
    before = folder_bytes(packed_model)
    cuts = {
        0: LayerCut(keep=(4, 0, 2), sparsity=0.5),
        1: DROP_MOE,
        3: LayerCut(
            keep=(1, 3), clusters=((0, 1, 2), (3, 4)), reconstruct=True, sparsity=0.3
        ),
    }
    outs = []
    ids_ST = torch.arange(48).remainder(40).reshape(3, 16)
    for name in ("first", "second"):
        checkpoint = open_checkpoint(packed_model)
        plan = hand_plan(checkpoint, cuts, slim=slim)
        execute_plan(
            checkpoint,
            with_prediction(checkpoint, plan, 4_000),
            tmp_path / name,
            tokens=Tokens(ids_ST=ids_ST, source="counting", sha256="0" * 64)
            if slim == "wanda"
            else None,
            max_shard_bytes=4_000,
        )
        outs.append(folder_bytes(tmp_path / name))
    assert outs[0] == outs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    assert folder_bytes(packed_model) == before


def test_files_of_the_output_do_not_depend_on_where_it_is(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    here = pruned(model, tmp_path / "out", {0: DROP_MOE})
    there = pruned(model, tmp_path / "deep" / "er" / "other-name", {0: DROP_MOE})
    assert folder_bytes(here) == folder_bytes(there)
    texts = b"".join(
        data for name, data in folder_bytes(here).items() if "safetensors" not in name
    )
    assert str(tmp_path).encode() not in texts
    json.loads((here / "provenance.json").read_text("utf-8"))
