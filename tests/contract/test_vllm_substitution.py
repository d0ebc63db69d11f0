"""What we spell for stock vLLM is read as meant by vLLM's own module.

The module is pure Python on top of torch. It is read from sources unpacked at the paths
in ``VLLM_SOURCES`` (`make substitution` unpacks those of a release): no CPU build of a
vLLM that has it exists, so nothing of vLLM is installed for this.
"""

import ast
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.constants import add_constants
from vllm_moe_prune.calibrate.expert_forward import Routing
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.checkpoint.substitution import DECLARED, KEY, SEMANTICS, SUFFIX
from vllm_moe_prune.cut.convert import convert
from vllm_moe_prune.cut.predict import model_facts
from vllm_moe_prune.decide.cut_plan import CutPlan, LayerPlan
from vllm_moe_prune.pipeline import RunOptions, cut
from vllm_moe_prune.recipes.schema import Recipe

LAYERS = "vllm.model_executor.layers.fused_moe"
PLACE = Path(*LAYERS.split("."), "expert_substitution.py")
LOADING = Path("vllm", "model_executor", "models", "expert_substitution.py")
SOURCES = [
    Path(path)
    for path in os.environ.get("VLLM_SOURCES", "").split(os.pathsep)
    if path and (Path(path) / PLACE).is_file()
]
pytestmark = pytest.mark.skipif(
    not SOURCES, reason="no vLLM with expert substitution in VLLM_SOURCES"
)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's module, with its base classes left out: they load compiled code."""
    for name, classes in {
        "moe_output": ("UnfinalizedMoEOutput",),
        "routed_experts": ("RoutedExperts",),
        "unquantized_fused_moe_method": ("UnquantizedFusedMoEMethod",),
    }.items():
        stub = ModuleType(f"{LAYERS}.{name}")
        for one in classes:
            setattr(stub, one, type(one, (), {}))
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    spec = importlib.util.spec_from_file_location("substitution", SOURCES[0] / PLACE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, found)
    spec.loader.exec_module(found)
    return found


def name_parser(module: Any) -> Any:
    """vLLM's function that takes a tensor's name for a constant's."""
    tree = ast.parse((SOURCES[0] / LOADING).read_text("utf-8"))
    (found,) = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == "_parse_approx_value_name"
    ]
    scope = dict(vars(module))
    exec(compile(ast.Module([found], []), str(LOADING), "exec"), scope)
    return scope[found.name]


@pytest.mark.parametrize("family", ["deepseek_v3", "mixtral"])
def test_vllm_loads_and_routes_what_we_wrote(
    family: str, module: Any, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(
        tmp_path / "ckpt", model_type=family, layers=2, shards=1, tokenizer=False
    )
    source = open_checkpoint(folder)
    out = _spelled(source, tmp_path, means=family == "mixtral")
    config = SimpleNamespace(**json.loads((out / "config.json").read_text("utf-8")))
    vllm_config = SimpleNamespace(hf_config=config, hf_text_config=config)
    spec = module.get_expert_substitution_spec(vllm_config)
    opened, stored = open_checkpoint(out), load_file(out / "model.safetensors")
    assert opened.substitution is not None
    assert spec.experts == {
        layer: one.removed for layer, one in opened.substitution.layers.items()
    }
    parse, hidden = name_parser(module), source.config["hidden_size"]
    for index, one in opened.substitution.layers.items():
        experts = source.layout.experts[0].name(index, 0).split("experts.0")[0]
        layer = module.make_expert_substitution(
            vllm_config, f"{experts}experts", one.experts, hidden, torch.bfloat16
        )
        assert layer.num_compute_experts == len(one.kept)
        constants = {name: parse(name) for name in stored}
        for name, found in constants.items():
            if found is not None and found[0] == index:
                layer.weight_loader(layer.values, stored[name], found[1])
        layer.validate_loaded_values("values")
        # Experts with weights are those under the names that it maps to rows.
        rows = [layer.physical_expert_id(expert) for expert in range(one.experts)]
        assert [row for row in rows if row >= 0] == list(range(len(one.kept)))
        named = {
            expert
            for expert in range(one.experts)
            if source.layout.experts[0].name(index, expert) in stored
        }
        assert {expert for expert, row in enumerate(rows) if row >= 0} == named
        _check_routes(opened, index, layer, one.experts)


def _spelled(source: Any, folder: Path, *, means: bool) -> Path:
    layers = [
        LayerPlan(
            layer=one.index,
            experts=one.num_experts,
            keep=(kept := _kept(one)),
            clusters=tuple((expert,) for expert in kept) if means else None,
            unserved=tuple(sorted({*range(one.num_experts)} - {*kept}))
            if means
            else (),
        )
        for one in source.layers
    ]
    plan = CutPlan(
        tool_version="test",
        model=model_facts(source).model,
        recipe=Recipe(),
        routing="redirect" if means else "drop",
        layers=tuple(layers),
    )
    cut(source, plan, folder / "compact", RunOptions())
    generator = torch.Generator().manual_seed(0)
    hidden = source.config["hidden_size"]
    found = {
        one.layer: {
            expert: torch.randn(hidden, generator=generator).double()
            for expert in one.unserved
        }
        for one in layers
    }
    out = folder / "out"
    compact = open_checkpoint(folder / "compact")
    convert(compact, out, "dense", "stock-vllm", means=found if means else None)
    return out


def _kept(layer: Any) -> tuple[int, ...]:
    if layer.index != 1:
        return tuple(range(layer.num_experts))
    gone = {1, 2} if layer.num_experts == 8 else {0, 3, 11, 13}
    return tuple(one for one in range(layer.num_experts) if one not in gone)


def _check_routes(opened: Any, index: int, layer: Any, experts: int) -> None:
    """vLLM's constants are ours, and no slot but theirs loses its weight."""
    generator = torch.Generator().manual_seed(1)
    ids_NK = torch.stack(
        [torch.randperm(experts, generator=generator)[:4] for _ in "x" * 32]
    )
    weights_NK = torch.rand(32, 4, generator=generator)
    x_ND = torch.zeros(32, layer.values.shape[1], dtype=torch.bfloat16)
    out_ND = x_ND.clone()
    routing = Routing(ids_NK, weights_NK, torch.zeros(32, experts))
    add_constants(opened, opened.layers[index], routing, out_ND)
    kept_NK = torch.isin(ids_NK, torch.tensor(opened.substitution.layers[index].kept))
    theirs, ids = weights_NK.clone(), ids_NK.clone()
    found_ND = layer.transform_routes(x_ND, theirs, ids)
    torch.testing.assert_close(found_ND, out_ND)
    assert torch.equal(theirs, weights_NK * kept_NK)
    redirect = opened.layers[index].redirect
    if redirect is not None:
        assert all(
            redirect[int(old)] == int(new)
            for old, new in zip(ids_NK[kept_NK], ids[kept_NK], strict=True)
        )


def test_the_words_are_vllms(module: Any) -> None:
    assert module.APPROX_VALUE_SUFFIX == SUFFIX
    assert module._ROUTER_SEMANTICS == SEMANTICS
    text = (SOURCES[0] / PLACE).read_text("utf-8")
    assert f'"{KEY}"' in text
    for key in DECLARED:
        assert f'"{key}"' in text


def test_what_vllm_refuses_is_what_the_docs_say() -> None:
    tree = ast.parse((SOURCES[0] / PLACE).read_text("utf-8"))
    said = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert {
        "quantized MoE weights",
        "expert parallelism",
        "data parallelism",
        "router weights on expert inputs",
        "MoE LoRA",
        "EPLB",
    } <= said
