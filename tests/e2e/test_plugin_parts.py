"""The plugin's parts that need no engine: load_check, routing, refused flags."""

import importlib
import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_moe_prune.archs import find_arch
from vllm_moe_prune.errors import CheckpointError, ServeError
from vllm_moe_prune.plugin import LOAD_FORMAT, register
from vllm_moe_prune.plugin.compat import check_version
from vllm_moe_prune.plugin.load.load_check import LoadCheck
from vllm_moe_prune.plugin.load.resolve_layers import check_parallel
from vllm_moe_prune.plugin.load.served_layer import ServedLayer
from vllm_moe_prune.plugin.models.routing import RowTable, route_rows

ARCH = find_arch("mixtral", "test")
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
Tensors = dict[str, Tensor]
LAYERS = (
    ServedLayer(index=0, experts=2, top_k=2, router_rows=2),
    ServedLayer(index=1, experts=0, top_k=2, router_rows=0),
)


def every_weight() -> Tensors:
    one = torch.zeros(1)
    names = [EXPERT.format(0, e, w) for e in range(2) for w in ("w1", "w2", "w3")]
    return dict.fromkeys(names, one) | {ROUTER.format(0): torch.zeros(2, 4)}


def load(weights: list[tuple[str, Tensor]]) -> None:
    load_check = LoadCheck(ARCH, LAYERS, "model")
    assert [name for name, _ in load_check.watch(weights)] == [
        name for name, _ in weights
    ]
    load_check.finish()


def test_tally_wants_every_weight_once_in_any_layout() -> None:
    load([*every_weight().items(), ("model.norm.weight", torch.zeros(4))])
    load(
        [
            ("model.layers.0.mlp.gate.weight", torch.zeros(2, 4)),
            ("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(2, 6, 4)),
            ("model.layers.0.mlp.experts.down_proj", torch.zeros(2, 4, 3)),
        ]
    )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (EXPERT.format(0, 1, "w1"), (1,), r"layer 0: expert 1 \(gate\) is there twice"),
        (EXPERT.format(0, 2, "w1"), (1,), "layer 0: expert 2 is out of range"),
        (EXPERT.format(1, 0, "w1"), (1,), "layer 1 has no MoE sublayer"),
        (EXPERT.format(7, 0, "w1"), (1,), "layer 7 has no MoE sublayer"),
        ("model.layers.0.mlp.gate.weight", (2, 4), "the router is there twice"),
        ("model.layers.0.mlp.experts.down_proj", (3, 4, 4), "3 experts, expected 2"),
        ("model.layers.0.mlp.experts.down_proj", (2, 4, 4), "expert 0 .* twice"),
    ],
)
def test_tally_refuses_a_weight_too_many(
    name: str, shape: tuple[int, ...], message: str
) -> None:
    weights = [*every_weight().items(), (name, torch.zeros(shape))]
    with pytest.raises(CheckpointError, match=message):
        load(weights)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (EXPERT.format(0, 1, "w2"), r"layer 0: expert 1 \(down\) is missing"),
        (ROUTER.format(0), "layer 0: the router is missing"),
    ],
)
def test_tally_names_what_is_missing(name: str, message: str) -> None:
    weights = every_weight()
    del weights[name]
    with pytest.raises(CheckpointError, match=message):
        load(list(weights.items()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"enable_eplb": True}, "--enable-eplb .*layer 1 has 2 .*layer 0 has 5"),
        ({"tensor_parallel_size": 4}, "4 ranks, but layer 1 has only 2 experts"),
        ({"enable_ep_weight_filter": True}, "--enable-ep-weight-filter"),
        ({"data_parallel_size": 2}, "does not work in vLLM on CPUs"),
    ],
)
def test_flags_that_need_equal_layers_are_refused(
    flags: dict[str, Any], message: str
) -> None:
    layers = [
        ServedLayer(index=0, experts=5, top_k=2, router_rows=5),
        ServedLayer(index=1, experts=2, top_k=2, router_rows=2),
        ServedLayer(index=2, experts=0, top_k=2, router_rows=0),
    ]
    allowed = {
        "enable_eplb": False,
        "enable_ep_weight_filter": False,
        "enable_expert_parallel": True,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    check_parallel(SimpleNamespace(**allowed), layers, local_ids=True)
    with pytest.raises(ServeError, match=message):
        check_parallel(SimpleNamespace(**(allowed | flags)), layers, local_ids=True)


def test_balancing_experts_needs_rows_that_are_experts() -> None:
    flags = SimpleNamespace(enable_eplb=True, enable_expert_parallel=False)
    check_parallel(
        flags,
        [ServedLayer(index=0, experts=2, top_k=2, router_rows=2)],
        local_ids=False,
    )
    redirected = ServedLayer(
        index=1, experts=2, top_k=2, router_rows=4, redirect=(0, 1, 0, 1)
    )
    uneven = ServedLayer(
        index=1, experts=2, top_k=2, router_rows=2, groups=2, row_groups=(0, 0)
    )
    for layer in (redirected, uneven):
        with pytest.raises(ServeError, match=r"--enable-eplb .* in layer 1"):
            check_parallel(
                flags,
                [ServedLayer(index=0, experts=2, top_k=2, router_rows=2), layer],
                local_ids=False,
            )


def test_rows_are_ranked_before_they_become_experts() -> None:
    table = RowTable(
        ServedLayer(
            index=0, experts=2, top_k=2, router_rows=4, redirect=(0, 1, 0, None)
        )
    )
    logits_TR = torch.tensor([[2.0, 0.0, 1.0, -9.0], [0.0, 1.0, -9.0, 2.0]])
    weights_TK, experts_TK = route_rows(logits_TR, table, top_k=2, renormalize=True)
    share = torch.softmax(torch.tensor([2.0, 1.0]), dim=0)
    assert experts_TK.tolist() == [[0, 0], [0, 1]]
    torch.testing.assert_close(weights_TK[0], share)
    # Nothing serves row 3: its share is lost, not given to the other.
    torch.testing.assert_close(
        weights_TK[1], torch.stack([torch.tensor(0.0), share[1]])
    )
    table.localize((-1, 0))
    assert table.expert_R.tolist() == [0, 0, 0, 0]
    assert table.share_R.tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("biased", [False, True])
def test_even_groups_in_any_order_route_as_the_original_does(biased: bool) -> None:
    """Against transformers' routers, whose rows are sorted by group."""
    draw = torch.Generator().manual_seed(0)
    logits_TR = torch.randn(64, 12, generator=draw)
    bias_R = torch.randn(12, generator=draw) / 4 if biased else None
    scores_TR = logits_TR.sigmoid() if biased else logits_TR.softmax(dim=-1)
    choice_TGR = (scores_TR + (0 if bias_R is None else bias_R)).unflatten(1, (4, 3))
    best_TG = choice_TGR.topk(2 if biased else 1, dim=-1).values.sum(dim=-1)
    out_TG = torch.ones_like(best_TG).scatter(1, best_TG.topk(2).indices, 0.0).bool()
    rows_TK = choice_TGR.masked_fill(out_TG[..., None], -9.0).flatten(1).topk(4).indices
    expected_TR = torch.zeros_like(logits_TR).scatter(
        1, rows_TK, scores_TR.gather(1, rows_TK)
    )
    order = torch.randperm(12, generator=draw)
    groups = tuple((order // 3).tolist())
    table = RowTable(
        ServedLayer(
            index=0, experts=12, top_k=4, router_rows=12, groups=4, row_groups=groups
        )
    )
    weights_TK, experts_TK = route_rows(
        logits_TR[:, order],
        table,
        top_k=4,
        renormalize=False,
        sigmoid=biased,
        bias_R=None if bias_R is None else bias_R[order],
        top_groups=2,
    )
    found_TR = torch.zeros_like(logits_TR).scatter(
        1, order[experts_TK.long()], weights_TK
    )
    torch.testing.assert_close(found_TR, expected_TR)


def test_groups_that_ran_dry_are_left_alone() -> None:
    """Group 0 has one row, group 1 none; the second slot of the choice stays empty."""
    table = RowTable(
        ServedLayer(
            index=0, experts=3, top_k=2, router_rows=3, groups=3, row_groups=(0, 2, 2)
        )
    )
    logits_TR = torch.tensor([[9.0, 0.0, 0.0]])
    bias_R = torch.tensor([0.0, -3.0, -3.0])
    weights_TK, experts_TK = route_rows(
        logits_TR,
        table,
        top_k=2,
        renormalize=True,
        sigmoid=True,
        bias_R=bias_R,
        top_groups=1,
    )
    assert weights_TK.tolist() == [[1.0, 0.0]]
    assert experts_TK[0, 0] == 0


@pytest.mark.parametrize(
    ("layer", "answer"),
    [
        (ServedLayer(index=0, experts=4, top_k=2, router_rows=4), True),
        (
            ServedLayer(
                index=0, experts=2, top_k=2, router_rows=4, redirect=(0, 0, 1, 1)
            ),
            False,
        ),
        (
            ServedLayer(
                index=0,
                experts=4,
                top_k=2,
                router_rows=4,
                groups=2,
                row_groups=(0, 0, 1, 1),
            ),
            True,
        ),
        (
            ServedLayer(
                index=0,
                experts=4,
                top_k=2,
                router_rows=4,
                groups=2,
                row_groups=(0, 1, 0, 1),
            ),
            False,
        ),
        (
            ServedLayer(
                index=0,
                experts=5,
                top_k=2,
                router_rows=5,
                groups=2,
                row_groups=(0, 0, 0, 1, 1),
            ),
            False,
        ),
        # vLLM forgets about groups where there are as many as experts.
        (
            ServedLayer(
                index=0, experts=2, top_k=2, router_rows=2, groups=2, row_groups=(0, 1)
            ),
            False,
        ),
    ],
)
def test_stock_routers_get_only_what_they_understand(
    layer: ServedLayer, answer: bool
) -> None:
    assert layer.rows_are_experts is answer


@pytest.mark.vllm
def test_layers_may_differ_under_latent_attention_if_they_are_ours() -> None:
    from transformers import DeepseekV3Config

    register()  # first: vLLM cannot import its converters by themselves
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
    )

    config = DeepseekV3Config(
        num_hidden_layers=3,
        n_routed_experts=12,
        architectures=["MoePruneDeepseekV3ForCausalLM"],
        per_layer_config={1: {"n_routed_experts": 8}, 2: {"n_routed_experts": 0}},
    )
    converter = MODEL_ARCH_CONFIG_CONVERTORS["deepseek_v3"](config, config)
    found = converter.convert()
    assert (found.num_experts, found.is_deepseek_mla) == (12, True)
    assert [found[layer].num_experts for layer in range(3)] == [12, 8, 0]
    assert found.head_size == config.kv_lora_rank + config.qk_rope_head_dim
    config.architectures = ["DeepseekV3ForCausalLM"]
    with pytest.raises(NotImplementedError, match="MLA"):
        converter.convert()


@pytest.fixture
def rotary() -> Any:
    """vLLM's rotary embedding of latent attention, as an engine would build it."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    register()
    with set_current_vllm_config(VllmConfig()):
        return get_rope(
            64,
            max_position=16,
            rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
            is_neox_style=False,
            dtype=torch.float32,
        )


@pytest.mark.vllm
@pytest.mark.parametrize("shape", [(5, 3, 64), (5, 192)], ids=str)
def test_every_head_is_rotated(rotary: Any, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(shape, generator=draw, dtype=torch.float32)
    key = torch.randn(5, 1, 64, generator=draw, dtype=torch.float32)
    power = torch.arange(0, 64, 2, dtype=torch.float64) / 64
    angle = torch.arange(5)[:, None, None] * 1e4**-power
    turn = torch.polar(torch.ones_like(angle), angle)
    found, _ = rotary.forward_cpu(torch.arange(5), query.clone(), key.clone())
    pairs = torch.view_as_complex(query.double().view(5, 3, 32, 2)) * turn
    expected = torch.view_as_real(pairs).view(shape)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.vllm
def test_vllm_still_rotates_one_head_only(rotary: Any) -> None:
    """When this fails, vLLM has mended its kernel: drop ``mend_cpu_rotary``."""
    query, key = torch.ones(5, 3, 64), torch.ones(5, 1, 64)
    stock = type(rotary).__mro__[1].forward_cpu
    found, _ = stock(rotary, torch.arange(5), query.clone(), key.clone())
    assert not torch.allclose(found[:, 1], found[:, 0])


@pytest.mark.vllm
def test_registering_twice_is_harmless() -> None:
    from vllm import ModelRegistry
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    register()
    register()
    assert ARCH.pruned_architecture in ModelRegistry.get_supported_archs()
    extra = {"plan": "plan.json"}
    config = LoadConfig(load_format=LOAD_FORMAT, model_loader_extra_config=extra)
    assert type(get_model_loader(config)).__name__ == "PruningLoader"


REGISTERING = """
import sys
from vllm.platforms import current_platform  # as every process of a server has
from vllm_moe_prune.plugin import register
register()
dear = ("layers.linear", "layers.fused_moe", "layers.rotary_embedding", "model_loader")
assert not [name for name in dear if "vllm.model_executor." + name in sys.modules]
from vllm.model_executor.layers.quantization import get_quantization_config
names = ["moe_prune", "compressed-tensors"] + ["fp8"] * current_platform.is_cpu()
for name in names:
    assert get_quantization_config(name).__name__ == "Deferred"
    assert get_quantization_config(name).get_config_filenames() == []
assert type(get_quantization_config("moe_prune")()).__name__ == "MoePruneConfig"
from vllm.model_executor import model_loader
assert model_loader.__loader__ is model_loader.__spec__.loader
assert "_Then" not in repr(model_loader.__loader__)
assert not [one for one in sys.meta_path if type(one).__name__ == "_ImportHook"]
if current_platform.is_cpu():
    from vllm.model_executor.custom_op import op_registry_oot
    assert "RotaryEmbedding" in op_registry_oot
import vllm_moe_prune.plugin.models.deepseek_v2
import vllm_moe_prune.plugin.models.mixtral
import vllm_moe_prune.plugin.watch.endpoint
for name in ("load_op", "routing_load"):
    assert "vllm_moe_prune.plugin.watch." + name not in sys.modules
"""


@pytest.mark.vllm
def test_nothing_is_imported_before_it_is_asked_for() -> None:
    """By registering, what a model is made of; by models and routes, what counts."""
    environment = os.environ | {"VLLM_PLUGINS": ""}
    subprocess.run([sys.executable, "-c", REGISTERING], env=environment, check=True)


@pytest.mark.vllm
def test_what_waits_for_an_import_waits_until_it_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_moe_prune.plugin.load.lazy_register import when_imported

    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    finders, done = list(sys.meta_path), []
    path = tmp_path / "waited_for.py"
    path.write_text("raise RuntimeError('not yet')")
    for number in range(2):
        when_imported("waited_for", partial(done.append, number))
    assert importlib.util.find_spec("waited_for") is not None
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module("waited_for")
    assert done == []
    path.write_text("found = True")
    importlib.invalidate_caches()
    module = importlib.import_module("waited_for")
    monkeypatch.delitem(sys.modules, "waited_for")
    assert module.found
    assert sorted(done) == [0, 1]
    assert sys.meta_path == finders
    assert type(module.__loader__).__name__ == "SourceFileLoader"


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.31.1", r"vLLM 0\.31\.1 is installed, .* 0\.32 or newer"),
        ("dev", "calls itself 'dev'"),
    ],
)
def test_older_vllm_is_refused(
    version: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(ServeError, match=message):
        check_version()
