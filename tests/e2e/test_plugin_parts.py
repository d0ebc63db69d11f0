"""The plugin's parts that need no engine: tally, routing, refused flags."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_moe_prune.archs import find_arch
from vllm_moe_prune.errors import CheckpointError, ServeError
from vllm_moe_prune.plugin import LOAD_FORMAT, register
from vllm_moe_prune.plugin.compat import check_version
from vllm_moe_prune.plugin.layers import ServedLayer
from vllm_moe_prune.plugin.routing import route_rows, row_table
from vllm_moe_prune.plugin.served import check_parallel
from vllm_moe_prune.plugin.tally import WeightTally

ARCH = find_arch("mixtral", "test")
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
Tensors = dict[str, Tensor]
LAYERS = (ServedLayer(0, 2, 2, 2), ServedLayer(1, 0, 2, 0))


def every_weight() -> Tensors:
    one = torch.zeros(1)
    names = [EXPERT.format(0, e, w) for e in range(2) for w in ("w1", "w2", "w3")]
    return dict.fromkeys(names, one) | {ROUTER.format(0): torch.zeros(2, 4)}


def load(weights: list[tuple[str, Tensor]]) -> None:
    tally = WeightTally(ARCH, LAYERS, "model")
    assert [name for name, _ in tally.watch(weights)] == [name for name, _ in weights]
    tally.finish()


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
    layers = [ServedLayer(0, 5, 2, 5), ServedLayer(1, 2, 2, 2), ServedLayer(2, 0, 2, 0)]
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


def test_rows_are_ranked_before_they_become_experts() -> None:
    layer = ServedLayer(0, 2, 2, 4, redirect=(0, 1, 0, None))
    logits_TR = torch.tensor([[2.0, 0.0, 1.0, -9.0], [0.0, 1.0, -9.0, 2.0]])
    weights_TK, experts_TK = route_rows(
        logits_TR, *row_table(layer, None), top_k=2, renormalise=True
    )
    share = torch.softmax(torch.tensor([2.0, 1.0]), dim=0)
    assert experts_TK.tolist() == [[0, 0], [0, 1]]
    torch.testing.assert_close(weights_TK[0], share)
    # Nothing serves row 3: its share is lost, not given to the other.
    torch.testing.assert_close(
        weights_TK[1], torch.stack([torch.tensor(0.0), share[1]])
    )
    other_process, _ = row_table(layer, (-1, 0))
    assert other_process.tolist() == [0, 0, 0, 0]
    assert row_table(layer, (-1, 0))[1].tolist() == [0.0, 1.0, 0.0, 0.0]


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
