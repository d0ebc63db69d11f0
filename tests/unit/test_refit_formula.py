"""Refitted projections against the formula, written out, and the windows that judge.

Axes: N tokens, D hidden, F expert width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.reference import LayerCut
from tests.refitting import HALF, model, plan_of, run, some_tokens
from vllm_moe_prune.calibrate.data import Tokens
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import run_layer
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_expert
from vllm_moe_prune.cut.layer_cut import layer_cuts
from vllm_moe_prune.cut.refit_layer import RIDGES, SWEEPS, fit_windows, refit_layer
from vllm_moe_prune.errors import CalibrationError
from vllm_moe_prune.slim.ridge import Ridge


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return model(tmp_path_factory.mktemp("refit") / "model")


@dataclass
class Naive:
    """Block-coordinate ridge regression, dense and in float64."""

    features: list[Tensor]
    """Of each expert [N, F]; 0 where it is not chosen."""
    downs: list[Tensor]
    target_ND: Tensor
    fitted_N: Tensor
    share_N1: Tensor
    """1 / RMS of what is wanted behind the layer, 1 on average."""

    def refitted(self, ridge: float, sweeps: int) -> list[Tensor]:
        downs = [down.clone() for down in self.downs]
        for _ in range(sweeps):
            for at, feature_NF in enumerate(self.features):
                others = sum(
                    feature @ down.T
                    for number, (feature, down) in enumerate(
                        zip(self.features, downs, strict=True)
                    )
                    if number != at
                )
                seen = (self.share_N1 * feature_NF)[self.fitted_N]
                missing = self.target_ND - others
                wanted = (self.share_N1 * missing)[self.fitted_N]
                gram = seen.T @ seen
                pull = ridge * gram.diagonal().mean()
                # (G + pull I) W' = F'T + pull W0'
                left = gram + pull * torch.eye(len(gram), dtype=gram.dtype)
                right = seen.T @ wanted + pull * self.downs[at].T
                downs[at] = torch.linalg.solve(left, right).T
        return downs

    def errors(self, downs: list[Tensor], judged: list[Tensor]) -> list[float]:
        given = sum(f @ down.T for f, down in zip(self.features, downs, strict=True))
        missing = self.target_ND - given
        ratios = [
            float(
                (self.share_N1 * missing)[rows].square().sum()
                / (self.share_N1 * self.target_ND)[rows].square().sum()
            )
            for rows in judged
        ]
        return [math.prod(ratios) ** (1 / len(ratios))]

    def best(self, judged: list[Tensor]) -> float:
        before = self.errors(self.downs, judged)

        def worst(ridge: float) -> float:
            after = self.errors(self.refitted(ridge, 1), judged)
            return max(a / b for a, b in zip(after, before, strict=True))

        gains = {ridge: 1 - worst(ridge) for ridge in RIDGES}
        return max(r for r in RIDGES if gains[r] >= 0.9 * max(gains.values()))


def naive_of(
    checkpoint: Checkpoint, pruned: Checkpoint, keep: Sequence[int], tokens: Tokens
) -> Naive:
    """Layer 1 of a plan that refits it alone, with the pruned model's own router."""
    ids = tokens.ids_ST
    original, after = StreamingModel(checkpoint), StreamingModel(pruned)
    goal = original.embed(ids)
    hidden = after.embed(ids)
    for index in (0, 1):
        run_layer(original, index, goal)
    run_layer(after, 0, hidden)
    hidden, x = after.enter(1, hidden)
    assert x is not None
    routing = after.route(pruned.layers[1], x)
    features, downs = [], []
    for new, old in enumerate(keep):
        gate, up, down = read_expert(checkpoint, checkpoint.layers[1], old)
        weight = (routing.weights_NK * (routing.ids_NK == new)).sum(1, keepdim=True)
        inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        features.append((inner * weight).double())
        downs.append(down.double())
    target = (goal - hidden).flatten(0, 1).double()
    # Every fifth window judges, counted from the middle of each five.
    judged = torch.zeros(len(ids), dtype=torch.bool)
    judged[[2, 7, 12]] = True
    rms = goal.flatten(0, 1).double().square().mean(1, keepdim=True).sqrt()
    share = (1 / rms) / (1 / rms).mean()
    fitted = ~judged.repeat_interleave(ids.shape[1])
    return Naive(features, downs, target, fitted, share)


def test_a_cut_refits_by_the_formula(checkpoint: Checkpoint, tmp_path: Path) -> None:
    cuts = {0: LayerCut(keep=(1, 2, 4)), 1: HALF}
    plan = plan_of(checkpoint, cuts, [1])
    pruned, result = run(checkpoint, plan, tmp_path / "out")
    assert result.forward_passes == 2
    naive = naive_of(checkpoint, pruned, HALF.keep or (), some_tokens())
    judged = [torch.arange(at * 40, at * 40 + 40) for at in (2, 7, 12)]
    ridge = naive.best(judged)
    expected = naive.refitted(ridge, SWEEPS)
    (record,) = result.records
    assert record.refit is not None
    assert record.refit.ridge == ridge
    (errors,) = record.refit.sources
    assert errors.before == pytest.approx(*naive.errors(naive.downs, judged), rel=1e-4)
    assert errors.after == pytest.approx(*naive.errors(expected, judged), rel=1e-4)
    assert errors.after < 0.9 * errors.before
    for new, down_DF in enumerate(expected):
        found = read_expert(pruned, pruned.layers[1], new)
        source = read_expert(checkpoint, checkpoint.layers[1], (HALF.keep or ())[new])
        torch.testing.assert_close(
            found.down_DF.double(), down_DF, rtol=1e-3, atol=1e-4
        )
        assert not torch.equal(found.down_DF, source.down_DF)
        assert torch.equal(found.gate_FD, source.gate_FD)
        assert torch.equal(found.up_FD, source.up_FD)


def test_a_change_is_where_the_gradient_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    feature, missing, away = (
        torch.randn(shape, generator=generator) for shape in ((50, 8), (50, 5), (5, 8))
    )
    gram = feature.T @ feature
    change = Ridge(gram, 0.5).change(feature.T @ missing, away).requires_grad_()
    pull = 0.5 * gram.diagonal().mean()
    loss = (missing - feature @ change.T).square().sum()
    loss = loss + pull * (away + change).square().sum()
    (gradient,) = torch.autograd.grad(loss, change)
    assert float(gradient.abs().max()) < 1e-3


def two_sources(
    checkpoint: Checkpoint, second: str
) -> tuple[dict[int, Tensor], list[tuple[float, float]], float | None]:
    """Layer 0, of which the first source lacks half; the second as it says."""
    cut = layer_cuts(checkpoint, plan_of(checkpoint, {}, [0]))[0]
    streaming = StreamingModel(checkpoint)
    tokens = some_tokens(20)
    _, x_ND = streaming.enter(0, streaming.embed(tokens.ids_ST))
    assert x_ND is not None
    source_S = torch.arange(20) % 2
    windows = fit_windows(source_S, ["code", "maths"], 40)
    given = torch.zeros_like(x_ND)
    routing = streaming.route(checkpoint.layers[0], x_ND)
    for expert in range(6):
        gate, up, down = read_expert(checkpoint, checkpoint.layers[0], expert)
        weight = (routing.weights_NK * (routing.ids_NK == expert)).sum(1, keepdim=True)
        inner = torch.nn.functional.silu(x_ND @ gate.T) * (x_ND @ up.T)
        given += weight * (inner @ down.T)
    scale = torch.full((20, 1), 2.0)
    scale[source_S == 1] = {"alike": 2.0, "content": 1.0001, "opposed": 0.5}[second]
    target = given * scale.repeat_interleave(40, 0)
    downs, record = refit_layer(
        streaming, cut, windows, x_ND, target, torch.ones(len(x_ND))
    )
    found = [(one.before, one.after) for one in record.sources]
    assert [one.source for one in record.sources] == ["code", "maths"]
    return downs, found, record.ridge


def test_the_worst_source_decides(checkpoint: Checkpoint) -> None:
    downs, (code, maths), ridge = two_sources(checkpoint, "alike")
    assert len(downs) == 6
    # 0.1 gains more, by less than a tenth.
    assert ridge == 0.3
    assert code[1] < 0.3 * code[0]
    assert maths[1] < 0.3 * maths[0]
    for second in ("content", "opposed"):
        downs, (code, maths), ridge = two_sources(checkpoint, second)
        assert maths[1] > maths[0], "the case is one in which a source gets worse"
        assert code[1] < code[0]
        assert not downs
        assert ridge is None


def test_windows_of_every_source_judge_and_none_of_them_is_fitted_on() -> None:
    source_S = torch.tensor([0, 1, 0, 0, 1, 0, 0, 2])
    windows = fit_windows(source_S, ["a", "b", "c"], 16)
    assert windows.rows_W.tolist() == list(range(8))
    judged = windows.rows_W[windows.judged_W].tolist()
    assert sorted(int(source_S[row]) for row in judged) == [0, 1, 2]
    with pytest.raises(CalibrationError, match=r"of 2 .*--samples"):
        fit_windows(torch.tensor([0, 1]), ["a", "b"], 16)
    # Of very many tokens a share is used, in the proportions of the sources.
    few = fit_windows((torch.arange(400) % 4 == 0).long(), ["a", "b"], 1024)
    assert len(few.rows_W) == 32
    assert int((few.source_W == 1).sum()) == 8
    long = fit_windows(torch.arange(6) % 2, ["a", "b"], 1 << 17)
    assert long.source_W[long.judged_W].tolist() == [0, 1]
    assert sorted(long.source_W[~long.judged_W].tolist()) == [0, 1]


def test_one_source_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    fit_windows(torch.zeros(10, dtype=torch.int64), ["one.txt"], 16)
    assert "one calibration source, one.txt" in caplog.text
    caplog.clear()
    fit_windows(torch.arange(10) % 2, ["a", "b"], 16)
    assert not caplog.text
