"""What a run leaves on record in its output, for the report: statistics and sums."""

from pathlib import Path

import pytest
import torch

from tests.reference import read_json
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_expert
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.output import STATS_FILE
from vllm_moe_prune.decide.cut_plan import CutPlan
from vllm_moe_prune.pipeline import RunOptions, run
from vllm_moe_prune.recipes.flags import with_overrides
from vllm_moe_prune.recipes.loading import load_recipe

FLAGS = {"samples": 2, "sequence_length": 32, "total": 0.5, "drop": 0.25}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its STUN output, with the statistics kept beside it."""
    folder = tmp_path_factory.mktemp("record")
    source = tiny_checkpoint(
        folder / "in", layers=2, experts=4, hidden=32, width=48, dtype="float32"
    )
    flags = FLAGS | {"calibration": str(tiny_text(folder, 8000))}
    recipe = with_overrides(load_recipe("stun40-paper"), flags)
    stats = folder / "stats.safetensors"
    run(open_checkpoint(source), recipe, folder / "out", RunOptions(), stats)
    return folder


def powers(checkpoint: Checkpoint, layer: int, experts: tuple[int, ...]) -> list[float]:
    """Sums of powers of the non-zero weights of some experts of a layer."""
    view = checkpoint.layers[layer]
    weights = torch.cat(
        [
            matrix.flatten().double()
            for expert in experts
            for matrix in read_expert(checkpoint, view, expert)
        ]
    )
    weights = weights[weights != 0]
    return [float((weights**power).sum()) for power in range(5)]


def test_the_output_keeps_the_statistics_its_plan_was_made_from(folder: Path) -> None:
    kept = folder / "out" / STATS_FILE
    assert kept.read_bytes() == (folder / "stats.safetensors").read_bytes()
    weights = {path.name for path in (folder / "out").glob("*.safetensors")}
    assert kept.name not in weights, "loaders would take it for weights"


def test_the_provenance_holds_the_powers_of_weights_before_and_after_slimming(
    folder: Path,
) -> None:
    provenance = read_json(folder / "out" / "provenance.json")
    plan = CutPlan.model_validate(read_json(folder / "out" / "plan.json"))
    source, output = open_checkpoint(folder / "in"), open_checkpoint(folder / "out")
    assert [entry["layer"] for entry in provenance["weight_powers"]] == [0, 1]
    for entry, layer in zip(provenance["weight_powers"], plan.layers, strict=True):
        assert layer.sparsity > 0
        assert not layer.reconstruct
        before = powers(source, layer.layer, layer.keep)
        after = powers(output, layer.layer, tuple(range(len(layer.keep))))
        assert entry["trimmed"] == pytest.approx(before, rel=1e-8)
        assert entry["slimmed"] == pytest.approx(after, rel=1e-8)
    assert provenance["source_bytes"] == source.stored_bytes
