"""Routing, redirects and the sum over experts, against naive loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from vllm_moe_prune.archs.spec import RouterRule
from vllm_moe_prune.calibrate.expert_forward import (
    Router,
    Routing,
    expert_hidden,
    expert_tokens,
    route,
    run_experts,
    tokens_of_experts,
)
from vllm_moe_prune.checkpoint.open import Layer
from vllm_moe_prune.checkpoint.reader import Expert
from vllm_moe_prune.errors import CheckpointError


def random_experts(count: int, width: int = 12, hidden: int = 8) -> list[Expert]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return [
        Expert(*(torch.randn(shape, generator=generator) for shape in shapes))
        for _ in range(count)
    ]


def naive_moe(
    x_ND: torch.Tensor,
    routing: Routing,
    experts: list[Expert],
    redirect: tuple[int | None, ...] | None,
) -> torch.Tensor:
    out_ND = torch.zeros_like(x_ND)
    for token, x_D in enumerate(x_ND):
        for row, weight in zip(
            routing.ids_NK[token].tolist(), routing.weights_NK[token], strict=True
        ):
            target = row if redirect is None else redirect[row]
            if target is not None:
                gate_FD, up_FD, down_DF = experts[target]
                inner_F = functional.silu(gate_FD @ x_D) * (up_FD @ x_D)
                out_ND[token] += weight * (down_DF @ inner_F)
    return out_ND


@given(
    tokens=st.integers(1, 30),
    rows=st.integers(1, 8),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 1000),
    redirected=st.booleans(),
)
def test_experts_sum_as_the_definition_says(
    tokens: int, rows: int, top_k: int, seed: int, redirected: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(tokens, 8, generator=generator)
    router_RD = torch.randn(rows, 8, generator=generator)
    routing = route(
        x_ND, Router(router_RD, min(top_k, rows), RouterRule(renormalize=True))
    )
    redirect: tuple[int | None, ...] | None = None
    count = rows
    if redirected:
        count = max(1, rows // 2)
        redirect = tuple(None if row % 5 == 4 else row % count for row in range(rows))
    experts = random_experts(count)
    layer = Layer(
        index=0,
        num_experts=count,
        top_k=top_k,
        width=12,
        has_moe=True,
        redirect=redirect,
    )
    out_ND = run_experts(x_ND, routing, layer, experts.__getitem__)
    expected_ND = naive_moe(x_ND, routing, experts, redirect)
    torch.testing.assert_close(out_ND, expected_ND, rtol=1e-4, atol=1e-5)


def test_weights_of_slots_that_meet_add_up_and_lost_slots_are_lost() -> None:
    routing = Routing(
        torch.tensor([[0, 2], [3, 1], [2, 3]]),
        torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]]),
        torch.empty(0),
    )
    redirect = (0, 1, 0, None)
    token_n, weight_n = expert_tokens(routing, 0, redirect)
    assert token_n.tolist() == [0, 2]
    assert weight_n.tolist() == pytest.approx([1.0, 0.9])
    token_n, weight_n = expert_tokens(routing, 1, redirect)
    assert token_n.tolist() == [1]
    assert weight_n.tolist() == [0.5]
    assert expert_tokens(routing, 2, redirect)[0].tolist() == []


def test_without_redirect_a_row_is_an_expert() -> None:
    routing = Routing(
        torch.tensor([[0, 2], [3, 1], [2, 3]]),
        torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]]),
        torch.empty(0),
    )
    token_n, weight_n = expert_tokens(routing, 3, None)
    assert token_n.tolist() == [1, 2]
    assert weight_n.tolist() == pytest.approx([0.5, 0.1])


def test_equal_logits_choose_the_smallest_index() -> None:
    router_RD = torch.zeros(6, 4)
    router_RD[4] = router_RD[5] = 1.0
    x_ND = torch.ones(2, 4)
    x_ND[1] = 0.0
    routing = route(x_ND, Router(router_RD, 3, RouterRule(renormalize=True)))
    assert routing.ids_NK.tolist() == [[4, 5, 0], [0, 1, 2]]
    assert routing.weights_NK.sum(1).tolist() == pytest.approx([1.0, 1.0])


@given(
    logits=st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1),
    top_k=st.integers(1, 5),
)
def test_top_k_is_a_stable_sort(logits: list[list[int]], top_k: int) -> None:
    x_ND = torch.tensor(logits, dtype=torch.float32)
    routing = route(x_ND, Router(torch.eye(5), top_k, RouterRule(renormalize=False)))
    expected = [
        sorted(range(5), key=lambda row, values=values: (-values[row], row))[:top_k]
        for values in logits
    ]
    assert routing.ids_NK.tolist() == expected


def test_without_renormalizing_weights_are_probabilities() -> None:
    x_ND, router_RD = torch.randn(5, 8), torch.randn(4, 8)
    routing = route(x_ND, Router(router_RD, 2, RouterRule(renormalize=False)))
    probabilities = (x_ND @ router_RD.T).softmax(-1)
    torch.testing.assert_close(
        routing.weights_NK, probabilities.gather(1, routing.ids_NK)
    )


def test_logits_that_are_not_finite_are_refused() -> None:
    x_ND = torch.full((2, 4), torch.inf)
    with pytest.raises(CheckpointError, match="layer 7: the router's logits are NaN"):
        route(
            x_ND,
            Router(torch.ones(3, 4), 1, RouterRule(renormalize=True)),
            where="layer 7",
        )


def test_experts_without_tokens_are_not_read() -> None:
    experts = random_experts(4)
    routing = Routing(torch.tensor([[2], [2]]), torch.ones(2, 1), torch.zeros(2, 4))
    read: list[int] = []

    def reading(expert: int) -> Expert:
        read.append(expert)
        return experts[expert]

    layer = Layer(index=0, num_experts=4, top_k=1, width=12, has_moe=True)
    run_experts(torch.ones(2, 8), routing, layer, reading)
    assert read == [2]


def test_inner_activations_are_gated() -> None:
    x_nD = torch.randn(5, 8)
    (expert,) = random_experts(1)
    expected = functional.gelu(x_nD @ expert.gate_FD.T) * (x_nD @ expert.up_FD.T)
    torch.testing.assert_close(expert_hidden(x_nD, expert, functional.gelu), expected)


@settings(max_examples=30)
@given(tokens=st.integers(1, 40), experts=st.integers(1, 6), redirected=st.booleans())
def test_all_experts_tokens_are_each_ones(
    tokens: int, experts: int, redirected: bool
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    rows = 2 * experts if redirected else experts
    scores = torch.rand(tokens, rows, generator=generator)
    weights, ids = scores.topk(min(2, rows))
    routing = Routing(ids, weights, scores)
    redirect = [*range(experts), *[0] * experts] if redirected else None
    found = tokens_of_experts(routing, experts, redirect)
    assert len(found) == experts
    for expert, (token_n, weight_n) in enumerate(found):
        wanted = expert_tokens(routing, expert, redirect)
        assert token_n.tolist() == wanted[0].tolist()
        assert weight_n.tolist() == wanted[1].tolist()
