"""The op that counts routed tokens, and layers whose tokens cannot be counted."""

from types import SimpleNamespace

import pytest
import torch

from vllm_moe_prune.errors import ServeError

pytestmark = pytest.mark.vllm

IDS = torch.tensor([[0, 2], [2, 1], [2, 0]], dtype=torch.int32)


def test_the_op_tells_the_compiler_the_truth() -> None:
    from vllm_moe_prune.plugin.watch.load_op import count_routed

    load = torch.zeros(4, dtype=torch.int64)
    torch.library.opcheck(count_routed, (load, IDS))
    load.zero_()
    count_routed(load, IDS)
    count_routed(load, IDS.long())
    assert load.tolist() == [4, 2, 6, 0]


def test_nothing_that_a_graph_made_is_used_outside_it() -> None:
    """Memory of a captured graph is its own, as what is fake stays among fakes."""
    from torch._subclasses import FakeTensorMode

    from vllm_moe_prune.plugin.watch.load_op import count_all

    with FakeTensorMode():
        count_all(torch.zeros(4, dtype=torch.int64), torch.zeros(3, 2).int())
    load = torch.zeros(4, dtype=torch.int64)
    count_all(load, IDS)
    assert load.tolist() == [2, 1, 3, 0]


def test_padding_is_not_counted() -> None:
    from vllm.forward_context import ForwardContext, override_forward_context

    from vllm_moe_prune.plugin.watch.load_op import count_real

    load = torch.zeros(4, dtype=torch.int64)
    # Longer than the batch, as vLLM's buffers are; the last token is no request's.
    slots = {"model.layers.0.self_attn.attn": torch.tensor([7, 8, -1, 5])}
    context = ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping=slots)
    with override_forward_context(context):
        count_real(load, IDS)
    assert load.tolist() == [1, 1, 2, 2]
    # No context, but a router that marks padding itself.
    count_real(load, torch.tensor([[1, 0], [-1, -1]]))
    assert load.tolist() == [2, 2, 2, 4]


@pytest.mark.parametrize(
    ("method", "router", "why"),
    [
        ({"is_monolithic": True}, {}, "routes inside its kernel"),
        ({}, {"num_fused_shared_experts": 1}, "shared experts are routed like"),
        ({}, {"capture_fn": print}, "something else listens to its router"),
        ({}, {"capture_fn": None}, "something else listens to its router"),
    ],
    ids=["monolithic", "fused", "captured", "not hooked"],
)
def test_layers_that_nobody_can_count_are_refused(
    method: dict[str, object], router: dict[str, object], why: str
) -> None:
    from vllm_moe_prune.plugin.watch.routing_load import CountingMoERunner

    layer = SimpleNamespace(
        layer_name="model.layers.3.mlp.experts",
        _quant_method=SimpleNamespace(**({"is_monolithic": False} | method)),
        router=SimpleNamespace(**({"capture_fn": len} | router)),
        counts_in_router=False,
        count=len,
    )
    with pytest.raises(ServeError, match=rf"layers\.3\.mlp\.experts: .*{why}"):
        CountingMoERunner.start(layer)


def test_layers_with_a_forward_of_their_own_are_refused() -> None:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    from vllm_moe_prune.plugin.watch.routing_load import RoutingLoad

    class Theirs(MoERunner):
        layer_name = "model.layers.0.mlp.experts"

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(additional_config={"moe_prune_load": True}),
        get_model=lambda: torch.nn.ModuleList([Theirs()]),
    )
    with pytest.raises(ServeError, match="Theirs brings a forward of its own"):
        RoutingLoad.moe_prune_start_load(worker)
