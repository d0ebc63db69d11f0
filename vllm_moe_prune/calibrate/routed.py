"""What one forward pass sums about routing, expert outputs and whole sublayers.

Everything is summed for each source of the text by itself, so that another mix of them
needs no other pass; sums come with the sources as their first axis.

Axes: Q sources, N tokens, n some of them, D hidden, E experts, K top-k, H hidden states
(layers + 1), m sampled tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from ..checkpoint.reader import Expert
from .expert_forward import (
    Activation,
    Routing,
    Served,
    expert_hidden,
    place,
    scores_of,
)
from .read_ahead import Read
from .stats import Array

SCORES = frozenset({"score_full_sum_E", "score_selected_sum_E"})
CONTRIBUTIONS = frozenset(
    {
        "weighted_norm_sum_E",
        "weighted_sqnorm_sum_E",
        "activation_norm_sum_E",
        "activation_sqnorm_sum_E",
        "activation_max_E",
    }
)
COSINES = frozenset({"moe_cosine_sum", "moe_only_cosine_sum"})
BLOCKS = frozenset({"block_cosine_HH", "block_tokens"})
OUTPUTS = frozenset({"output_sqdist_EE", "output_sqnorm_E", "contribution_gram_EE"})
OUTPUT_SUMS = frozenset({"output_sum_ED"})
FIELDS = SCORES | CONTRIBUTIONS | COSINES | BLOCKS | OUTPUTS | OUTPUT_SUMS
"""What this file measures on request; counts are always taken."""

# Tokens processed at once; every sum over them is exact enough in fp32.
CHUNK = 1 << 13
# Counts of at most this many tokens are exact in fp32; sums of them are fp64.
COUNT_TOKENS = 1 << 16
SAMPLED_TOKENS = 1024
# Of all experts' outputs for the sampled tokens; fewer tokens where these are many.
OUTPUT_BYTES = 1 << 30

Sums = dict[str, Array]
"""By the names of ``LayerStats``, each with the sources as its first axis."""


@dataclass(frozen=True)
class Sources:
    """Which source each token is of."""

    of_N: torch.Tensor
    """int64, 0 to ``count`` - 1."""
    count: int

    def total(self, values_n: torch.Tensor, at_n: torch.Tensor | slice) -> Array:
        """Sums of some tokens' values by their source, [Q] or [Q, ...], in fp64."""
        if self.count == 1:
            return values_n.sum(0, dtype=torch.float64)[None].cpu().numpy()
        of_n = self.of_N[at_n]
        # One source after the other: index_add_ would not repeat on CUDA.
        sums = [
            values_n[of_n == source].sum(0, dtype=torch.float64)
            for source in range(self.count)
        ]
        return torch.stack(sums).cpu().numpy()

    def largest(self, values_n: torch.Tensor, at_n: torch.Tensor) -> Array:
        """The largest of some tokens' values by their source, 0 without tokens, [Q]."""
        of_n = self.of_N[at_n]
        most_Q = np.zeros(self.count)
        for source in range(self.count):
            own_n = values_n[of_n == source]
            most_Q[source] = float(own_n.max()) if len(own_n) else 0.0
        return most_Q


def counted(routing: Routing, experts: int, sources: Sources) -> Sums:
    """How many tokens there were, chose each expert, and chose each pair of them."""
    pairs_QEE = np.zeros((sources.count, experts, experts))
    tokens_Q = torch.bincount(sources.of_N, minlength=sources.count).double()
    for source in range(sources.count):
        ids_NK = routing.ids_NK
        if sources.count > 1:
            ids_NK = ids_NK[sources.of_N == source]
        for ids_nK in torch.split(ids_NK, COUNT_TOKENS):
            chosen_nE = torch.zeros(len(ids_nK), experts, device=ids_nK.device)
            chosen_nE.scatter_(1, ids_nK, 1.0)
            pairs_QEE[source] += (chosen_nE.T @ chosen_nE).double().cpu().numpy()
    # Pairs of an expert with itself are the tokens that chose it.
    routed_QE = pairs_QEE.diagonal(axis1=1, axis2=2).copy()
    for pairs_EE in pairs_QEE:
        np.fill_diagonal(pairs_EE, 0.0)
    return {
        "tokens": tokens_Q.cpu().numpy(),
        "routed_E": routed_QE,
        "coactivation_EE": pairs_QEE,
    }


def scores(routing: Routing, sources: Sources) -> Sums:
    """Sums of routing scores, over all tokens and over the selected ones."""
    full_QE: Array = np.zeros((sources.count, routing.logits_NR.shape[1]))
    selected_QE = np.zeros_like(full_QE)
    for start in range(0, len(routing.ids_NK), CHUNK):
        rows = slice(start, start + CHUNK)
        probs_nE = scores_of(routing.logits_NR[rows], routing.scores)
        # Experts that a token did not choose score 0 for it.
        chosen_nE = torch.zeros_like(probs_nE)
        ids_nK = routing.ids_NK[rows]
        chosen_nE.scatter_(1, ids_nK, probs_nE.gather(1, ids_nK))
        full_QE += sources.total(probs_nE, rows)
        selected_QE += sources.total(chosen_nE, rows)
    return {"score_full_sum_E": full_QE, "score_selected_sum_E": selected_QE}


class Contributions:
    """Norms of expert outputs, with the router's weight and without; a visitor of
    ``run_experts``."""

    def __init__(self, experts: int, sources: Sources) -> None:
        """All sums start at zero."""
        self._sources = sources
        self.sums: Sums = {
            name: np.zeros((sources.count, experts)) for name in CONTRIBUTIONS
        }

    def __call__(self, expert: int, served: Served) -> None:
        """Take in one expert's outputs for some of its tokens."""
        at_n, sources = served.token_n, self._sources
        for kind, output_nD in (
            ("weighted", served.scaled_nD),
            ("activation", served.down_nD),
        ):
            # Squares of bf16 outputs overflow nothing in fp32; their sum goes to fp64.
            squares_n = output_nD.float().square().sum(1)
            sqnorm_Q = sources.total(squares_n, at_n)
            self.sums[f"{kind}_sqnorm_sum_E"][:, expert] += sqnorm_Q
            norm_Q = sources.total(squares_n.sqrt(), at_n)
            self.sums[f"{kind}_norm_sum_E"][:, expert] += norm_Q
        most_QE = self.sums["activation_max_E"]
        most_Q = sources.largest(served.down_nD.abs().amax(1), at_n)
        most_QE[:, expert] = np.maximum(most_QE[:, expert], most_Q)


class OutputSums:
    """Sums of what experts gave for their own tokens; a visitor of ``run_experts``.

    Of all sources together: an [E, D] of each would not fit beside the others.
    """

    def __init__(self, experts: int, hidden: int) -> None:
        """All sums start at zero."""
        self._sum_ED: Array = np.zeros((experts, hidden))

    def __call__(self, expert: int, served: Served) -> None:
        """Take in one expert's outputs for some of its tokens."""
        sum_D = served.down_nD.sum(0, dtype=torch.float64)
        self._sum_ED[expert] += sum_D.cpu().numpy()

    @property
    def sums(self) -> Sums:
        """As if there were one source."""
        return {"output_sum_ED": self._sum_ED[None]}


def cosines(
    hidden_ND: torch.Tensor, x_ND: torch.Tensor, out_ND: torch.Tensor, sources: Sources
) -> Sums:
    """How little the MoE sublayer changes: with its norm (Eq. 9), without (Eq. 8).

    Args:
        hidden_ND: The residual stream before the norm, x'.
        x_ND: Norm(x').
        out_ND: MoE(Norm(x')).
        sources: Which source each token is of.
    """
    with_norm_Q, only_moe_Q = np.zeros(sources.count), np.zeros(sources.count)
    for start in range(0, len(x_ND), CHUNK):
        rows = slice(start, start + CHUNK)
        before_nD, moe_nD = hidden_ND[rows].float(), out_ND[rows].float()
        with_norm_Q += sources.total(_cosine(before_nD, before_nD + moe_nD), rows)
        only_moe_Q += sources.total(_cosine(x_ND[rows].float(), moe_nD), rows)
    return {"moe_cosine_sum": with_norm_Q, "moe_only_cosine_sum": only_moe_Q}


def _cosine(one_nD: torch.Tensor, two_nD: torch.Tensor) -> torch.Tensor:
    return functional.cosine_similarity(one_nD, two_nD, dim=-1)


class BlockSamples:
    """Hidden states of evenly spaced tokens at every block boundary."""

    def __init__(self, sources: Sources) -> None:
        """No boundary has been seen."""
        self._at_m = _sampled(len(sources.of_N), SAMPLED_TOKENS)
        self._of_m = sources.of_N.cpu()[self._at_m]
        self._states: list[torch.Tensor] = []

    def add(self, hidden_STD: torch.Tensor) -> None:
        """Take in the next boundary: before the first block, then behind each."""
        hidden_ND = hidden_STD.flatten(0, 1)
        at_m = self._at_m.to(hidden_ND.device)
        state_mD = hidden_ND.index_select(0, at_m).float()
        # Unit vectors, so that one matrix product gives all cosines.
        self._states.append(functional.normalize(state_mD, dim=-1).cpu())

    def sums(self, source: int | None = None) -> tuple[Array, Array]:
        """Sums of cosines between all pairs of boundaries, and the tokens behind.

        Args:
            source: Of its tokens alone.
        """
        states = self._states
        if source is not None:
            states = [state_mD[self._of_m == source] for state_mD in states]
        # The sum of cosines over m tokens is one dot product of the concatenated unit
        # vectors.
        states_HM = torch.stack([state.flatten() for state in states])
        cosine_HH = (states_HM @ states_HM.T).double().numpy()
        return cosine_HH, np.array(float(len(states[0])))


def outputs(
    x_ND: torch.Tensor,
    routing: Routing,
    experts: int,
    read: Read,
    act: Activation,
    sources: Sources,
) -> Sums:
    """What all experts give for the same sampled tokens, whoever was chosen.

    Args:
        x_ND: What enters the MoE sublayer.
        routing: Whom it chose: contributions are outputs times its weights.
        experts: How many there are.
        read: Gives an expert's weights; called once each.
        act: The activation between gate and up.
        sources: Which source each token is of.
    """
    # [E, m, D] is in memory at once; DeepSeek-V3 has 256 experts.
    most = OUTPUT_BYTES // (experts * x_ND.shape[1] * x_ND.element_size())
    at_m = _sampled(len(x_ND), min(SAMPLED_TOKENS, max(1, most))).to(x_ND.device)
    x_mD = x_ND.index_select(0, at_m)
    outputs_EmD = torch.stack(
        [_output(x_mD, place(read(expert), x_mD), act) for expert in range(experts)]
    )
    weights_mE = torch.zeros(len(at_m), experts, device=x_ND.device)
    weights_mE.scatter_(1, routing.ids_NK[at_m], routing.weights_NK[at_m].float())
    size = (sources.count, experts, experts)
    outer_QEE = torch.zeros(size, dtype=torch.float64, device=x_ND.device)
    gram_QEE = torch.zeros_like(outer_QEE)
    of_m = sources.of_N[at_m].tolist()
    # Token by token: [E, E] per token, never [m, E, E].
    for token, weight_E in enumerate(weights_mE.double()):
        output_ED = outputs_EmD[:, token].float()
        product_EE = (output_ED @ output_ED.T).double()
        outer_QEE[of_m[token]] += product_EE
        gram_QEE[of_m[token]] += weight_E[:, None] * product_EE * weight_E
    squares_QE = outer_QEE.diagonal(dim1=1, dim2=2)
    # |a - b|^2 = |a|^2 + |b|^2 - 2 ab; cancellation may leave a tiny negative number.
    sqdist_QEE = squares_QE[:, :, None] + squares_QE[:, None] - 2.0 * outer_QEE
    # Mirrored, so that both triangles are equal to the bit and ties stay ties.
    sqdist_QEE = torch.triu(sqdist_QEE.clamp(min=0.0), 1)
    return {
        "output_sqdist_EE": (sqdist_QEE + sqdist_QEE.mT).cpu().numpy(),
        "output_sqnorm_E": squares_QE.cpu().numpy().copy(),
        "contribution_gram_EE": gram_QEE.cpu().numpy(),
    }


def _output(x_mD: torch.Tensor, expert: Expert, act: Activation) -> torch.Tensor:
    return functional.linear(expert_hidden(x_mD, expert, act), expert.down_DF)


def _sampled(tokens: int, most: int) -> torch.Tensor:
    """Evenly spaced tokens, the first and the last among them."""
    count = min(most, tokens)
    at_m = torch.linspace(0, tokens - 1, count, dtype=torch.float64)
    return at_m.round().long()
