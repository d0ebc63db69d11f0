"""A pruned model computes what the original does with the removed experts barred.

The reference is plain torch in float64 and never removes anything; the models are in
float32, so that what is left between the two is rounding.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.reference import DROP_BLOCK, DROP_MOE, Cuts, LayerCut, Reference, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import run_layer
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan

LAYERS, EXPERTS = 3, 5
LAYOUTS = [
    f"{moe}.{spelling}"
    for moe in ("block_sparse_moe", "mlp")
    for spelling in ("w1w2w3", "gate_up_down", "packed")
]
# transformers has never read gate_proj, up_proj and down_proj in a Mixtral.
READ_BY_TRANSFORMERS = [name for name in LAYOUTS if "gate_up_down" not in name]
IDS_ST = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(7))


def make_model(folder: Path, layout: str = LAYOUTS[0], **config: int) -> Path:
    return tiny_checkpoint(
        folder,
        layout=layout,
        layers=LAYERS,
        experts=EXPERTS,
        hidden=16,
        width=12,
        heads=4,
        kv_heads=2,
        vocab=64,
        dtype="float32",
        shards=2,
        tokenizer=False,
        **config,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("forward") / "model")


def pruned(source: Path, out: Path, cuts: Cuts, routing: str = "drop") -> Path:
    checkpoint = open_checkpoint(source)
    plan_file = out.with_name(out.name + "-plan.json")
    plan = load_plan(write_plan(plan_file, checkpoint, cuts, routing=routing))
    execute_plan(checkpoint, plan, out)
    return out


def streamed(folder: Path) -> Tensor:
    """Our forward's hidden states behind the last layer."""
    model = StreamingModel(open_checkpoint(folder))
    hidden_STD = model.embed(IDS_ST)
    for index in range(model.num_layers):
        run_layer(model, index, hidden_STD)
    return hidden_STD.double()


@torch.no_grad()
def logits_of_transformers(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: Tensor = model(IDS_ST).logits
    return logits.double()


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal but for float32 rounding; the values are of the order of 1 to 10."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@st.composite
def keeps(draw: st.DrawFn) -> LayerCut:
    order = draw(st.permutations(range(EXPERTS)))
    return LayerCut(keep=tuple(order[: draw(st.integers(1, EXPERTS))]))


@st.composite
def clusterings(draw: st.DrawFn, reconstruct: bool = False) -> LayerCut:
    """Every expert in one of up to three groups, groups and members in any order."""
    labels = draw(st.lists(st.integers(0, 2), min_size=EXPERTS, max_size=EXPERTS))
    clusters = tuple(
        tuple(expert for expert in range(EXPERTS) if labels[expert] == label)
        for label in draw(st.permutations(sorted(set(labels))))
    )
    keep = tuple(draw(st.sampled_from(cluster)) for cluster in clusters)
    return LayerCut(keep=keep, clusters=clusters, reconstruct=reconstruct)


@st.composite
def weighted(draw: st.DrawFn) -> LayerCut:
    """Clusters whose mean counts some members more."""
    cut = draw(clusterings(reconstruct=True))
    shares = [
        draw(st.lists(st.integers(1, 9), min_size=len(ids), max_size=len(ids)))
        for ids in cut.clusters or ()
    ]
    weights = tuple(tuple(one / sum(each) for one in each) for each in shares)
    return replace(cut, weights=weights)


@st.composite
def unserved(draw: st.DrawFn) -> LayerCut:
    """Survivors that serve their own rows only; all other rows lead nowhere."""
    kept = draw(keeps()).keep or ()
    gone = tuple(expert for expert in range(EXPERTS) if expert not in kept)
    clusters = tuple((expert,) for expert in kept)
    return LayerCut(keep=kept, clusters=clusters, unserved=gone)


@st.composite
def plans(draw: st.DrawFn, trimmed: st.SearchStrategy[LayerCut]) -> Cuts:
    """One layer keeps experts; any other may do so or lose its MoE or its block."""
    spared = draw(st.integers(0, LAYERS - 1))
    anything = st.one_of(trimmed, trimmed, st.sampled_from([DROP_MOE, DROP_BLOCK]))
    return {
        index: draw(trimmed if index == spared else anything) for index in range(LAYERS)
    }


def check_forward(model: Path, cuts: Cuts, routing: str = "drop") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        out = pruned(model, Path(scratch) / "out", cuts, routing)
        expected = Reference(model, cuts, routing=routing).hidden(IDS_ST)
        assert_same(streamed(out), expected)


@pytest.mark.parametrize("config", [{}, {"sliding_window": 5, "tied": True}])
def test_the_reference_agrees_with_transformers(
    tmp_path: Path, config: dict[str, int]
) -> None:
    folder = make_model(tmp_path / "model", **config)
    assert_same(Reference(folder).logits(IDS_ST), logits_of_transformers(folder))


@settings(max_examples=6)
@given(cuts=plans(keeps()))
def test_dropping_experts_equals_barring_them(model: Path, cuts: Cuts) -> None:
    check_forward(model, cuts)


@settings(max_examples=6)
@given(cuts=plans(clusterings(reconstruct=True)))
def test_reconstructing_equals_averaging_clusters(model: Path, cuts: Cuts) -> None:
    check_forward(model, cuts)


@settings(max_examples=6)
@given(cuts=plans(clusterings()))
def test_redirecting_equals_running_the_representative_instead(
    model: Path, cuts: Cuts
) -> None:
    check_forward(model, cuts, routing="redirect")


@settings(max_examples=4)
@given(cuts=plans(weighted()))
def test_means_may_be_weighted(model: Path, cuts: Cuts) -> None:
    check_forward(model, cuts)


@settings(max_examples=4)
@given(cuts=plans(unserved()))
def test_what_an_unserved_row_is_chosen_for_is_lost(model: Path, cuts: Cuts) -> None:
    check_forward(model, cuts, routing="redirect")


@settings(max_examples=4)
@given(cuts=plans(clusterings(reconstruct=True)))
def test_redirecting_to_averaged_experts(model: Path, cuts: Cuts) -> None:
    check_forward(model, cuts, routing="redirect")


@settings(max_examples=6)
@given(cuts=plans(keeps()), data=st.data())
def test_the_order_of_keep_does_not_matter(
    model: Path, cuts: Cuts, data: st.DataObject
) -> None:
    shuffled = {
        index: LayerCut(keep=tuple(data.draw(st.permutations(cut.keep))))
        if cut.keep
        else cut
        for index, cut in cuts.items()
    }
    with tempfile.TemporaryDirectory() as scratch:
        first = pruned(model, Path(scratch) / "first", cuts)
        second = pruned(model, Path(scratch) / "second", shuffled)
        assert_same(streamed(second), streamed(first))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_computes_the_same(tmp_path: Path, layout: str) -> None:
    cuts = {
        0: LayerCut(keep=(3, 0, 4)),
        1: LayerCut(keep=(1, 4), clusters=((0, 1, 2), (3, 4)), reconstruct=True),
    }
    check_forward(make_model(tmp_path / "model", layout), cuts)


@pytest.mark.parametrize("layout", READ_BY_TRANSFORMERS)
def test_transformers_loads_a_uniform_output(tmp_path: Path, layout: str) -> None:
    model = make_model(tmp_path / "model", layout)
    cuts = {
        0: LayerCut(keep=(4, 1, 2)),
        1: DROP_BLOCK,
        2: LayerCut(keep=(1, 3, 4), clusters=((0, 1), (2, 3), (4,)), reconstruct=True),
    }
    out = pruned(model, tmp_path / "out", cuts)
    assert_same(logits_of_transformers(out), Reference(model, cuts).logits(IDS_ST))


def test_fewer_experts_than_top_k_lowers_top_k(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", top_k=3)
    cuts = {index: LayerCut(keep=(index, 4)) for index in range(LAYERS)}
    out = pruned(model, tmp_path / "out", cuts)
    assert_same(logits_of_transformers(out), Reference(model, cuts).logits(IDS_ST))


@pytest.mark.parametrize(
    ("cuts", "routing"),
    [
        ({0: LayerCut(keep=(0, 1, 2))}, "drop"),
        ({1: LayerCut(keep=(4,))}, "drop"),
        ({2: DROP_MOE}, "drop"),
        (
            dict.fromkeys(
                range(LAYERS), LayerCut(keep=(0, 2), clusters=((0, 1, 4), (2, 3)))
            ),
            "redirect",
        ),
    ],
    ids=["uneven", "below-top-k", "drop-moe", "redirect"],
)
def test_transformers_refuses_what_it_would_misread(
    model: Path, tmp_path: Path, cuts: Cuts, routing: str
) -> None:
    out = pruned(model, tmp_path / "out", cuts, routing)
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(out)


def test_redirecting_without_removing_is_not_misread(
    model: Path, tmp_path: Path
) -> None:
    """All shapes are stock then, so transformers loads it: it has to be right."""
    singles = ((3,), (0,), (4,), (1,), (2,))
    cuts = {1: LayerCut(keep=(3, 0, 4, 1, 2), clusters=singles)}
    out = pruned(model, tmp_path / "out", cuts, "redirect")
    assert_same(logits_of_transformers(out), Reference(model).logits(IDS_ST))
