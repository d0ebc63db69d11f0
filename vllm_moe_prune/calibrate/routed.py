"""What one forward pass sums about routing, expert outputs and whole sublayers.

Axes: N tokens, n some of them, D hidden, E experts, K top-k, H hidden states (layers
+ 1), m sampled tokens.
"""

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from ..checkpoint.reader import Expert
from .expert_forward import Activation, Read, Routing, expert_hidden, place, scores_of
from .stats import Array, LayerStats

SCORES = frozenset({"score_full_sum_E", "score_selected_sum_E"})
CONTRIBUTIONS = frozenset({"weighted_norm_sum_E", "weighted_sqnorm_sum_E"})
COSINES = frozenset({"moe_cosine_sum", "moe_only_cosine_sum"})
BLOCKS = frozenset({"block_cosine_HH", "block_tokens"})
OUTPUTS = frozenset({"output_sqdist_EE", "output_sqnorm_E", "contribution_gram_EE"})
FIELDS = SCORES | CONTRIBUTIONS | COSINES | BLOCKS | OUTPUTS
"""What this file measures; the counts are in ``measure``."""

# Tokens processed at once; every sum over them is exact enough in fp32.
CHUNK = 1 << 13
SAMPLED_TOKENS = 1024
# Of all experts' outputs for the sampled tokens; fewer tokens where these are many.
OUTPUT_BYTES = 1 << 30


def with_scores(found: LayerStats, routing: Routing) -> LayerStats:
    """Add the sums of routing scores, over all tokens and over the selected ones."""
    full_E = torch.zeros(routing.logits_NR.shape[1], dtype=torch.float64)
    selected_E = torch.zeros_like(full_E)
    for start in range(0, len(routing.ids_NK), CHUNK):
        rows = slice(start, start + CHUNK)
        probs_nE = scores_of(routing.logits_NR[rows], routing.scores)
        # Experts that a token did not choose score 0 for it.
        chosen_nE = torch.zeros_like(probs_nE)
        ids_nK = routing.ids_NK[rows]
        chosen_nE.scatter_(1, ids_nK, probs_nE.gather(1, ids_nK))
        full_E += probs_nE.sum(0, dtype=torch.float64).cpu()
        selected_E += chosen_nE.sum(0, dtype=torch.float64).cpu()
    return replace(
        found,
        score_full_sum_E=full_E.numpy(),
        score_selected_sum_E=selected_E.numpy(),
    )


class Contributions:
    """Sums of the norms of weighted expert outputs; a visitor of ``run_experts``."""

    def __init__(self, experts: int) -> None:
        """All sums start at zero."""
        self.norm_E: Array = np.zeros(experts)
        self.sqnorm_E: Array = np.zeros(experts)

    def __call__(self, expert: int, output_nD: torch.Tensor) -> None:
        """Take in one expert's weighted outputs for some of its tokens."""
        # Squares of bf16 outputs overflow nothing in fp32; their sum goes to fp64.
        squares_n = output_nD.float().square().sum(1)
        self.sqnorm_E[expert] += float(squares_n.sum(dtype=torch.float64))
        self.norm_E[expert] += float(squares_n.sqrt().sum(dtype=torch.float64))

    def added_to(self, found: LayerStats) -> LayerStats:
        """The statistics with these sums in them."""
        return replace(
            found,
            weighted_norm_sum_E=self.norm_E,
            weighted_sqnorm_sum_E=self.sqnorm_E,
        )


def with_cosines(
    found: LayerStats,
    hidden_ND: torch.Tensor,
    x_ND: torch.Tensor,
    out_ND: torch.Tensor,
) -> LayerStats:
    """Add how little the MoE sublayer changes: with its norm (Eq. 9), without (Eq. 8).

    Args:
        found: The statistics so far.
        hidden_ND: The residual stream before the norm, x'.
        x_ND: Norm(x').
        out_ND: MoE(Norm(x')).
    """
    with_norm = only_moe = 0.0
    for start in range(0, len(x_ND), CHUNK):
        rows = slice(start, start + CHUNK)
        before_nD, moe_nD = hidden_ND[rows].float(), out_ND[rows].float()
        with_norm += _cosines(before_nD, before_nD + moe_nD)
        only_moe += _cosines(x_ND[rows].float(), moe_nD)
    return replace(
        found,
        moe_cosine_sum=np.array(with_norm),
        moe_only_cosine_sum=np.array(only_moe),
    )


def _cosines(one_nD: torch.Tensor, two_nD: torch.Tensor) -> float:
    cosine_n = functional.cosine_similarity(one_nD, two_nD, dim=-1)
    return float(cosine_n.sum(dtype=torch.float64))


class BlockSamples:
    """Hidden states of evenly spaced tokens at every block boundary."""

    def __init__(self) -> None:
        """No boundary has been seen."""
        self._states: list[torch.Tensor] = []

    def add(self, hidden_STD: torch.Tensor) -> None:
        """Take in the next boundary: before the first block, then behind each."""
        hidden_ND = hidden_STD.flatten(0, 1)
        at_m = _sampled(len(hidden_ND), SAMPLED_TOKENS).to(hidden_ND.device)
        state_mD = hidden_ND.index_select(0, at_m).float()
        # Unit vectors, so that one matrix product gives all cosines.
        self._states.append(functional.normalize(state_mD, dim=-1).cpu())

    def sums(self) -> tuple[Array, Array]:
        """Sums of cosines between all pairs of boundaries, and the tokens behind."""
        # The sum of cosines over m tokens is one dot product of the concatenated unit
        # vectors.
        states_HM = torch.stack([state.flatten() for state in self._states])
        cosine_HH = (states_HM @ states_HM.T).double().numpy()
        return cosine_HH, np.array(float(len(self._states[0])))


def with_outputs(
    found: LayerStats,
    x_ND: torch.Tensor,
    routing: Routing,
    experts: int,
    read: Read,
    act: Activation,
) -> LayerStats:
    """Add what all experts give for the same sampled tokens, whoever was chosen.

    Args:
        found: The statistics so far.
        x_ND: What enters the MoE sublayer.
        routing: Whom it chose: contributions are outputs times its weights.
        experts: How many there are.
        read: Gives an expert's weights; called once each.
        act: The activation between gate and up.
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
    outer_EE = torch.zeros(experts, experts, dtype=torch.float64, device=x_ND.device)
    gram_EE = torch.zeros_like(outer_EE)
    # Token by token: [E, E] per token, never [m, E, E].
    for token, weight_E in enumerate(weights_mE.double()):
        output_ED = outputs_EmD[:, token].float()
        product_EE = (output_ED @ output_ED.T).double()
        outer_EE += product_EE
        gram_EE += weight_E[:, None] * product_EE * weight_E
    squares_E = outer_EE.diagonal()
    # |a - b|^2 = |a|^2 + |b|^2 - 2 ab; cancellation may leave a tiny negative number.
    sqdist_EE = squares_E[:, None] + squares_E - 2.0 * outer_EE
    # Mirrored, so that both triangles are equal to the bit and ties stay ties.
    sqdist_EE = torch.triu(sqdist_EE.clamp(min=0.0), 1)
    return replace(
        found,
        output_sqdist_EE=(sqdist_EE + sqdist_EE.T).cpu().numpy(),
        output_sqnorm_E=squares_E.cpu().numpy().copy(),
        contribution_gram_EE=gram_EE.cpu().numpy(),
    )


def _output(x_mD: torch.Tensor, expert: Expert, act: Activation) -> torch.Tensor:
    return functional.linear(expert_hidden(x_mD, expert, act), expert.down_DF)


def _sampled(tokens: int, most: int) -> torch.Tensor:
    """Evenly spaced tokens, the first and the last among them."""
    count = min(most, tokens)
    at_m = torch.linspace(0, tokens - 1, count, dtype=torch.float64)
    return at_m.round().long()
