"""Wishes: what each becomes for a checkpoint, and that the size asked for is kept."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.stats import Stats
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cli import app
from vllm_moe_prune.cut.predict import with_prediction
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import RecipeError
from vllm_moe_prune.recipes.flags import with_overrides
from vllm_moe_prune.recipes.loading import load_recipe, wished
from vllm_moe_prune.recipes.schema import Recipe
from vllm_moe_prune.tune.wishes import first_that_fits, saves_for

SMALL = {"samples": 2, "sequence_length": 32, "heldout": 2}
FLAGS = "--calibration text.txt --samples 2 --sequence-length 32 --heldout 2"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("wishes")
    tiny_text(folder, 8000)
    model = tiny_checkpoint(folder / "ckpt", layers=2, experts=8, hidden=64, width=128)
    return open_checkpoint(model)


@pytest.fixture(scope="module")
def stats(checkpoint: Checkpoint) -> Stats:
    recipe = asked(checkpoint, "cpu50")
    tokens = pipeline.measuring_tokens(checkpoint, recipe)
    return pipeline.measure(checkpoint, recipe, tokens, pipeline.RunOptions())


def asked(checkpoint: Checkpoint, name: str, **flags: object) -> Recipe:
    text = str(checkpoint.folder.parent / "text.txt")
    return with_overrides(load_recipe(name), {"calibration": text, **SMALL, **flags})


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["default", "gpu-fp8", "cpu50"])
def test_the_files_are_at_most_as_large_as_asked(
    checkpoint: Checkpoint, stats: Stats, name: str, tmp_path: Path
) -> None:
    limit = int(0.6 * checkpoint.tensor_bytes)
    recipe = asked(checkpoint, name, bytes=limit)
    plan = pipeline.plan(checkpoint, recipe, stats)
    assert plan.predicted is not None
    assert plan.predicted.file_bytes <= limit
    # The least total that fits: a little less would not.
    assert plan.recipe.max_bytes is None
    assert plan.recipe.total_sparsity is not None
    less = {"total_sparsity": plan.recipe.total_sparsity - 1e-3}
    larger = pipeline.plan(checkpoint, plan.recipe.model_copy(update=less), stats)
    assert larger.predicted is not None
    assert larger.predicted.file_bytes > limit
    pipeline.cut(checkpoint, plan, tmp_path / "out", pipeline.RunOptions())
    assert file_bytes(tmp_path / "out") == plan.predicted.file_bytes
    again = pipeline.plan(checkpoint, plan.recipe, stats)
    assert again == plan


@pytest.mark.parametrize("name", ["default", "cpu50"])
def test_a_wish_runs_from_nothing(
    checkpoint: Checkpoint, name: str, tmp_path: Path
) -> None:
    recipe = asked(checkpoint, name)
    out, options = tmp_path / "out", pipeline.RunOptions()
    plan, _, _ = pipeline.run(checkpoint, recipe, out, options)
    assert plan.predicted is not None
    assert file_bytes(out) == plan.predicted.file_bytes


def test_what_fits_already_loses_nothing(checkpoint: Checkpoint, stats: Stats) -> None:
    plan = pipeline.plan(checkpoint, asked(checkpoint, "cpu50", bytes="1GB"), stats)
    assert plan.predicted is not None
    assert plan.predicted.expert_sparsity == 0


def test_a_size_that_nothing_reaches_says_how_small_it_gets(
    checkpoint: Checkpoint, stats: Stats
) -> None:
    recipe = asked(checkpoint, "default", bytes=1000)
    with pytest.raises(RecipeError, match=r"as small as 1,000 bytes, only [\d,]+\."):
        pipeline.plan(checkpoint, recipe, stats)


def test_zeros_are_counted_as_they_will_be_stored(
    checkpoint: Checkpoint, stats: Stats
) -> None:
    recipe = asked(checkpoint, "cpu65")
    plan = pipeline.plan(checkpoint, recipe, stats)
    dense = plan.recipe.model_copy(update={"storage": "dense"})
    whole = with_prediction(checkpoint, plan.model_copy(update={"recipe": dense}))
    assert plan.predicted is not None
    assert whole.predicted is not None
    assert plan.predicted.file_bytes < whole.predicted.file_bytes


def test_a_gpu_gets_fewer_bits_only_where_experts_are_not_enough(
    checkpoint: Checkpoint,
) -> None:
    found = {}
    for share in (2.0, 0.75, 0.6, 0.4, 0.2):
        size = int(share * checkpoint.tensor_bytes)
        recipes = [with_overrides(one, {"bytes": size}) for one in wished(None, "gpu")]
        found[share] = first_that_fits(checkpoint, recipes).name
    chosen = list(found.values())
    assert list(dict.fromkeys(chosen)) == ["gpu", "gpu-fp8", "gpu-int4"]


def test_only_what_saves_there_is_recommended() -> None:
    names = {wish: set[str]() for wish in ("any", "cpu", "gpu")}
    for wish, found in names.items():
        for name in ("default", "cpu50", "wanda50", "awq4"):
            if saves_for(load_recipe(name), wish):
                found.add(name)
    assert names == {
        "any": {"default"},
        "cpu": {"default", "cpu50", "awq4"},
        "gpu": {"default", "awq4"},
    }


def test_flags_make_the_plan_and_dense_zeros_are_pointed_out(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.folder.parent)
    runner = CliRunner()
    how = "--recipe wanda50 --slim sparsegpt --pattern 2:4"
    said = runner.invoke(app, f"plan ckpt -o zeros.json {how} {FLAGS}")
    assert said.exit_code == 0, said.output
    assert "zeros stored dense" in said.stderr
    plan = load_plan(Path("zeros.json"))
    assert (plan.slim, plan.pattern) == ("sparsegpt", "2:4")
    how = "--recipe expert-drop --criterion reap --budget per-layer --drop 0.5"
    measured = runner.invoke(app, f"measure ckpt -o s.safetensors {how} {FLAGS}")
    assert measured.exit_code == 0, measured.output
    said = runner.invoke(
        app, f"plan ckpt -o experts.json --stats s.safetensors {how} {FLAGS}"
    )
    assert said.exit_code == 0, said.output
    assert said.stderr == ""
    decided = load_plan(Path("experts.json"))
    assert decided.recipe.experts.criterion == "reap"
    assert [len(layer.keep) for layer in decided.layers] == [4, 4]


def test_recommend_sizes_the_wish(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.folder.parent)
    size = int(0.5 * checkpoint.tensor_bytes)
    said = CliRunner().invoke(app, f"recommend ckpt --for cpu --bytes {size}")
    assert said.exit_code == 0, said.output
    assert f"--for cpu --bytes {size}" in said.stdout
    assert "wanda50" not in said.stdout
