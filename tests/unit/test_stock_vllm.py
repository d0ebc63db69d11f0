"""Uneven layers spelled as expert substitution, for vLLM from 0.33 on."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.reference import read_tensors
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.expert_forward import Routing
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import routed, summed_loss
from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.calibrate.stats_file import load_stats
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_expert
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.predict import model_facts, with_prediction
from vllm_moe_prune.decide.cut_plan import CutPlan, LayerPlan
from vllm_moe_prune.errors import (
    CheckpointError,
    MoePruneError,
    PlanError,
    RecipeError,
    RemapError,
    ServeError,
)
from vllm_moe_prune.pipeline import (
    RunOptions,
    convert,
    cut,
    first_that_fits,
    run,
    verify,
)
from vllm_moe_prune.plugin import compat, launch
from vllm_moe_prune.recipes.loading import wished
from vllm_moe_prune.recipes.schema import Recipe, parse_recipe

HOW = RunOptions()
IDS_ST = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))
GONE: dict[int, tuple[set[int], ...]] = {
    8: ({1, 4, 6, 7}, {0, 3}),
    16: ({0, 3, 11, 13}, {0, 6, 11, 12}),
}
"""By the number of experts: removed from the first two MoE layers."""
SAME_FILES = ("model.safetensors", "expert_remap.json", "tensor_hashes.json")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Softmax routers without a bias, and grouped sigmoid routers with one."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        family: open_checkpoint(
            tiny_checkpoint(
                folder / family, model_type=family, layers=3, hidden=64, shards=1
            )
        )
        for family in ("mixtral", "deepseek_v3")
    }


def loss(folder: Path) -> float:
    return summed_loss(StreamingModel(open_checkpoint(folder)), IDS_ST, "ids")[0]


def planned(source: Checkpoint, routing: str, **values: Any) -> CutPlan:
    """The experts in GONE leave."""
    at = [layer.index for layer in source.moe_layers[:2]]
    layers = []
    for layer in source.layers:
        count = layer.num_experts
        kept = tuple(range(count))
        if layer.index in at:
            gone = GONE.get(count, ({1}, {0}))[at.index(layer.index)]
            kept = tuple(one for one in kept if one not in gone)
        alone = tuple((one,) for one in kept)
        unserved = tuple(sorted(set(range(count)) - set(kept)))
        layers.append(
            LayerPlan(
                layer=layer.index,
                experts=count,
                keep=kept,
                clusters=None if routing == "drop" else alone,
                unserved=() if routing == "drop" else unserved,
            )
        )
    facts = model_facts(source)
    given: dict[str, Any] = {
        "tool_version": "test",
        "model": facts.model,
        "recipe": Recipe(),
        "routing": "drop" if routing == "drop" else "redirect",
        "spelling": "stock-vllm",
        "layers": layers,
    }
    return CutPlan.model_validate(given | values)


def as_foreign(folder: Path, to: Path) -> Path:
    """The same without our block: what another tool would have written."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text("utf-8"))
    del config["moe_prune"]
    (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (to / "expert_remap.json").unlink()
    return to


@pytest.mark.parametrize(
    ("family", "routing"), [("deepseek_v3", "drop"), ("mixtral", "preserve")]
)
def test_spelled_and_compact_are_the_same_model(
    family: str, routing: str, sources: dict[str, Checkpoint], tmp_path: Path
) -> None:
    source = sources[family]
    plan = planned(source, routing)
    out, compact, back, again = (tmp_path / name for name in "abcd")
    cut(source, plan, out, HOW)
    cut(source, plan.model_copy(update={"spelling": "moe-prune"}), compact, HOW)
    found = verify(out, source)
    assert found.tensors_hashed == len(read_tensors(out))
    predicted = with_prediction(source, plan).predicted
    assert predicted is not None
    assert predicted.file_bytes == (out / "model.safetensors").stat().st_size
    # Read by anybody: all router rows, original ids, a vector for each removed expert.
    config = json.loads((out / "config.json").read_text("utf-8"))
    stored, original = read_tensors(out), read_tensors(source.folder)
    gone = {int(layer): ids for layer, ids in config["approximate_experts"].items()}
    assert config["architectures"] == [source.arch.stock_architecture]
    assert "per_layer_config" not in config
    for layer, ids in gone.items():
        router = source.layout.router.name(layer)
        assert stored[router].shape == original[router].shape
        experts = source.layout.experts[0].name(layer, 0).split("experts.0")[0]
        for one in range(source.layers[layer].num_experts):
            constant = stored.get(f"{experts}experts.{one}.approx_value")
            assert (constant is not None) == (one in ids)
            assert constant is None or not constant.any()
            for rule in source.layout.experts:
                name = rule.name(layer, one)
                same = name in stored and torch.equal(stored[name], original[name])
                assert same == (one not in ids)
        if routing == "drop":
            bias = source.layout.rule("router_bias")
            assert bias is not None
            assert (stored[bias.name(layer)][ids] == -1e4).all()
    # Our own forward: of the table's form, and of all the rows that vLLM sees.
    expected = loss(compact)
    assert loss(out) == expected != loss(source.folder)
    foreign = as_foreign(out, tmp_path / "foreign")
    assert open_checkpoint(foreign).layers[max(gone)].redirect is not None
    assert loss(foreign) == expected
    convert(open_checkpoint(foreign), back, HOW)
    assert loss(back) == expected
    verify(back)
    convert(open_checkpoint(out), again, HOW)
    for name in SAME_FILES:
        assert (again / name).read_bytes() == (compact / name).read_bytes()


def test_means_are_of_the_experts_own_tokens(
    sources: dict[str, Checkpoint], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{at % 97} goes {at}" for at in range(900)))
    recipe = parse_recipe(
        {
            "routing": "mean",
            "spelling": "stock-vllm",
            "experts": {"method": "score", "criterion": "reap", "drop": 0.25},
            "slim": {"method": "none"},
            "calibration": {
                "source": str(text),
                "samples": 4,
                "sequence_length": 32,
            },
        },
        "test",
    )
    source, out = sources["mixtral"], tmp_path / "out"
    plan, _, _ = run(source, recipe, out, HOW)
    assert (plan.routing, plan.constants) == ("redirect", "means")
    opened = open_checkpoint(out)
    assert opened.substitution is not None
    stats = load_stats(out / "moe_prune" / "stats.safetensors")
    layer = min(opened.substitution.layers)
    gone = opened.substitution.layers[layer].removed
    # What the sums should be, from all outputs of one expert at once.
    model = StreamingModel(source)
    x_ND = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    x_ND = x_ND.bfloat16()
    routing: Routing = model.route(source.layers[layer], x_ND)
    expected_ND = torch.zeros(40, 64)
    for one in range(source.layers[layer].num_experts):
        weight_N = (routing.weights_NK * (routing.ids_NK == one)).sum(1, keepdim=True)
        if one in gone:
            found = stats.layers[layer]
            assert found.output_sum_ED is not None
            assert found.routed_E is not None
            mean_D = found.output_sum_ED[one] / max(found.routed_E[one], 1)
            given_ND = torch.from_numpy(mean_D).to(torch.bfloat16).float()
        else:
            gate, up, down = (
                m.float() for m in read_expert(source, source.layers[layer], one)
            )
            x = x_ND.float()
            given_ND = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
        expected_ND += weight_N * given_ND
    found_ND = routed(StreamingModel(opened), layer, x_ND).float()
    torch.testing.assert_close(found_ND, expected_ND, rtol=0.03, atol=0.03)
    with pytest.raises(CheckpointError, match=r"is not zero.*as it is"):
        convert(opened, tmp_path / "back", HOW)
    with pytest.raises(PlanError, match="were not measured"):
        cut(source, plan, tmp_path / "without", HOW)
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".approx_value"))
    tensors[name] += 1
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="is not what plan"):
        verify(out, source)


def test_output_sums_add_up_and_are_checked() -> None:
    one = LayerStats(output_sum_ED=torch.ones(3, 70).double().numpy())
    parts = Stats(fingerprint="x", layers={0: one})
    total = (parts + parts).layers[0].output_sum_ED
    assert total is not None
    assert (total == 2).all()


@pytest.mark.parametrize(
    ("family", "routing", "values", "says"),
    [
        ("mixtral", "drop", {}, "a bias that only chooses"),
        ("deepseek_v3", "drop", {"quantize": {"method": "rtn"}}, "plain weights only"),
        ("mixtral", "preserve", {"recipe": {"storage": "bitmask"}}, "plain weights"),
    ],
)
def test_what_vllm_refuses_is_refused_with_the_reason(
    family: str,
    routing: str,
    values: dict[str, Any],
    says: str,
    sources: dict[str, Checkpoint],
    tmp_path: Path,
) -> None:
    source = sources[family]
    with pytest.raises(PlanError, match=says):
        cut(source, planned(source, routing, **values), tmp_path / "out", HOW)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"action": "drop-moe", "keep": ()}, "at least one expert in each"),
        ({"width": 32}, "one width for all"),
        ({"keep": (2, 0, 3, 5)}, "in their order"),
        ({"keep": (0,)}, "fewer than the 2"),
    ],
)
def test_layers_that_substitution_cannot_say(
    change: dict[str, Any],
    says: str,
    sources: dict[str, Checkpoint],
    tmp_path: Path,
) -> None:
    source = sources["mixtral"]
    routing = "drop" if "fewer" in says else "preserve"
    plan = planned(source, routing)
    data = plan.model_dump()
    one: dict[str, Any] = data["layers"][0] | change
    if routing == "preserve":
        one["clusters"] = [(kept,) for kept in one["keep"]]
        one["unserved"] = sorted(set(range(8)) - set(one["keep"]))
    if not one["keep"]:
        one |= {"clusters": None, "unserved": ()}
    data["layers"] = [one, *data["layers"][1:]]
    with pytest.raises(PlanError, match=says):
        cut(source, CutPlan.model_validate(data), tmp_path / "out", HOW)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layout": "block_sparse_moe.packed"}, "tensors of their own"),
        ({"model_type": "deepseek_v3", "fp8": (32, 32)}, "are quantized"),
        ({"model_type": "arctic"}, "has no arctic"),
    ],
)
def test_weights_that_vllm_does_not_substitute(
    options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    tiny_checkpoint(tmp_path / "ckpt", layers=2, tokenizer=False, **options)
    source = open_checkpoint(tmp_path / "ckpt")
    kind = "drop" if source.layout.rule("router_bias") else "preserve"
    plan = planned(source, kind)
    with pytest.raises(PlanError, match=says):
        cut(source, plan, tmp_path / "out", HOW)


def test_a_uniform_plan_is_stock_already(
    sources: dict[str, Checkpoint], tmp_path: Path
) -> None:
    source = sources["mixtral"]
    layers = [
        LayerPlan(layer=at, experts=8, keep=(0, 2, 3, 5, 6, 7)) for at in range(3)
    ]
    plan = planned(source, "drop", layers=layers)
    cut(source, plan, tmp_path / "out", HOW)
    verify(tmp_path / "out", source)
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert "approximate_experts" not in config
    assert config["num_local_experts"] == 6


def test_the_wish_goes_by_the_router(sources: dict[str, Checkpoint]) -> None:
    recipes = wished(None, "stock-vllm")
    names = {
        family: first_that_fits(source, recipes).name
        for family, source in sources.items()
    }
    assert names == {"mixtral": "stock-vllm-mean", "deepseek_v3": "stock-vllm"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"routing": "redirect", "experts": {"method": "stun", "drop": 0.25}},
            "no redirects",
        ),
        ({"experts": {"method": "score", "min_experts": 0}}, "an expert in each layer"),
        ({"layers": {"moe_count": 1}}, "cannot drop MoE sublayers"),
        ({"quantize": {"method": "rtn"}}, "cannot quantize"),
        ({"storage": "bitmask"}, "storage: dense"),
        ({"narrow": {"share": 0.5}}, "cannot narrow"),
        ({"tune": {}, "total_sparsity": 0.5}, "searches plans for the plugin"),
        (
            {"routing": "mean", "experts": {"method": "score", "refit": "ridge"}},
            "leave one out",
        ),
        ({"routing": "mean", "spelling": "moe-prune"}, "mean needs spelling"),
    ],
)
def test_recipes_that_contradict_themselves(values: dict[str, Any], says: str) -> None:
    data = {"spelling": "stock-vllm", "experts": {"method": "score", "drop": 0.25}}
    with pytest.raises(RecipeError, match=says):
        parse_recipe(data | {"slim": {"method": "none"}} | values, "test")


SEMANTICS = {
    "preserve_logical_expert_ids": True,
    "preserve_router_weights": True,
    "renormalize_after_substitution": False,
}


def declared(**values: Any) -> dict[str, Any]:
    """The other spelling, of expert 1 of layer 0, with its parts changed."""
    one = {"format": "constant-v1", "tensors": {"value": "novice"}}
    target = {
        "weight_layout": "compact_retained_experts",
        "replacements": {"1": one},
    }
    path = "model.layers.0.block_sparse_moe.experts"
    found = {"version": 1, "router_semantics": SEMANTICS, "targets": {path: target}}
    return {"transform_config": {"expert_substitution": found | values}}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """One layer whose expert 1 has a vector, as others write it."""
    folder = tiny_checkpoint(
        tmp_path / "foreign", layers=1, experts=4, hidden=64, shards=1, tokenizer=False
    )
    tensors = load_file(folder / "model.safetensors")
    at = "model.layers.0.block_sparse_moe.experts.1."
    tensors = {name: one for name, one in tensors.items() if not name.startswith(at)}
    tensors[f"{at}approx_value"] = torch.zeros(64, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def change(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_both_spellings_of_substitution_are_read(foreign: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(change(foreign, approximate_experts={"0": [1]}))
    assert opened.layers[0].redirect == (0, None, 1, 2)
    assert opened.remap is not None
    assert opened.remap.layers[0].kept == (0, 2, 3)
    expected = loss(foreign)
    tensors = load_file(foreign / "model.safetensors")
    name = next(name for name in tensors if name.endswith("approx_value"))
    tensors["novice"] = tensors.pop(name)
    save_file(tensors, foreign / "model.safetensors", {"format": "pt"})
    change(foreign, approximate_experts=None, compression_config=declared())
    assert loss(foreign) == expected
    # A vector that is not zero counts.
    tensors["novice"] = torch.ones(64, dtype=torch.bfloat16)
    save_file(tensors, foreign / "model.safetensors", {"format": "pt"})
    assert loss(foreign) != expected


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"approximate_experts": [1]}, "is no object"),
        ({"approximate_experts": {"x": [1]}}, "is no number"),
        ({"approximate_experts": {"9" * 5000: [1]}}, "is no number"),
        ({"approximate_experts": {"5": [1]}}, "names layer 5 of 1"),
        ({"approximate_experts": {"0": [1, 1]}}, "each once"),
        ({"approximate_experts": {"0": [True]}}, "each once"),
        ({"approximate_experts": {"0": [0, 1, 2, 3]}}, "not all"),
        ({"approximate_experts": {"0": [10**12]}}, "not all"),
        ({"approximate_experts": {"0": [2]}}, "does not name"),
        ({"approximate_experts": {"0": [1, 2]}}, "says is removed"),
        (
            {"approximate_experts": {"0": [1]}, "num_local_experts": 10**9},
            "are more than",
        ),
        (
            {"approximate_experts": {"0": [1]}, "compression_config": declared()},
            "has both",
        ),
        ({"compression_config": declared(version=2)}, "only version 1"),
        ({"compression_config": declared(router_semantics={})}, "router_semantics"),
        ({"compression_config": declared(targets={"layers.0.1": {}})}, "no single"),
        ({"compression_config": declared(targets={"layers.0": {}})}, "another layout"),
    ],
)
def test_hostile_substitution_is_refused(
    values: dict[str, Any], says: str, foreign: Path
) -> None:
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(change(foreign, **values))


def test_our_block_and_table_must_agree(
    sources: dict[str, Checkpoint], tmp_path: Path
) -> None:
    source, out = sources["mixtral"], tmp_path / "out"
    cut(source, planned(source, "preserve"), out, HOW)
    config = json.loads((out / "config.json").read_text("utf-8"))
    tensors = load_file(out / "model.safetensors")
    # Expert 0 takes the name of the removed 1: another model, with the same counts.
    renamed = {
        name.replace(
            "layers.0.block_sparse_moe.experts.0.",
            "layers.0.block_sparse_moe.experts.X.",
        )
        .replace(
            "layers.0.block_sparse_moe.experts.1.",
            "layers.0.block_sparse_moe.experts.0.",
        )
        .replace(
            "layers.0.block_sparse_moe.experts.X.",
            "layers.0.block_sparse_moe.experts.1.",
        ): one
        for name, one in tensors.items()
    }
    save_file(renamed, out / "model.safetensors", {"format": "pt"})
    change(out, approximate_experts=config["approximate_experts"] | {"0": [0, 4, 6, 7]})
    with pytest.raises(RemapError, match=r"layer 0: config.json keeps experts \[1, 2"):
        open_checkpoint(out)
    change(out, moe_prune=config["moe_prune"] | {"substitution": {"version": 9}})
    with pytest.raises(MoePruneError, match="substitution"):
        open_checkpoint(out)


def test_a_vllm_that_would_ignore_the_vectors_is_refused(
    sources: dict[str, Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, out = sources["mixtral"], tmp_path / "out"
    cut(source, planned(source, "preserve"), out, HOW)
    assert not launch.needs_plugin(open_checkpoint(out))
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("vllm", package / "__init__.py")
    monkeypatch.setattr(compat, "find_spec", lambda name: spec)
    with pytest.raises(ServeError, match=r"only vLLM from 0\.33 on reads.*convert"):
        launch.serve_command(str(out))
    module = package / compat.SUBSTITUTION
    module.parent.mkdir(parents=True)
    module.touch()
    with pytest.raises(ServeError, match="without --enable-expert-parallel only"):
        launch.serve_command(str(out), extra=["--enable-expert-parallel"])
