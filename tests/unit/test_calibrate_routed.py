"""The sums behind criteria and layer metrics, against loops written from formulas."""

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate import routed
from vllm_moe_prune.calibrate.accumulate import measure
from vllm_moe_prune.calibrate.data import Tokens, sha256_of
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.stats import Stats
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_expert
from vllm_moe_prune.checkpoint.source import open_checkpoint

LAYERS, EXPERTS = 3, 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("routed") / "model"
    return open_checkpoint(
        tiny_checkpoint(folder, layers=LAYERS, experts=EXPERTS, dtype="float32")
    )


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 500, (3, 11), generator=generator)
    return Tokens(ids_ST=ids, source="random", sha256=sha256_of(ids))


@pytest.fixture(scope="module")
def stats(checkpoint: Checkpoint, tokens: Tokens) -> Stats:
    return measure(checkpoint, tokens=tokens, fields=routed.FIELDS)


def naive(checkpoint: Checkpoint, tokens: Tokens) -> tuple[list[dict], list]:
    """Per layer the sums, token by token; and the hidden states of every boundary."""
    model = StreamingModel(checkpoint)
    hidden = model.embed(tokens.ids_ST)
    states, sums = [hidden.flatten(0, 1).clone()], []
    for layer in checkpoint.layers:
        hidden, x = model.enter(layer.index, hidden)
        assert x is not None
        before = hidden.flatten(0, 1).clone()
        routing = model.route(layer, x)
        found = {
            "full": torch.zeros(EXPERTS, dtype=torch.float64),
            "selected": torch.zeros(EXPERTS, dtype=torch.float64),
            "norm": torch.zeros(EXPERTS, dtype=torch.float64),
            "sqnorm": torch.zeros(EXPERTS, dtype=torch.float64),
            "own_norm": torch.zeros(EXPERTS, dtype=torch.float64),
            "own_sqnorm": torch.zeros(EXPERTS, dtype=torch.float64),
            "own_max": torch.zeros(EXPERTS, dtype=torch.float64),
            "with_norm": 0.0,
            "only_moe": 0.0,
        }
        for t in range(len(x)):
            probs = torch.softmax(routing.logits_NR[t].double(), dim=0)
            found["full"] += probs
            out = torch.zeros_like(x[t])
            for expert, weight in zip(
                routing.ids_NK[t].tolist(), routing.weights_NK[t], strict=True
            ):
                gate, up, down = read_expert(checkpoint, layer, expert)
                inner = torch.nn.functional.silu(gate @ x[t]) * (up @ x[t])
                output = (down @ inner).double()
                found["own_norm"][expert] += output.norm()
                found["own_sqnorm"][expert] += output.norm() ** 2
                most = max(float(found["own_max"][expert]), float(output.abs().max()))
                found["own_max"][expert] = most
                part = weight * (down @ inner)
                out += part
                found["selected"][expert] += probs[expert]
                found["norm"][expert] += part.double().norm()
                found["sqnorm"][expert] += part.double().norm() ** 2
            found["with_norm"] += float(cosine(before[t], before[t] + out))
            found["only_moe"] += float(cosine(x[t], out))
            hidden.view(-1, hidden.shape[-1])[t] += out
        sums.append(found)
        states.append(hidden.flatten(0, 1).clone())
    return sums, states


def cosine(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    one, two = one.double(), two.double()
    return one @ two / (one.norm() * two.norm())


def test_sums_equal_loops_over_tokens_in_every_layer(
    checkpoint: Checkpoint, tokens: Tokens, stats: Stats
) -> None:
    sums, _ = naive(checkpoint, tokens)
    for index, expected in enumerate(sums):
        found = stats.layers[index]
        for name, value in (
            ("score_full_sum_E", expected["full"]),
            ("score_selected_sum_E", expected["selected"]),
            ("weighted_norm_sum_E", expected["norm"]),
            ("weighted_sqnorm_sum_E", expected["sqnorm"]),
            ("activation_norm_sum_E", expected["own_norm"]),
            ("activation_sqnorm_sum_E", expected["own_sqnorm"]),
            ("activation_max_E", expected["own_max"]),
            ("moe_cosine_sum", expected["with_norm"]),
            ("moe_only_cosine_sum", expected["only_moe"]),
        ):
            measured = torch.as_tensor(getattr(found, name))
            torch.testing.assert_close(
                measured, torch.as_tensor(value).double(), rtol=1e-4, atol=1e-6
            )


def test_outputs_are_of_all_experts_and_contributions_of_the_chosen(
    checkpoint: Checkpoint, tokens: Tokens, stats: Stats
) -> None:
    model = StreamingModel(checkpoint)
    hidden = model.embed(tokens.ids_ST)
    for layer in checkpoint.layers:
        hidden, x = model.enter(layer.index, hidden)
        assert x is not None
        routing = model.route(layer, x)
        outputs = []
        for number in range(EXPERTS):
            gate, up, down = read_expert(checkpoint, layer, number)
            inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
            outputs.append((inner @ down.T).double())
        sqdist = [[float((a - b).square().sum()) for b in outputs] for a in outputs]
        weights = torch.zeros(len(x), EXPERTS, dtype=torch.float64)
        for t in range(len(x)):
            for expert, weight in zip(
                routing.ids_NK[t].tolist(), routing.weights_NK[t], strict=True
            ):
                weights[t, expert] = weight
        parts = [weights[:, [i]] * out for i, out in enumerate(outputs)]
        gram = [[float((a * b).sum()) for b in parts] for a in parts]
        found = stats.layers[layer.index]
        for value, expected in (
            (found.output_sqdist_EE, sqdist),
            (found.contribution_gram_EE, gram),
            (found.output_sqnorm_E, [float(out.square().sum()) for out in outputs]),
        ):
            torch.testing.assert_close(
                torch.as_tensor(value),
                torch.tensor(expected, dtype=torch.float64),
                rtol=1e-4,
                atol=1e-6,
            )
        # The diagonal of the Gram matrix is the removal loss of single experts.
        torch.testing.assert_close(
            torch.as_tensor(found.contribution_gram_EE).diagonal(),
            torch.as_tensor(found.weighted_sqnorm_sum_E),
            rtol=1e-4,
            atol=1e-6,
        )
        out = sum(parts)
        hidden += out.float().view_as(hidden)


def test_block_cosines_pair_every_two_boundaries(
    checkpoint: Checkpoint, tokens: Tokens, stats: Stats
) -> None:
    _, states = naive(checkpoint, tokens)
    assert stats.block_cosine_HH is not None
    assert stats.block_cosine_HH.shape == (LAYERS + 1, LAYERS + 1)
    assert stats.block_tokens is not None
    assert stats.block_tokens == tokens.ids_ST.numel()
    for i, one in enumerate(states):
        for j, two in enumerate(states):
            expected = sum(cosine(a, b) for a, b in zip(one, two, strict=True))
            assert stats.block_cosine_HH[i, j] == pytest.approx(float(expected), 1e-4)


def test_router_row_norms_need_no_data(checkpoint: Checkpoint, stats: Stats) -> None:
    for layer in checkpoint.layers:
        rows = checkpoint.tensors[checkpoint.layout.router.name(layer.index)]
        assert rows.shape[0] == EXPERTS
        data_free = measure(checkpoint).layers[layer.index].router_row_norm_E
        assert data_free is not None
        assert (data_free == stats.layers[layer.index].router_row_norm_E).all()


def test_everything_takes_one_forward_pass(stats: Stats) -> None:
    assert stats.forward_passes == 1


def test_only_what_was_asked_for_is_measured(
    checkpoint: Checkpoint, tokens: Tokens
) -> None:
    found = measure(checkpoint, tokens=tokens, fields=routed.SCORES)
    assert found.block_cosine_HH is None
    for layer in found.layers.values():
        assert layer.score_full_sum_E is not None
        assert layer.weighted_norm_sum_E is None
        assert layer.moe_cosine_sum is None


def test_blocks_sample_evenly_from_long_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "SAMPLED_TOKENS", 3)
    samples = routed.BlockSamples(routed.Sources(torch.zeros(5, dtype=torch.int64), 1))
    hidden = torch.eye(5).view(1, 5, 5)
    samples.add(hidden)
    samples.add(hidden.flip(1))
    cosine_HH, count = samples.sums()
    assert count == 3
    # Tokens 0, 2 and 4: only the middle one is its own mirror image.
    assert cosine_HH.tolist() == [[3.0, 1.0], [1.0, 3.0]]


def test_criteria_plan_from_what_measure_collects(
    checkpoint: Checkpoint, tokens: Tokens, tmp_path: Path
) -> None:
    from vllm_moe_prune import pipeline
    from vllm_moe_prune.recipes.schema import parse_recipe

    for criterion in (
        "routing-score",
        "routing-score-selected",
        "frequency",
        "reap",
        "man",
        "msan",
        "total-output",
        "router-norm",
        "removal-loss",
        "random",
    ):
        recipe = parse_recipe(
            {
                "experts": {"method": "score", "criterion": criterion, "drop": 0.25},
                "slim": {"method": "none"},
            },
            criterion,
        )
        options = pipeline.RunOptions()
        measured = pipeline.measure(checkpoint, recipe, tokens, options)
        plan = pipeline.plan(checkpoint, recipe, measured)
        assert sum(len(layer.keep) for layer in plan.layers) == 9
