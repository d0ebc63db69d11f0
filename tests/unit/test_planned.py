"""Losses of models that are only planned: equal to those of models that were cut."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.streamed import hidden_states, streamed_loss
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.data import Tokens, load_heldout, load_tokens
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import run_layer
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut import losses
from vllm_moe_prune.cut.losses import Loss, LossJournal, Text
from vllm_moe_prune.cut.planned import planned_losses
from vllm_moe_prune.decide.cut_plan import CutPlan
from vllm_moe_prune.errors import CalibrationError
from vllm_moe_prune.recipes.schema import Calibration, Recipe, parse_recipe

LAYERS = 4
RECIPES: dict[str, dict[str, Any]] = {
    "intact": {"experts": {"method": "none"}, "slim": {"method": "none"}},
    "uneven": {"experts": {"drop": 0.3}, "slim": {"method": "none"}},
    "redirected": {
        "experts": {"drop": 0.3},
        "slim": {"method": "none"},
        "routing": "redirect",
    },
    "means": {
        "experts": {"drop": 0.4, "reconstruct": "always"},
        "slim": {"method": "none"},
    },
    "block gone": {
        "experts": {"method": "none"},
        "slim": {"method": "none"},
        "layers": {"drop_blocks": [1]},
    },
    "MoE gone": {
        "experts": {"method": "none"},
        "slim": {"method": "none"},
        "layers": {"drop_moe": [2]},
    },
    "MoE gone, norm kept": {
        "experts": {"method": "none"},
        "slim": {"method": "none"},
        "layers": {"drop_moe": [2], "moe_norm": "keep"},
    },
    "wanda": {"total_sparsity": 0.5, "experts": {"drop": 0.2}},
    "magnitude": {
        "experts": {"method": "none"},
        "slim": {"method": "magnitude", "sparsity": 0.4},
    },
    "sparsegpt, all at once": {
        "total_sparsity": 0.6,
        "experts": {"drop": 0.2},
        "slim": {"method": "sparsegpt"},
        "layers": {"drop_moe": [0], "drop_blocks": [3]},
    },
    "layers without experts": {
        "experts": {
            "method": "score",
            "criterion": "frequency",
            "drop": 0.5,
            "min_experts": 0,
            "protected": {0: list(range(8)), 3: list(range(8))},
        },
        "slim": {"method": "none"},
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("planned")
    tiny_text(folder)
    model = tiny_checkpoint(folder / "model", layers=LAYERS, dtype="float32")
    return open_checkpoint(model)


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint) -> Calibration:
    return Calibration(
        source=str(checkpoint.folder.parent / "text.txt"),
        samples=3,
        sequence_length=24,
        heldout=2,
    )


@pytest.fixture(scope="module")
def tokens(checkpoint: Checkpoint, calibration: Calibration) -> Tokens:
    return load_tokens(checkpoint, calibration)


@pytest.fixture(scope="module")
def heldout(checkpoint: Checkpoint, calibration: Calibration) -> Tokens:
    return load_heldout(checkpoint, calibration)


def recipe_of(data: dict[str, Any], calibration: Calibration) -> Recipe:
    asked = {**data, "calibration": calibration.model_dump()}
    return parse_recipe(asked, "test")


def plan_of(checkpoint: Checkpoint, recipe: Recipe, tokens: Tokens) -> CutPlan:
    stats = pipeline.measure(checkpoint, recipe, tokens, pipeline.RunOptions())
    return pipeline.plan(checkpoint, recipe, stats)


def test_heldout_windows_are_apart(tokens: Tokens, heldout: Tokens) -> None:
    one = {tuple(row) for row in tokens.ids_ST.tolist()}
    two = {tuple(row) for row in heldout.ids_ST.tolist()}
    assert (len(one), len(two)) == (3, 2)
    assert not one & two


def test_heldout_windows_can_be_of_a_text_of_their_own(
    checkpoint: Checkpoint, calibration: Calibration, tmp_path: Path
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("zebra yak quail " * 400)
    asked = calibration.model_copy(update={"heldout_source": str(own)})
    found = load_heldout(checkpoint, asked)
    alone = calibration.model_copy(update={"source": str(own), "samples": 2})
    assert torch.equal(found.ids_ST, load_tokens(checkpoint, alone).ids_ST)
    assert found.source == own.name
    own.write_text("zebra")
    with pytest.raises(CalibrationError, match=r"own\.txt.*--heldout"):
        load_heldout(checkpoint, asked)


@pytest.mark.slow
def test_planned_losses_are_those_of_what_is_cut(
    checkpoint: Checkpoint,
    calibration: Calibration,
    tokens: Tokens,
    heldout: Tokens,
    tmp_path: Path,
) -> None:
    plans, expected = [], []
    for name, data in RECIPES.items():
        plan = plan_of(checkpoint, recipe_of(data, calibration), tokens)
        out = tmp_path / name
        pipeline.cut(checkpoint, plan, out, pipeline.RunOptions(), tokens)
        plans.append(plan)
        expected.append(streamed_loss(out, heldout.ids_ST))
    model = StreamingModel(checkpoint)
    found = planned_losses(model, plans, [Text(heldout.ids_ST)], tokens.ids_ST)
    assert [loss.nll for (loss,) in found] == pytest.approx(
        [loss.nll for loss in expected], rel=1e-6
    )
    assert {loss.tokens for (loss,) in found} == {heldout.ids_ST[:, 1:].numel()}
    # They are different models, so equality above is not for want of a difference.
    assert len({round(loss.nll, 4) for (loss,) in found}) == len(RECIPES)


def test_plans_that_agree_share_the_layers(
    checkpoint: Checkpoint, calibration: Calibration, tokens: Tokens, heldout: Tokens
) -> None:
    intact = plan_of(checkpoint, recipe_of(RECIPES["intact"], calibration), tokens)
    last = intact.layers[-1].model_copy(update={"keep": (0, 1, 2), "clusters": None})
    plans = [intact, intact.model_copy(update={"layers": (*intact.layers[:-1], last)})]
    model = StreamingModel(checkpoint)
    planned_losses(model, plans, [Text(heldout.ids_ST)])
    assert model.layers_run == LAYERS


def test_memory_for_few_plans_takes_more_sweeps_and_gives_the_same(
    checkpoint: Checkpoint,
    calibration: Calibration,
    tokens: Tokens,
    heldout: Tokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans = [
        plan_of(checkpoint, recipe_of(RECIPES[name], calibration), tokens)
        for name in ("intact", "uneven", "wanda")
    ]
    model = StreamingModel(checkpoint)
    together = planned_losses(model, plans, [Text(heldout.ids_ST)], tokens.ids_ST)
    monkeypatch.setattr(losses, "STATE_BYTES", 1)
    assert (
        planned_losses(model, plans, [Text(heldout.ids_ST)], tokens.ids_ST) == together
    )


def test_a_journal_knows_what_was_judged(
    checkpoint: Checkpoint,
    calibration: Calibration,
    tokens: Tokens,
    heldout: Tokens,
    tmp_path: Path,
) -> None:
    plans = [
        plan_of(checkpoint, recipe_of(RECIPES[name], calibration), tokens)
        for name in ("intact", "uneven")
    ]
    path = tmp_path / "losses.jsonl"
    model = StreamingModel(checkpoint)
    args = (model, plans, [Text(heldout.ids_ST)])
    first = planned_losses(*args, journal=LossJournal(path))
    path.write_text(path.read_text()[:-9])  # killed while writing the second line
    before = model.layers_run
    assert planned_losses(*args, journal=LossJournal(path)) == first
    assert model.layers_run == before + LAYERS
    assert planned_losses(*args, journal=LossJournal(path)) == first
    assert model.layers_run == before + LAYERS


def test_sensitivity_is_the_loss_of_each_layer_alone(
    checkpoint: Checkpoint,
    calibration: Calibration,
    tokens: Tokens,
    heldout: Tokens,
    tmp_path: Path,
) -> None:
    data = {
        "experts": {
            "method": "score",
            "criterion": "frequency",
            "drop": 0.4,
            "budget": "sensitivity",
        },
        "slim": {"method": "none"},
    }
    recipe = recipe_of(data, calibration)
    work = tmp_path / "work"
    stats = pipeline.measure(checkpoint, recipe, tokens, pipeline.RunOptions(), work)
    assert stats.sensitivity["candidates"] == 1 + LAYERS * 4
    protected = {layer: list(range(8)) for layer in range(LAYERS)}
    for layer in range(LAYERS):
        found = stats.layers[layer].sensitivity_P2
        assert found is not None
        assert found[:, 0].tolist() == [0, 2, 3, 5, 6]
        # Independently: cut that layer alone by a per-layer budget, and run it.
        alone = {
            "experts": {
                **data["experts"],
                "budget": "global",
                "drop": 3 / 32,
                "protected": {k: v for k, v in protected.items() if k != layer},
            },
            "slim": {"method": "none"},
        }
        plan = pipeline.plan(checkpoint, recipe_of(alone, calibration), stats)
        assert [len(one.keep) for one in plan.layers].count(5) == 1
        out = tmp_path / f"alone-{layer}"
        pipeline.cut(checkpoint, plan, out, pipeline.RunOptions())
        expected = streamed_loss(out, heldout.ids_ST).mean
        assert found[2, 1] == pytest.approx(expected, rel=1e-6)
    plan = pipeline.plan(checkpoint, recipe, stats)
    assert sum(8 - len(layer.keep) for layer in plan.layers) == 13


def test_a_text_too_short_to_judge_on_is_refused_before_the_pass(
    checkpoint: Checkpoint, calibration: Calibration, tokens: Tokens
) -> None:
    data = {
        "experts": {"method": "score", "drop": 0.4, "budget": "sensitivity"},
        "slim": {"method": "none"},
    }
    more = calibration.model_copy(update={"heldout": 100_000})
    told: list[object] = []
    options = pipeline.RunOptions(report=told.append)
    with pytest.raises(CalibrationError, match="apart to judge on"):
        pipeline.measure(checkpoint, recipe_of(data, more), tokens, options)
    assert not told


def test_owl_counts_outliers_of_what_stage_1_leaves(
    checkpoint: Checkpoint, calibration: Calibration, tokens: Tokens
) -> None:
    data = {
        "total_sparsity": 0.5,
        "experts": {"drop": 0.25},
        "slim": {"method": "wanda", "allocation": "owl", "owl_m": 2.0},
    }
    recipe = recipe_of(data, calibration)
    stats = pipeline.measure(checkpoint, recipe, tokens, pipeline.RunOptions())
    assert stats.forward_passes == 2
    plan = pipeline.plan(checkpoint, recipe, stats)
    assert plan.predicted is not None
    assert plan.predicted.expert_sparsity == pytest.approx(0.5, abs=1e-4)
    assert len({layer.sparsity for layer in plan.layers}) > 1
    other = {**data, "experts": {"drop": 0.125}}
    with pytest.raises(Exception, match="survivors of another plan"):
        pipeline.plan(checkpoint, recipe_of(other, calibration), stats)
    # Written straight from the definition, on a checkpoint cut to the survivors.
    trimmed = plan.model_copy(
        update={
            "slim": "none",
            "layers": tuple(
                layer.model_copy(update={"sparsity": 0.0}) for layer in plan.layers
            ),
        }
    )
    out = checkpoint.folder.parent / "trimmed"
    pipeline.cut(checkpoint, trimmed, out, pipeline.RunOptions())
    model = StreamingModel(survivors := open_checkpoint(out))
    hidden = model.embed(tokens.ids_ST)
    from vllm_moe_prune.checkpoint.reader import read_expert

    for layer, layer_plan in zip(survivors.layers, plan.layers, strict=True):
        _, x = model.enter(layer.index, hidden.clone())
        routing = model.route(layer, x)
        scores = []
        for expert in range(layer.num_experts):
            token = (routing.ids_NK == expert).any(1)
            gate, up, down = read_expert(survivors, layer, expert)
            own = x[token]
            inner = torch.nn.functional.silu(own @ gate.T) * (own @ up.T)
            scores.append(
                [
                    weight.abs().double() * inputs.double().norm(dim=0)
                    for weight, inputs in ((gate, own), (up, own), (down, inner))
                ]
            )
        everything = torch.cat([m.flatten() for one in scores for m in one])
        mean = everything.mean()
        found = stats.layers[layer.index].owl_outliers_E
        assert found is not None
        expected = dict.fromkeys(range(8), 0)
        for new, one in enumerate(scores):
            count = sum(int((matrix > 2.0 * mean).sum()) for matrix in one)
            expected[layer_plan.keep[new]] = count
        assert found.tolist() == pytest.approx(list(expected.values()), abs=2)
        assert sum(expected.values()) > 0
        run_layer(model, layer.index, hidden)


@pytest.mark.parametrize("method", ["score", "stun"])
def test_zeros_first_reaches_the_same_total(
    checkpoint: Checkpoint, calibration: Calibration, tmp_path: Path, method: str
) -> None:
    recipe = recipe_of(
        {
            "total_sparsity": 0.5,
            "order": "unstructured-first",
            "experts": {"method": method, "drop": 0.25},
            "slim": {"method": "magnitude"},
        },
        calibration,
    )
    out = tmp_path / "out"
    plan, _, verified = pipeline.run(checkpoint, recipe, out, pipeline.RunOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sum(len(layer.keep) for layer in plan.layers) == 24
    assert verified.experts == 24
    after = open_checkpoint(out)
    from vllm_moe_prune.checkpoint.reader import read_expert

    left = sum(
        int(torch.count_nonzero(matrix))
        for layer in after.moe_layers
        for expert in range(layer.num_experts)
        for matrix in read_expert(after, layer, expert)
    )
    before = LAYERS * 8 * 3 * 64 * 96
    assert left / before == pytest.approx(0.5, abs=1e-3)


def test_an_infinite_loss_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    LossJournal(path).add("a", (Loss(math.inf, 7), Loss(1.5, 2, 1)))
    assert LossJournal(path).losses == {"a": (Loss(math.inf, 7), Loss(1.5, 2, 1))}
    assert json.loads(path.read_text())["losses"][1] == [1.5, 2, 1]


def test_targets_are_judged_alone_and_exactly(
    checkpoint: Checkpoint, calibration: Calibration, heldout: Tokens
) -> None:
    intact = pipeline.plan(
        checkpoint, recipe_of(RECIPES["intact"], calibration), stats=None
    )
    ids_ST = heldout.ids_ST.clone()
    model = StreamingModel(checkpoint)
    hidden = hidden_states(model, ids_ST)
    likeliest = [logits.argmax(-1) for _, logits in model._logits(hidden)]
    greedy = torch.cat(likeliest).view(ids_ST.shape)
    targets_ST = torch.full_like(ids_ST, -100)
    targets_ST[:, 20:23] = greedy[:, 19:22]
    text = Text(ids_ST, targets_ST)
    ((loss,),) = planned_losses(model, [intact], [text])
    assert (loss.tokens, loss.exact) == (3 * len(ids_ST), len(ids_ST))
    targets_ST[0, 21] = (targets_ST[0, 21] + 1) % 500
    ((loss,),) = planned_losses(model, [intact], [text])
    assert loss.exact == len(ids_ST) - 1
