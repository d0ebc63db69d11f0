"""Tiny pruned checkpoints, and their recovery."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.family_cases import Case, make_original, make_plan
from tests.reference import LayerCut
from tests.tiny import tiny_text, write_tokenizer
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.pipeline import RunOptions, recover
from vllm_moe_prune.recipes.schema import Calibration
from vllm_moe_prune.recover.options import Training, training

HALF = LayerCut(sparsity=0.5)
MIXTRAL = Case("mixtral", {0: LayerCut(keep=(1, 4, 6), sparsity=0.5), 1: HALF})


def make(
    folder: Path,
    case: Case,
    dtype: str = "bfloat16",
    change: Callable[[Path], None] = lambda original: None,
) -> tuple[Path, Path]:
    """The folders of an original, changed if asked, and of what a plan leaves of it."""
    case = dataclasses.replace(
        case, config={**case.config, "vocab": 512, "dtype": dtype}
    )
    original = make_original(folder / "original", case)
    write_tokenizer(original)
    change(original)
    plan = load_plan(make_plan(original, case))
    execute_plan(open_checkpoint(original), plan, folder / "pruned")
    return original, folder / "pruned"


def text(folder: Path) -> Calibration:
    source = str(tiny_text(folder, 30_000))
    return Calibration(source=source, samples=100, sequence_length=32, heldout=12)


def go(
    folder: Path,
    pruned: Path,
    asked: Training,
    original: Path | None = None,
    out: str = "out",
    **options: Any,
) -> dict[str, Any]:
    """Recover; returns what provenance says of it."""
    source = None if original is None else open_checkpoint(original)
    recover(
        open_checkpoint(pruned),
        source,
        folder / out,
        asked,
        text(folder),
        RunOptions(**options),
    )
    found: dict[str, Any] = json.loads((folder / out / "provenance.json").read_text())
    return found["recovered"][-1]


def ask(checkpoint: Path, method: str, **values: Any) -> Training:
    values = {"steps": 2, "batch_size": 4, "rank": 4} | values
    return training(open_checkpoint(checkpoint).arch, method, **values)
