"""Small models, plans that refit some of their layers, and cuts by them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.reference import LayerCut, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.data import Tokens, sha256_of
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import CutResult, execute_plan
from vllm_moe_prune.cut.verify import verify
from vllm_moe_prune.decide.cut_plan import CutPlan, load_plan

Cuts = dict[int, LayerCut]
HALF = LayerCut(keep=(0, 3, 5))
MERGED = LayerCut(
    keep=(0, 3, 5), clusters=((0, 1), (2, 3), (4, 5)), reconstruct=True, weights=None
)


def model(folder: Path, **options: Any) -> Checkpoint:
    """Three layers in float32; of six experts each where it is a Mixtral."""
    sizes = {"layers": 3, "hidden": 32, "width": 24, "dtype": "float32", "shards": 2}
    sizes |= {"tokenizer": False, "vocab": 64}
    if "model_type" not in options:
        sizes |= {"experts": 6}
    return open_checkpoint(tiny_checkpoint(folder, **(sizes | options)))


def some_tokens(windows: int = 15, length: int = 40) -> Tokens:
    """The same random ids every time."""
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
    """Cut, and verify what is written."""
    how = {"tokens": some_tokens()} | how
    result = execute_plan(checkpoint, plan, out, **how)
    verify(out, checkpoint)
    return open_checkpoint(out), result
