"""The op that counts routed tokens, as vLLM and torch.compile see it."""

import pytest
import torch

pytestmark = pytest.mark.vllm

IDS = torch.tensor([[0, 2], [2, 1], [2, 0]], dtype=torch.int32)


def test_the_op_tells_the_compiler_the_truth() -> None:
    from vllm_moe_prune.plugin.load_op import count_routed

    load = torch.zeros(4, dtype=torch.int64)
    torch.library.opcheck(count_routed, (load, IDS))
    load.zero_()
    count_routed(load, IDS)
    count_routed(load, IDS.long())
    assert load.tolist() == [4, 2, 6, 0]


def test_padding_is_not_counted() -> None:
    from vllm.forward_context import ForwardContext, override_forward_context

    from vllm_moe_prune.plugin.load_op import count_routed

    load = torch.zeros(4, dtype=torch.int64)
    # Longer than the batch, as vLLM's buffers are; the last token is no request's.
    slots = {"model.layers.0.self_attn.attn": torch.tensor([7, 8, -1, 5])}
    context = ForwardContext(no_compile_layers={}, attn_metadata={}, slot_mapping=slots)
    with override_forward_context(context):
        count_routed(load, IDS)
    assert load.tolist() == [1, 1, 2, 2]
