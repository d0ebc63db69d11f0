"""Tiny checkpoints with experts in fewer bits, in every form there is."""

from pathlib import Path
from typing import Any

from tests.quantized import add_outliers
from tests.reference import Cuts, write_plan
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.calibrate.data import load_tokens
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import CutResult, execute_plan
from vllm_moe_prune.cut.predict import with_prediction
from vllm_moe_prune.decide.cut_plan import CutPlan, load_plan
from vllm_moe_prune.recipes.schema import Calibration, QuantizeStage

INT4 = {"method": "rtn", "weights": "int4", "group_size": 32}
ALL = ["experts", "attention", "shared", "mlp", "head"]
"""Of ``scope``."""
STAGES: dict[str, dict[str, Any]] = {
    "int4": INT4,
    "zero-points": INT4 | {"zero_point": True},
    "int8": {"method": "rtn", "weights": "int8"},
    "fp8": {"method": "rtn", "weights": "fp8", "group_size": 128},
    "fp8-rows": {"method": "rtn", "weights": "fp8"},
    "gptq": INT4 | {"method": "gptq", "zero_point": True},
    "gptq-ordered": INT4 | {"method": "gptq", "act_order": True},
    "awq": INT4 | {"method": "awq", "zero_point": True},
    "all-int8": {"method": "rtn", "weights": "int8", "scope": ALL},
    "all-gptq": INT4 | {"method": "gptq", "zero_point": True, "scope": ALL},
}


def tiny(folder: Path, model_type: str = "mixtral", **options: Any) -> Checkpoint:
    sizes = {"hidden": 128, "width": 128}
    tiny_checkpoint(folder, model_type=model_type, **(sizes | options))
    return open_checkpoint(add_outliers(folder))


def planned(checkpoint: Checkpoint, cuts: Cuts, stage: dict[str, Any]) -> CutPlan:
    path = checkpoint.folder.with_name("plan.json")
    plan = load_plan(write_plan(path, checkpoint, cuts))
    stage_model = QuantizeStage.model_validate(stage)
    return with_prediction(
        checkpoint, plan.model_copy(update={"quantize": stage_model}), 60_000
    )


def quantized(
    checkpoint: Checkpoint,
    out: Path,
    cuts: Cuts,
    stage: dict[str, Any],
    samples: int = 4,
    **how: Any,
) -> tuple[CutPlan, CutResult]:
    plan = planned(checkpoint, cuts, stage)
    tokens = None
    if plan.needs_activations:
        text = str(tiny_text(checkpoint.folder.parent))
        calibration = Calibration(source=text, samples=samples, sequence_length=64)
        tokens = load_tokens(checkpoint, calibration)
    result = execute_plan(
        checkpoint, plan, out, tokens=tokens, max_shard_bytes=60_000, **how
    )
    return plan, result
