"""Routing tokens to experts and running them, one expert at a time.

Same arithmetic as transformers' eager loop, but each expert is read, applied to its
tokens of all sequences at once, and freed before the next one is read.

Axes: N tokens, n the tokens of one expert, D hidden, F expert width, R router rows,
K top-k.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn import functional

from ..archs.spec import RouterRule, Scores
from ..checkpoint.open import Layer
from ..checkpoint.reader import Expert
from ..errors import CheckpointError
from .memory import TEMPORARY_BYTES
from .read_ahead import Read, read_ahead

Activation = Callable[[torch.Tensor], torch.Tensor]


class Served(NamedTuple):
    """What one expert gave for some of its tokens."""

    token_n: torch.Tensor
    """Which tokens."""
    down_nD: torch.Tensor
    """What its down projection gave."""
    scaled_nD: torch.Tensor
    """The same times the router's weight."""


Visit = Callable[[int, Served], None]


class Router(NamedTuple):
    """A router and what it goes by."""

    rows_RD: torch.Tensor
    top_k: int
    rule: RouterRule = RouterRule()
    bias_R: torch.Tensor | None = None
    """Added to the scores for choosing, not for weighting."""
    groups_R: torch.Tensor | None = None
    """The group of each row; None where all are one."""


class Routing(NamedTuple):
    """What the router of one layer decided for every token."""

    ids_NK: torch.Tensor
    """Router rows, best first, int64."""
    weights_NK: torch.Tensor
    """fp32, as transformers keeps them."""
    logits_NR: torch.Tensor
    """In the stored dtype, or fp32 where the family computes them so."""
    scores: Scores = "softmax"
    """What makes scores of them."""


def route(x_ND: torch.Tensor, router: Router, where: str = "router") -> Routing:
    """The best ``top_k`` rows of the best groups, and their weights.

    Scores are the softmax or sigmoid of the logits. They choose, with the bias added;
    as weights they are those without it, rescaled to sum to one if the rule says so,
    times its scale.

    Raises:
        CheckpointError: A logit is NaN or infinite; ``where`` says which layer's.
    """
    rule, rows_RD = router.rule, router.rows_RD
    # DeepSeek's gates are fp32 products of bf16 weights; Mixtral's stays in bf16.
    inputs = (x_ND.float(), rows_RD.float()) if rule.fp32 else (x_ND, rows_RD)
    return choose(functional.linear(*inputs), router, where)


def choose(logits_NR: torch.Tensor, router: Router, where: str = "router") -> Routing:
    """What follows from a router's logits; see ``route``."""
    rule = router.rule
    # NaN never wins a comparison: top-k would choose experts by position, silently.
    if not bool(torch.isfinite(logits_NR).all()):
        raise CheckpointError(
            f"{where}: the router's logits are NaN or infinite for some tokens. "
            f"The weights are damaged, or their dtype overflows on this text."
        )
    scores_NR = scores_of(logits_NR, rule.scores)
    # The bias (noaux_tc) steers the load only; weights come from the plain scores.
    choice_NR = scores_NR if router.bias_R is None else scores_NR + router.bias_R
    if router.groups_R is not None:
        choice_NR = _within_best_groups(choice_NR, router.groups_R, rule)
    ids_NK = _top_k(choice_NR, router.top_k)
    weights_NK = scores_NR.gather(1, ids_NK)
    # After choosing: a dropped expert's share goes to those that were chosen instead.
    if rule.renormalize:
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
    weights_NK = weights_NK * rule.scale
    return Routing(ids_NK, weights_NK, logits_NR, rule.scores)


def scores_of(logits_NR: torch.Tensor, kind: Scores) -> torch.Tensor:
    """Scores in fp32: one distribution over all rows, or each row for itself."""
    if kind == "sigmoid":
        return logits_NR.float().sigmoid()
    return functional.softmax(logits_NR.float(), dim=-1)


def _within_best_groups(
    choice_NR: torch.Tensor, groups_R: torch.Tensor, rule: RouterRule
) -> torch.Tensor:
    """Minus infinity outside the best ``rule.top_groups`` groups.

    A group is as good as the sum of its best ``rule.group_best`` rows; where it has
    fewer, of all of them.
    """
    totals = []
    for group in range(rule.groups):
        inside_NM = choice_NR[:, groups_R == group]
        # A pruned group may have fewer rows than the rule adds up.
        best = inside_NM.topk(min(rule.group_best, inside_NM.shape[1]), dim=-1)
        totals.append(best.values.sum(dim=-1))
    chosen_NG = torch.zeros(len(choice_NR), rule.groups, dtype=torch.bool)
    chosen_NG = chosen_NG.to(choice_NR.device)
    # Ties between groups go to the lower one, as between experts.
    chosen_NG.scatter_(1, _top_k(torch.stack(totals, dim=1), rule.top_groups), True)
    # Not 0: with the bias, scores within the best groups may be negative.
    return choice_NR.masked_fill(~chosen_NG[:, groups_R], -torch.inf)


def _top_k(probs_NR: torch.Tensor, top_k: int) -> torch.Tensor:
    """Like ``torch.topk``, but of equal values the smallest index always comes first.

    bf16 logits are often equal. ``topk`` is ten times faster than a stable sort, and
    right for all rows whose best values differ; only the others are sorted.
    """
    rows = probs_NR.shape[1]
    # One more than is needed shows whether the last place was a tie.
    best, ids = probs_NR.topk(min(top_k + 1, rows), dim=-1)
    tied_N = (best[:, 1:] == best[:, :-1]).any(dim=-1)
    ids_NK = ids[:, :top_k].contiguous()
    if bool(tied_N.any()):
        order = torch.sort(probs_NR[tied_N], dim=-1, descending=True, stable=True)
        ids_NK[tied_N] = order.indices[:, :top_k]
    return ids_NK


def expert_tokens(
    routing: Routing, expert: int, redirect: Sequence[int | None] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens one expert serves, ascending, and the weight of its output for each.

    Args:
        routing: The router's decision.
        expert: Expert number, as the weights are numbered.
        redirect: Router row -> expert, None for a row that nobody serves. Slots of a
            token that meet at one expert add up. Without it, row = expert.
    """
    if redirect is None:
        token_n, slot_n = (routing.ids_NK == expert).nonzero(as_tuple=True)
        return token_n, routing.weights_NK[token_n, slot_n]
    rows = [row for row, target in enumerate(redirect) if target == expert]
    served = routing.ids_NK.new_tensor(rows)
    # Several rows may lead here; a token that chose two of them comes once, with both
    # weights.
    hit_NK = torch.isin(routing.ids_NK, served)
    token_n = hit_NK.any(dim=1).nonzero().flatten()
    weights_nK = routing.weights_NK[token_n] * hit_NK[token_n]
    return token_n, weights_nK.sum(dim=1)


def tokens_of_experts(
    routing: Routing, experts: int, redirect: Sequence[int | None] | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What ``expert_tokens`` gives for every expert; the host waits once for all."""
    if redirect is not None:
        return [expert_tokens(routing, each, redirect) for each in range(experts)]
    top_k = routing.ids_NK.shape[1]
    # Stable: the tokens of an expert stay in their order.
    ids_S, order_S = routing.ids_NK.flatten().sort(stable=True)
    last_E = torch.arange(experts, device=ids_S.device)
    ends = torch.searchsorted(ids_S, last_E, right=True).tolist()
    weight_S = routing.weights_NK.flatten()[order_S]
    token_S = order_S.div(top_k, rounding_mode="floor")
    spans = [slice(*pair) for pair in pairwise([0, *ends])]
    return [(token_S[span], weight_S[span]) for span in spans]


def weigh(x_ND: torch.Tensor, weigher_1D: torch.Tensor) -> torch.Tensor:
    """How much shared experts count for each token [N, 1], in the stored dtype."""
    return functional.linear(x_ND, weigher_1D).sigmoid()


@torch.no_grad()
def expert_hidden(
    x_nD: torch.Tensor, expert: Expert, act: Activation = functional.silu
) -> torch.Tensor:
    """The expert's inner activations, which its down projection reads: [n, F]."""
    hidden_nF = act(functional.linear(x_nD, expert.gate_FD))
    # In place: [n, F] is the largest temporary of the forward.
    hidden_nF *= functional.linear(x_nD, expert.up_FD)
    return hidden_nF


@torch.no_grad()
def run_experts(
    x_ND: torch.Tensor,
    routing: Routing,
    layer: Layer,
    read: Read,
    act: Activation = functional.silu,
    visit: Visit | None = None,
) -> torch.Tensor:
    """The MoE sublayer's output [N, D], in the dtype and on the device of ``x_ND``.

    Args:
        x_ND: Normed hidden states.
        routing: Their routing.
        layer: Says how many experts there are and where router rows lead.
        read: Gives an expert's weights; called once per expert that has tokens, in
            ascending order.
        act: The activation between gate and up.
        visit: Sees every expert's outputs, some tokens at a time.
    """
    out_ND = torch.zeros_like(x_ND)
    served = tokens_of_experts(routing, layer.num_experts, layer.redirect)
    # Others are not read at all: with many experts and little text most bytes are saved
    # here.
    wanted = [number for number, (token_n, _) in enumerate(served) if len(token_n)]
    for number, expert in read_ahead(wanted, read, x_ND.device):
        see = functools.partial(visit, number) if visit else None
        add_expert(out_ND, x_ND, *served[number], place(expert, x_ND), act, see)
    return out_ND


def place(expert: Expert, like: torch.Tensor) -> Expert:
    """The expert on another tensor's device, in its dtype."""
    return Expert(*(matrix.to(like.device, like.dtype) for matrix in expert))


@torch.no_grad()
def add_expert(
    out_ND: torch.Tensor,
    x_ND: torch.Tensor,
    token_n: torch.Tensor,
    weight_n: torch.Tensor,
    expert: Expert,
    act: Activation = functional.silu,
    see: Callable[[Served], None] | None = None,
) -> None:
    """Add one expert's weighted output for its tokens to ``out_ND``, in place."""
    for at_n, scaled_nD in expert_outputs(x_ND, token_n, weight_n, expert, act, see):
        # index_add_ is single-threaded on CPU; no token comes twice, so copy does it.
        scaled_nD += out_ND.index_select(0, at_n)
        out_ND.index_copy_(0, at_n, scaled_nD)


def expert_outputs(
    x_ND: torch.Tensor,
    token_n: torch.Tensor,
    weight_n: torch.Tensor,
    expert: Expert,
    act: Activation,
    see: Callable[[Served], None] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One expert's weighted output in the dtype of ``x_ND``, some tokens at a time."""
    for at_n, weight in token_chunks(token_n, weight_n, expert):
        hidden_nF = expert_hidden(x_ND.index_select(0, at_n), expert, act)
        down_nD = functional.linear(hidden_nF, expert.down_DF)
        # fp32 weight times stored dtype, rounded once: as transformers does it.
        scaled_nD = (down_nD * weight.unsqueeze(1)).to(x_ND.dtype)
        if see is not None:
            see(Served(at_n, down_nD, scaled_nD))
        yield at_n, scaled_nD


def token_chunks(
    token_n: torch.Tensor, weight_n: torch.Tensor, expert: Expert
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut an expert's tokens so that its temporaries stay within 256 MiB."""
    width, hidden = expert.gate_FD.shape
    # Gate, up and their product; input, output and scaled output; the sum in fp32.
    token_bytes = expert.gate_FD.element_size() * (3 * width + 3 * hidden) + 4 * hidden
    step = max(1, TEMPORARY_BYTES // token_bytes)
    chunks = zip(torch.split(token_n, step), torch.split(weight_n, step), strict=True)
    return list(chunks)
