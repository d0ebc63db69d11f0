"""Refitted projections against the formula, written out; and what a cut does with them.

Axes: N tokens, D hidden, F expert width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import DROP_BLOCK, DROP_MOE, LayerCut, folder_bytes, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate import boundary
from vllm_moe_prune.calibrate.data import Tokens, sha256_of
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import run_layer
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_expert
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import CutResult, execute_plan
from vllm_moe_prune.cut.layer_cut import layer_cuts
from vllm_moe_prune.cut.predict import model_facts
from vllm_moe_prune.cut.refit_layer import RIDGES, SWEEPS, fit_windows, refit_layer
from vllm_moe_prune.cut.verify import verify
from vllm_moe_prune.decide.build_plan import make_plan
from vllm_moe_prune.decide.check_plan import check_plan
from vllm_moe_prune.decide.cut_plan import CutPlan, load_plan
from vllm_moe_prune.errors import CalibrationError, OutputError, PlanError
from vllm_moe_prune.progress import Progress
from vllm_moe_prune.recipes.schema import ExpertStage, LayerStage, Recipe, SlimStage
from vllm_moe_prune.slim.ridge import Ridge
from vllm_moe_prune.stages.measure import collect
from vllm_moe_prune.stages.preflight import RunOptions, validate_plan

Cuts = dict[int, LayerCut]
HALF = LayerCut(keep=(0, 3, 5))
MERGED = LayerCut(
    keep=(0, 3, 5), clusters=((0, 1), (2, 3), (4, 5)), reconstruct=True, weights=None
)


def model(folder: Path, **options: Any) -> Checkpoint:
    sizes = {"layers": 3, "hidden": 32, "width": 24, "dtype": "float32", "shards": 2}
    sizes |= {"tokenizer": False, "vocab": 64}
    if "model_type" not in options:
        sizes |= {"experts": 6}
    return open_checkpoint(tiny_checkpoint(folder, **(sizes | options)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return model(tmp_path_factory.mktemp("refit") / "model")


def some_tokens(windows: int = 15, length: int = 40) -> Tokens:
    generator = torch.Generator().manual_seed(2)
    ids_ST = torch.randint(3, 64, (windows, length), generator=generator)
    return Tokens(ids_ST=ids_ST, source="random", sha256=sha256_of(ids_ST))


def plan_of(
    checkpoint: Checkpoint, cuts: Cuts, refit: Sequence[int], **how: Any
) -> CutPlan:
    """A plan made by hand that refits some layers."""
    path = checkpoint.folder.with_name("plan.json")
    plan = load_plan(write_plan(path, checkpoint, cuts, **how))
    layers = [
        layer.model_copy(update={"refit": layer.layer in refit})
        for layer in plan.layers
    ]
    return plan.model_copy(update={"layers": tuple(layers)})


def run(
    checkpoint: Checkpoint, plan: CutPlan, out: Path, **how: Any
) -> tuple[Checkpoint, CutResult]:
    how = {"tokens": some_tokens()} | how
    result = execute_plan(checkpoint, plan, out, **how)
    verify(out, checkpoint)
    return open_checkpoint(out), result


def hidden_states(checkpoint: Checkpoint, ids_ST: Tensor) -> Tensor:
    streaming = StreamingModel(checkpoint)
    hidden = streaming.embed(ids_ST)
    for index in range(streaming.num_layers):
        run_layer(streaming, index, hidden)
    return hidden


# The formula, written out


@dataclass
class Naive:
    """Block-coordinate ridge regression, dense and in float64."""

    features: list[Tensor]
    """Of each expert [N, F]; 0 where it is not chosen."""
    downs: list[Tensor]
    target_ND: Tensor
    fitted_N: Tensor

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
                seen = feature_NF[self.fitted_N]
                wanted = (self.target_ND - others)[self.fitted_N]
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
        return [
            float(missing[rows].square().sum() / self.target_ND[rows].square().sum())
            for rows in judged
        ]

    def best(self, judged: list[Tensor]) -> float:
        before = self.errors(self.downs, judged)

        def worst(ridge: float) -> float:
            after = self.errors(self.refitted(ridge, 1), judged)
            return max(a / b for a, b in zip(after, before, strict=True))

        return min(RIDGES, key=worst)


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
    return Naive(features, downs, target, ~judged.repeat_interleave(ids.shape[1]))


def test_a_cut_refits_by_the_formula(checkpoint: Checkpoint, tmp_path: Path) -> None:
    cuts = {0: LayerCut(keep=(1, 2, 4)), 1: HALF}
    plan = plan_of(checkpoint, cuts, [1])
    pruned, result = run(checkpoint, plan, tmp_path / "out")
    assert result.forward_passes == 2
    naive = naive_of(checkpoint, pruned, HALF.keep or (), some_tokens())
    judged = [~naive.fitted_N]
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


# Which sources decide


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
    downs, record = refit_layer(streaming, cut, windows, x_ND, target)
    found = [(one.before, one.after) for one in record.sources]
    assert [one.source for one in record.sources] == ["code", "maths"]
    return downs, found, record.ridge


def test_the_worst_source_decides(checkpoint: Checkpoint) -> None:
    downs, (code, maths), ridge = two_sources(checkpoint, "alike")
    assert len(downs) == 6
    assert ridge == min(RIDGES)
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


# What a cut does with it

EVERYTHING: dict[str, tuple[Cuts, list[int], dict[str, Any]]] = {
    "merged": ({0: MERGED, 2: HALF}, [0, 2], {}),
    "redirected": ({1: MERGED}, [1], {"routing": "redirect"}),
    "with dropped ones": ({0: HALF, 1: DROP_BLOCK, 2: HALF}, [0, 2], {}),
    "behind a dropped sublayer": ({0: DROP_MOE}, [1], {}),
    "before a dropped block": ({1: DROP_BLOCK}, [0], {}),
    "behind a dropped start": ({0: DROP_BLOCK}, [1], {}),
    "slimmed": (
        {0: LayerCut(keep=(0, 3, 5), sparsity=0.3), 1: LayerCut(sparsity=0.3)},
        [0],
        {"slim": "wanda"},
    ),
    "slimmed by magnitude": (
        {0: LayerCut(keep=(0, 3, 5), sparsity=0.3)},
        [0],
        {"slim": "magnitude"},
    ),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_hidden_states_come_nearer_the_original(
    checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    cuts, refit, how = EVERYTHING[name]
    fresh = torch.randint(3, 64, (4, 40), generator=torch.Generator().manual_seed(9))
    goal = hidden_states(checkpoint, fresh)
    distances = []
    for layers in ([], refit):
        plan = plan_of(checkpoint, cuts, layers, **how)
        pruned, result = run(checkpoint, plan, tmp_path / f"out-{len(layers)}")
        distances.append(float((hidden_states(pruned, fresh) - goal).norm()))
        assert plan.needs_activations or not layers
        refitted = [record for record in result.records if record.refit]
        assert [record.layer for record in refitted] == layers
    assert distances[1] < 0.985 * distances[0]


@pytest.mark.parametrize("layout", ["block_sparse_moe.w1w2w3", "mlp.packed"])
def test_a_plan_that_changes_nothing_gives_identical_bytes(
    tmp_path: Path, layout: str
) -> None:
    checkpoint = model(tmp_path / "model", layout=layout)
    copied, _ = run(checkpoint, plan_of(checkpoint, {}, []), tmp_path / "copied")
    refitted, result = run(
        checkpoint, plan_of(checkpoint, {}, [0, 1, 2]), tmp_path / "refitted"
    )
    shards = [
        {
            name: data
            for name, data in folder_bytes(one.folder).items()
            if name.endswith(".safetensors")
        }
        for one in (copied, refitted)
    ]
    assert shards[0]
    assert shards[0] == shards[1]
    assert not any(record.refit for record in result.records)


class Killed(Exception):
    """Raised in the middle of a run."""


@pytest.mark.parametrize("quantize", [{}, {"method": "gptq", "group_size": 32}])
def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: dict[str, Any]
) -> None:
    monkeypatch.setattr(boundary, "MAX_OVERHEAD", float("inf"))
    checkpoint = model(tmp_path / "model", layers=5, width=32)
    cuts = {1: HALF, 2: DROP_BLOCK, 3: HALF, 4: MERGED}
    if quantize:
        cuts[4] = HALF
    plan = plan_of(checkpoint, cuts, [1, 3, 4], quantize=quantize)
    how: dict[str, Any] = {"max_shard_bytes": 20_000}
    _, whole = run(checkpoint, plan, tmp_path / "whole", **how)
    for stop in range(1, 6):

        def kill(progress: Progress, stop: int = stop) -> None:
            if progress.layer == stop:
                raise Killed

        out = tmp_path / f"out-{stop}"
        with pytest.raises(Killed):
            run(checkpoint, plan, out, report=kill, **how)
        _, resumed = run(checkpoint, plan, out, resume=True, **how)
        assert folder_bytes(out) == folder_bytes(tmp_path / "whole")
        assert resumed.records == whole.records
    # What was done is told again from the output alone.
    _, told = run(checkpoint, plan, tmp_path / "whole", resume=True, **how)
    assert [one.refit for one in told.records] == [one.refit for one in whole.records]


def test_a_boundary_without_the_original_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boundary, "MAX_OVERHEAD", float("inf"))
    plan = plan_of(checkpoint, dict.fromkeys(range(3), HALF), [0, 1, 2])

    def kill(progress: Progress) -> None:
        if progress.layer == 2:
            raise Killed

    how: dict[str, Any] = {"max_shard_bytes": 20_000}
    with pytest.raises(Killed):
        run(checkpoint, plan, tmp_path / "out", report=kill, **how)
    monkeypatch.setattr(boundary, "ORIGINAL", "something else")
    with pytest.raises(OutputError, match=r"damaged: it holds no hidden states"):
        run(checkpoint, plan, tmp_path / "out", resume=True, **how)


FAMILIES = ("arctic", "deepseek", "deepseek_v2", "deepseek_v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str) -> None:
    """Dense parts, shared experts and groups; MTP layers read what layers give."""
    mtp = {"num_nextn_predict_layers": 1} if family == "deepseek_v3" else {}
    checkpoint = model(tmp_path / "model", model_type=family, **mtp)
    layers = [layer.index for layer in checkpoint.moe_layers]
    experts = checkpoint.moe_layers[0].num_experts
    keep = tuple(expert for expert in range(experts) if expert % 4 < 2)
    plan = plan_of(checkpoint, dict.fromkeys(layers, LayerCut(keep=keep)), layers)
    _, result = run(checkpoint, plan, tmp_path / "out")
    for record in result.records:
        assert record.refit is not None
        assert record.refit.ridge is not None
        assert all(one.after < one.before for one in record.refit.sources)


# Which layers a recipe refits


def decided(checkpoint: Checkpoint, layers: LayerStage, **experts: Any) -> list[int]:
    stage = ExpertStage(
        method="score", criterion="router-norm", refit="ridge", **experts
    )
    recipe = Recipe(experts=stage, layers=layers, slim=SlimStage(method="none"))
    stats = collect(checkpoint, [recipe], None, RunOptions())
    plan = make_plan(stats, recipe, model_facts(checkpoint), tool_version="0")
    assert plan.refits is plan.needs_activations
    return [layer.layer for layer in plan.layers if layer.refit]


@pytest.mark.parametrize(
    ("layers", "experts", "expected"),
    [
        ({}, {}, []),
        ({}, {"drop": 0.5, "budget": "per-layer"}, [0, 1, 2, 3]),
        ({"drop_moe": [1]}, {}, [2]),
        ({"drop_moe": [1, 2]}, {}, [3]),
        ({"drop_blocks": [1]}, {}, [0]),
        ({"drop_blocks": [1, 2]}, {}, [0]),
        ({"drop_blocks": [0]}, {}, [1]),
        ({"drop_blocks": [2], "drop_moe": [1]}, {}, [3]),
    ],
)
def test_layers_that_lost_experts_and_those_that_take_over(
    tmp_path: Path,
    layers: dict[str, Any],
    experts: dict[str, Any],
    expected: list[int],
) -> None:
    checkpoint = model(tmp_path / "model", layers=4)
    stage = LayerStage.model_validate(layers)
    assert decided(checkpoint, stage, **experts) == expected


def test_a_layer_without_experts_is_not_refitted(checkpoint: Checkpoint) -> None:
    plan = plan_of(checkpoint, {1: DROP_MOE}, [1])
    with pytest.raises(PlanError, match=r"plan: layer 1: refit, but .* no experts"):
        check_plan(plan, checkpoint.layers, checkpoint.fingerprint, "plan")


def test_fp8_experts_stay_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = model(tmp_path / "model", fp8=(16, 16))
    assert not decided(checkpoint, LayerStage(), drop=0.5, budget="per-layer")
    asked = {"experts": {"refit": "ridge"}}
    left_out = plan_of(checkpoint, {1: HALF}, [], recipe=asked)
    validate_plan(checkpoint, left_out, RunOptions(), "plan")
    assert "experts stay fp8, so none are refitted" in caplog.text
    plan = plan_of(checkpoint, {1: HALF}, [1])
    with pytest.raises(PlanError, match=r"the plan refits experts .* stay fp8"):
        execute_plan(checkpoint, plan, tmp_path / "out", tokens=some_tokens())


def test_an_expert_that_nobody_chooses_keeps_its_projection(tmp_path: Path) -> None:
    checkpoint = model(tmp_path / "model", layers=2, model_type="mixtral", experts=6)
    keep = (0, 3, 5)
    plan = plan_of(checkpoint, {0: LayerCut(keep=keep)}, [0])
    # One token per window and few windows: some expert is left without any.
    ids_ST = torch.full((5, 2), 7)
    tokens = Tokens(ids_ST=ids_ST, source="one", sha256=sha256_of(ids_ST))
    pruned, result = run(checkpoint, plan, tmp_path / "out", tokens=tokens)
    (record,) = result.records
    assert record.unseen
    for old in record.unseen:
        found = read_expert(pruned, pruned.layers[0], keep.index(old))
        source = read_expert(checkpoint, checkpoint.layers[0], old)
        assert torch.equal(found.down_DF, source.down_DF)
