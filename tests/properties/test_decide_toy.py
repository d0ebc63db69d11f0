"""A toy model with its statistics summed token by token, and what they must satisfy.

Other tests of ``decide`` import it: their references look at tokens, the decisions
only at sums.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.decide.cut_plan import ModelId
from vllm_moe_prune.decide.facts import LayerFacts, Matrix, ModelFacts
from vllm_moe_prune.decide.similarity import Array

SEEDS = st.integers(0, 2**32 - 1)
ROWS, COLS = 12, 16
MODEL = ModelId(model_type="mixtral", fingerprint="f" * 64, source="toy")


def cosine(one: Array, two: Array) -> float:
    return float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))


@dataclass(frozen=True)
class ToyLayer:
    """T tokens through one MoE layer with E experts, top-K, D dimensions."""

    x_TD: Array
    router_ED: Array
    weights_EP: Array
    outputs_TED: Array
    scores_TE: Array
    gates_TE: Array
    """Renormalized top-K weights, zero elsewhere."""

    @property
    def contributions_TED(self) -> Array:
        return np.asarray(self.gates_TE[:, :, None] * self.outputs_TED)

    @property
    def stats(self) -> LayerStats:
        tokens, experts = self.gates_TE.shape
        chosen_TE = (self.gates_TE > 0).astype(float)
        pairs_EE = chosen_TE.T @ chosen_TE
        np.fill_diagonal(pairs_EE, 0.0)
        norms_TE = np.linalg.norm(self.contributions_TED, axis=-1)
        own_TE = np.linalg.norm(self.outputs_TED, axis=-1)
        apart_TEED = self.outputs_TED[:, :, None] - self.outputs_TED[:, None]
        after_TD = self.x_TD + self.contributions_TED.sum(1)
        return LayerStats(
            router_sqdist_EE=squared_distances(self.router_ED),
            router_norm=np.array(np.linalg.norm(self.router_ED)),
            router_row_norm_E=np.linalg.norm(self.router_ED, axis=1),
            weight_sqdist_EE=squared_distances(self.weights_EP),
            tokens=np.array(float(tokens)),
            routed_E=chosen_TE.sum(0),
            coactivation_EE=pairs_EE,
            score_full_sum_E=self.scores_TE.sum(0),
            score_selected_sum_E=(self.scores_TE * chosen_TE).sum(0),
            weighted_norm_sum_E=norms_TE.sum(0),
            weighted_sqnorm_sum_E=(norms_TE**2).sum(0),
            activation_norm_sum_E=(own_TE * chosen_TE).sum(0),
            activation_sqnorm_sum_E=(own_TE**2 * chosen_TE).sum(0),
            activation_max_E=(np.abs(self.outputs_TED).max(-1) * chosen_TE).max(0),
            contribution_gram_EE=np.einsum(
                "tid,tjd->ij", self.contributions_TED, self.contributions_TED
            ),
            output_sqdist_EE=(apart_TEED**2).sum((0, -1)),
            output_sqnorm_E=(self.outputs_TED**2).sum((0, -1)),
            output_sum_ED=(self.outputs_TED * chosen_TE[:, :, None]).sum(0),
            moe_cosine_sum=np.array(
                sum(map(cosine, self.x_TD, after_TD))  # the toy has no norm
            ),
            moe_only_cosine_sum=np.array(
                sum(map(cosine, self.x_TD, self.contributions_TED.sum(1)))
            ),
            owl_outliers_E=np.arange(experts, dtype=float) % 5,
            owl_m=np.array(3.0),
        )


def squared_distances(x_EP: Array) -> Array:
    gaps_EEP = x_EP[:, None] - x_EP[None]
    return np.asarray((gaps_EEP**2).sum(-1), dtype=np.float64)


def toy_layer(
    rng: np.random.Generator, experts: int, top_k: int = 2, tokens: int = 20
) -> ToyLayer:
    size = 5
    x_TD = rng.normal(size=(tokens, size))
    router_ED = rng.normal(size=(experts, size))
    logits_TE = x_TD @ router_ED.T
    scores_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
    ids_TK = np.argsort(-scores_TE, axis=1, kind="stable")[:, :top_k]
    gates_TE = np.zeros_like(scores_TE)
    np.put_along_axis(gates_TE, ids_TK, np.take_along_axis(scores_TE, ids_TK, 1), 1)
    gates_TE /= gates_TE.sum(1, keepdims=True)
    maps_EDD = rng.normal(size=(experts, size, size))
    return ToyLayer(
        x_TD=x_TD,
        router_ED=router_ED,
        weights_EP=maps_EDD.reshape(experts, -1),
        outputs_TED=np.einsum("td,ide->tie", x_TD, maps_EDD),
        scores_TE=scores_TE,
        gates_TE=gates_TE,
    )


def toy_facts(*experts: int, top_k: int = 2) -> ModelFacts:
    """A model with attention in every layer; 0 experts make a dense layer."""
    layers = []
    attention = Matrix("self_attn.q_proj.weight", "attention", COLS, COLS)
    for count in experts:
        if not count:
            dense = Matrix("mlp.up_proj.weight", "mlp", ROWS, COLS)
            total = COLS * (COLS + ROWS) + 2 * COLS
            layers.append(
                LayerFacts(
                    num_experts=0,
                    top_k=top_k,
                    has_moe=False,
                    parameters=total,
                    others=(attention, dense),
                )
            )
            continue
        shared = Matrix("mlp.shared.up_proj.weight", "shared", ROWS, COLS)
        moe = count * (3 * ROWS * COLS + COLS) + ROWS * COLS + COLS
        layers.append(
            LayerFacts(
                num_experts=count,
                top_k=top_k,
                has_moe=True,
                parameters=moe + COLS * COLS + COLS,
                moe_parameters=moe,
                expert_shapes=((ROWS, COLS), (ROWS, COLS), (COLS, ROWS)),
                router_parameters_per_expert=COLS,
                moe_norm_parameters=COLS,
                expert_names=("mlp.{expert}.w1", "mlp.{expert}.w3", "mlp.{expert}.w2"),
                others=(attention, shared),
            )
        )
    total = sum(layer.parameters for layer in layers) + 100
    return ModelFacts(MODEL, tuple(layers), total)


def toy_stats(rng: np.random.Generator, *experts: int, top_k: int = 2) -> Stats:
    """Statistics of ``toy_facts``, with hidden states that are not the layers' own."""
    hidden_HTD = rng.normal(size=(len(experts) + 1, 30, 4)).cumsum(0)
    return Stats(
        fingerprint=MODEL.fingerprint,
        layers={
            at: toy_layer(rng, count, top_k).stats
            for at, count in enumerate(experts)
            if count
        },
        block_cosine_HH=hidden_cosines(hidden_HTD),
        block_tokens=np.array(30.0),
    )


def hidden_cosines(hidden_HTD: Array) -> Array:
    count = len(hidden_HTD)
    sums_HH = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            sums_HH[i, j] = sum(map(cosine, hidden_HTD[i], hidden_HTD[j]))
    return sums_HH


@settings(max_examples=20)
@given(seed=SEEDS, experts=st.integers(2, 6), parts=st.integers(1, 19))
def test_statistics_of_parts_add_up(seed: int, experts: int, parts: int) -> None:
    """Measured on two machines, or on one: the same sums."""
    layer = toy_layer(np.random.default_rng(seed), experts)
    whole = Stats(fingerprint="f", layers={0: layer.stats}, block_tokens=np.array(20.0))

    def part(tokens: slice) -> Stats:
        some = ToyLayer(
            layer.x_TD[tokens],
            layer.router_ED,
            layer.weights_EP,
            layer.outputs_TED[tokens],
            layer.scores_TE[tokens],
            layer.gates_TE[tokens],
        )
        count = np.array(float(len(some.x_TD)))
        return Stats(fingerprint="f", layers={0: some.stats}, block_tokens=count)

    added = part(slice(parts)) + part(slice(parts, None))
    for name, value in vars(whole.layers[0]).items():
        found = getattr(added.layers[0], name)
        assert (found is None) == (value is None)
        assert value is None or np.allclose(found, value), name
    assert added.block_tokens == whole.block_tokens
