"""The search for the best plan: it finds the least loss, fits, resumes, and is cut."""

from pathlib import Path
from typing import Any

import pytest

from tests.shapes import Shape
from tests.streamed import streamed_loss
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.data import load_heldout, load_tokens
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.decide.cut_plan import dump_plan
from vllm_moe_prune.decide.required_stats import needed_statistics
from vllm_moe_prune.errors import OutputError, RecipeError
from vllm_moe_prune.progress import Progress
from vllm_moe_prune.recipes.loading import load_recipe, swept
from vllm_moe_prune.recipes.schema import Recipe, TuneStage, parse_recipe
from vllm_moe_prune.stages.measure import collect
from vllm_moe_prune.tune.candidates import refinements, structures
from vllm_moe_prune.tune.estimate import estimate
from vllm_moe_prune.tune.front import check_plot, front, plot_front
from vllm_moe_prune.tune.judged import Tuned
from vllm_moe_prune.tune.narrowings import narrowings
from vllm_moe_prune.tune.search import _Search, tune, tune_sizes
from vllm_moe_prune.tune.sizes import Size, size_of, sizes_of

SMALL: dict[str, Any] = {
    "experts": ("total-output", "stun"),
    "budgets": ("sensitivity", "per-layer"),
    "shares": (0.0, 0.5, 1.0),
    "layers": (0.3,),
    "narrow": (0.5, 1.0),
    "finalists": 2,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tune")
    tiny_text(folder)
    model = tiny_checkpoint(folder / "model", layers=3, dtype="float32")
    return open_checkpoint(model)


@pytest.fixture(scope="module")
def recipe(checkpoint: Checkpoint) -> Recipe:
    text = checkpoint.folder.parent / "text.txt"
    calibration = {"source": str(text), "samples": 4, "sequence_length": 24}
    return parse_recipe(
        {
            "total_sparsity": 0.5,
            "tune": SMALL,
            "calibration": {**calibration, "heldout": 4},
        },
        "test",
    )


@pytest.fixture(scope="module")
def tuned(checkpoint: Checkpoint, recipe: Recipe) -> Tuned:
    return tune(checkpoint, recipe, pipeline.RunOptions())


def test_candidates_are_all_different_and_name_what_they_are() -> None:
    recipe = load_recipe("best")
    layers = [Shape() for _ in range(8)]
    found = structures(recipe, layers)
    assert recipe.tune is not None
    # Without experts one way; else every rule with every budget; and dropped layers.
    assert len(found) == 1 + 4 * 4 * 3 + 2 * 3 * 5
    assert len({one.name for one in found}) == len(found)
    assert all(one.recipe.tune is None for one in found)
    assert all(one.recipe.total_sparsity == 0.5 for one in found)
    whole = next(one for one in found if "100%" in one.name)
    assert whole.recipe.slim.method == "none"
    assert refinements(whole, recipe.tune) == []
    zeros = next(one for one in found if "50%" in one.name)
    assert [
        (one.recipe.slim.method, one.recipe.slim.allocation)
        for one in refinements(zeros, recipe.tune)
    ] == [("sparsegpt", "uniform"), ("wanda", "owl")]


@pytest.mark.slow
def test_narrower_experts_are_tried_with_the_finalists(
    checkpoint: Checkpoint, recipe: Recipe, tuned: Tuned
) -> None:
    tune = parse_recipe({"total_sparsity": 0.5, "tune": SMALL}, "test").tune
    assert tune is not None
    finalists = structures(recipe, checkpoint.layers)
    names = [one.name for one in narrowings(recipe, finalists, tune)]
    assert names == [
        "narrow 50% + wanda",
        "narrow 50% + total-output (sensitivity)",
        "narrow 100%",
    ]
    found = {one.name: one for one in tuned.judged if "narrow" in one.name}
    assert len(found) == 3
    assert all(one.final and one.plan.is_narrowed for one in found.values())


@pytest.mark.slow
def test_the_best_loses_least_and_is_what_gets_cut(
    checkpoint: Checkpoint, recipe: Recipe, tuned: Tuned, tmp_path: Path
) -> None:
    final = [one for one in tuned.judged if one.final]
    assert tuned.best.loss.mean == min(one.loss.mean for one in final)
    assert len(final) < len(tuned.judged)
    # What changes least is judged to the end, in its best way.
    assert any(one.name.split(", ")[0] == "wanda" for one in final)
    assert not tuned.left_out
    for one in tuned.judged:
        assert one.plan.predicted is not None
        assert one.plan.predicted.expert_sparsity >= 0.5
    out = tmp_path / "out"
    decided, _, verified = pipeline.run(checkpoint, recipe, out, pipeline.RunOptions())
    assert dump_plan(decided) == dump_plan(tuned.best.plan)
    assert verified.expert_sparsity == pytest.approx(0.5, abs=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    heldout = load_heldout(checkpoint, recipe.calibration)
    loss = streamed_loss(out, heldout.ids_ST)
    assert loss.mean == pytest.approx(tuned.best.loss.mean, rel=1e-6)


@pytest.mark.parametrize(
    "family", ["olmoe", "qwen3_moe", "glm4_moe", "minimax_m2", "qwen2_moe"]
)
def test_other_families_are_searched_and_cut(
    family: str, recipe: Recipe, tmp_path: Path
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", model_type=family, layers=2)
    few = {"experts": ("frequency",), "budgets": ("sensitivity",), "shares": (1.0,)}
    few |= {"layers": (), "narrow": (), "finalists": 1}
    data = recipe.model_dump(mode="json", exclude_defaults=True) | {"tune": few}
    asked = parse_recipe(data, "test")
    out = tmp_path / "out"
    decided, result, _ = pipeline.run(
        open_checkpoint(folder), asked, out, pipeline.RunOptions()
    )
    assert decided.predicted is not None
    assert decided.predicted.file_bytes == result.file_bytes
    assert open_checkpoint(out).moe_layers[0].num_experts < 8


@pytest.mark.slow
def test_a_killed_search_continues_to_the_same_plan(
    checkpoint: Checkpoint, recipe: Recipe, tuned: Tuned, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    seen: list[Progress] = []

    def kill(progress: Progress) -> None:
        seen.append(progress)
        if progress.stage == "judge" and progress.layer == 2:
            assert progress.note.startswith("best ")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(checkpoint, recipe, pipeline.RunOptions(report=kill), work=work)
    again: list[Progress] = []
    options = pipeline.RunOptions(report=again.append)
    found = tune(checkpoint, recipe, options, work=work)
    assert dump_plan(found.best.plan) == dump_plan(tuned.best.plan)
    assert [one.loss for one in found.judged] == [one.loss for one in tuned.judged]
    assert [one.name for one in found.judged] == [one.name for one in tuned.judged]
    assert any(one.stage == "sensitivity" for one in seen)
    assert not any(one.stage in ("measure", "sensitivity") for one in again)


def test_a_killed_measurement_serves_no_recipe_that_needs_more(
    checkpoint: Checkpoint, recipe: Recipe, tmp_path: Path
) -> None:
    """Both find the folder of work; only the same question has the same answer."""
    tokens = load_tokens(checkpoint, recipe.calibration)
    options = pipeline.RunOptions()
    for criterion, field in (
        ("reap", "weighted_norm_sum_E"),
        ("routing-score", "score_full_sum_E"),
    ):
        how = {"criterion": criterion, "drop": 0.5, "budget": "sensitivity"}
        asked = recipe.model_copy(
            update={
                "experts": parse_recipe(
                    {"experts": {"method": "score", **how}}, ""
                ).experts
            }
        )
        stats = collect(checkpoint, [asked], tokens, options, tmp_path / "work")
        assert field in needed_statistics(asked)
        assert all(getattr(one, field) is not None for one in stats.layers.values())


@pytest.mark.slow
def test_every_candidate_fits_the_bytes_asked_for(
    checkpoint: Checkpoint, recipe: Recipe
) -> None:
    whole = sum(path.stat().st_size for path in checkpoint.folder.glob("*.safetensors"))
    limit = int(0.7 * whole)
    by_size = {"total_sparsity": None, "max_bytes": limit}
    asked = recipe.model_copy(update=by_size)
    found = tune(checkpoint, asked, pipeline.RunOptions())
    assert found.judged
    assert all(one.file_bytes <= limit for one in found.judged)
    # Zeros alone leave the files as large as they were.
    assert "wanda" in dict(found.left_out)
    asked = recipe.model_copy(update=by_size | {"max_bytes": 1000})
    with pytest.raises(RecipeError, match="no candidate reaches the size bytes-1000"):
        tune(checkpoint, asked, pipeline.RunOptions())


@pytest.mark.slow
def test_sizes_share_a_search_and_find_what_each_finds_alone(
    checkpoint: Checkpoint, recipe: Recipe, tuned: Tuned
) -> None:
    sizes = [Size(total=0.3), Size(total=0.5)]
    options = pipeline.RunOptions()
    small, large = pipeline.tune_sizes(checkpoint, recipe, options, sizes)
    assert dump_plan(large.best.plan) == dump_plan(tuned.best.plan)
    assert [one.loss for one in large.judged] == [one.loss for one in tuned.judged]
    for found, total in ((small, 0.3), (large, 0.5)):
        predicted = found.best.plan.predicted
        assert predicted is not None
        assert predicted.expert_sparsity == pytest.approx(total, abs=0.05)
        assert predicted.expert_sparsity >= total


def test_when_time_is_up_the_best_so_far_is_the_answer(
    checkpoint: Checkpoint, recipe: Recipe, tmp_path: Path
) -> None:
    options = pipeline.RunOptions()
    work = tmp_path / "work"
    sizes = [size_of(recipe)]
    with pytest.raises(RecipeError, match=r"before any candidate.*--minutes"):
        tune_sizes(checkpoint, recipe, options, sizes, work=work, minutes=0.0)
    search = _Search(checkpoint, recipe, options, sizes, work, None)

    def once_ranked(progress: Progress) -> None:
        if any(one.judged for one in search.found):
            search.until = 0.0

    search.options = pipeline.RunOptions(report=once_ranked)
    (found,) = search.run()
    assert not found.complete
    assert found.best.loss.mean == min(one.loss.mean for one in found.judged)
    assert not any(one.final for one in found.judged)
    out = tmp_path / "out"
    pipeline.cut(checkpoint, found.best.plan, out, options)
    predicted = found.best.plan.predicted
    assert predicted is not None
    assert predicted.expert_sparsity >= 0.5
    pipeline.verify(out, checkpoint)


def test_sizes_are_read_from_flags(recipe: Recipe) -> None:
    assert sizes_of(recipe, "0.4, 0.5", None) == [Size(total=0.4), Size(total=0.5)]
    assert sizes_of(recipe, None, "1GB") == [Size(max_bytes=10**9)]
    assert sizes_of(recipe, None, None) == [Size(total=0.5)]
    assert str(Size(total=0.5)) == "total-0.5"
    for totals, max_bytes, says in (
        ("0.5", "1GB", "not both"),
        ("0.5,0.50", None, "given twice"),
        ("0.5,", None, "0 to less than 1"),
        ("1", None, "0 to less than 1"),
        ("nan", None, "0 to less than 1"),
        (None, "many", "5GB"),
    ):
        with pytest.raises(RecipeError, match=says):
            sizes_of(recipe, totals, max_bytes)


def test_the_floor_of_a_search_is_known_before(
    checkpoint: Checkpoint, recipe: Recipe
) -> None:
    one = estimate(checkpoint, recipe, [Size(total=0.5)])
    two = estimate(checkpoint, recipe, [Size(total=0.4), Size(total=0.5)])
    assert two.candidates == 2 * one.candidates
    # What is measured is measured once.
    assert one.flops < two.flops < 2 * one.flops
    assert 0 < one.floor_s < one.seconds


def test_a_search_needs_a_size_and_a_plan_is_no_search(
    checkpoint: Checkpoint, recipe: Recipe
) -> None:
    free = recipe.model_copy(update={"total_sparsity": None})
    with pytest.raises(RecipeError, match="needs --total or --bytes"):
        tune(checkpoint, free, pipeline.RunOptions())
    with pytest.raises(RecipeError, match="searches for a plan"):
        pipeline.plan(checkpoint, recipe, None)


def test_the_front_is_what_no_other_beats(tuned: Tuned, tmp_path: Path) -> None:
    final = [one for one in tuned.judged if one.final]
    found = front(final)
    for one in final:
        beaten = any(
            other.file_bytes <= one.file_bytes
            and other.loss.mean <= one.loss.mean
            and (other.file_bytes, other.loss.mean) != (one.file_bytes, one.loss.mean)
            for other in final
        )
        same = {(other.file_bytes, other.loss.mean) for other in found}
        assert ((one.file_bytes, one.loss.mean) in same) == (not beaten)
    picture = tmp_path / "front.png"
    check_plot(picture)
    plot_front([tuned], picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match="pictures are"):
        check_plot(tmp_path / "front.doc")


def test_a_sweep_gives_a_recipe_for_each_value() -> None:
    found = swept(load_recipe("stun40-paper"), "total=0.3:0.7:0.1")
    assert [one.total_sparsity for one in found] == [0.3, 0.4, 0.5, 0.6, 0.7]
    assert found[0].name == "stun40-paper-total-0.3"
    kept = swept(load_recipe("expert-drop"), "keep=2:6:2")
    assert [one.experts.keep for one in kept] == [2, 4, 6]
    shares = swept(load_recipe("stun40-paper"), "share=0:1:0.5")
    assert [one.structured_share for one in shares] == [0, 0.5, 1]
    layers = swept(load_recipe("layer-drop"), "moe-count=1:3:1")
    assert [one.layers.moe_count for one in layers] == [1, 2, 3]


@pytest.mark.parametrize(
    ("sweep", "says"),
    [
        ("total", "write KEY=FIRST:LAST:STEP"),
        ("total=0.2:x:0.1", "write KEY=FIRST:LAST:STEP"),
        ("total=0.2:0.7", "write KEY=FIRST:LAST:STEP"),
        ("total=0.7:0.2:0.1", "upwards"),
        ("total=0.2:0.7:0", "upwards"),
        ("total=0.2:0.7:Infinity", "write KEY=FIRST:LAST:STEP"),
        ("total=0:0.9:0.0001", "at most 1,000"),
        ("seed=1:3:1", "sweeps total, drop, keep"),
        ("keep=2:4:0.5", "whole numbers"),
        ("total=0.5:1.5:0.5", "total_sparsity: Input should be less than 1"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(sweep: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        swept(load_recipe("stun40-paper"), sweep)


def test_tune_stages_that_make_no_sense_are_refused() -> None:
    for data, says in (
        ({"shares": []}, "at least one entry"),
        ({"slims": ["none"]}, "writes no zeros"),
        ({"shares": [1.5]}, "less than or equal to 1"),
    ):
        with pytest.raises(RecipeError, match=says):
            parse_recipe({"tune": data}, "test")
    assert TuneStage().finalists >= 1
