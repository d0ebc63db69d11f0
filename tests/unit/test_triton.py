"""Triton kernels without a device: interpreted, and compiled for every one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "triton.json"
CAPABILITIES = (80, 86, 89, 90, 120)


def test_kernels_are_right_under_the_interpreter() -> None:
    """In a process of its own: Triton asks once whether to interpret."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/interpreted"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # Nothing collected is 5.
    assert result.returncode == 0, result.stdout + result.stderr


def used(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What every variant of every kernel takes on every device."""
    pytest.importorskip("triton")
    from tests.compiling import compiled
    from vllm_moe_prune.kernels.triton import expand

    numbers = dict.fromkeys(("n", "k", "steps", "blocks"), "i32")
    found = {}
    for scaled in (False, True):
        kinds = ("*u8", "*fp32", "*bf16") if scaled else ("*i16", "*i16", "*i16")
        pointers = {"masks_EBS": "*i32", "starts_EB1": "*i64", "used_E": "*i32"}
        pointers |= zip(("values", "scales_EBC", "out_ENK"), kinds, strict=True)
        sizes = {"BLOCKS": expand.BLOCKS, "STEPS": expand.STEPS}
        constants = {"SOURCES": 2, "SCALED": scaled, **sizes}
        for capability in CAPABILITIES:
            took = compiled(
                *(expand.expand_kernel, capability, pointers | numbers, constants),
                *(tmp_path,),
                num_warps=expand.WARPS,
                num_stages=1,
            )
            name = f"expand{' fp8' if scaled else ''} sm_{capability}"
            found[name] = took._asdict()
    return found


def test_kernels_take_no_more_than_they_did(
    tmp_path: Path, update_golden: bool
) -> None:
    """More must be accepted by hand: --update-golden."""
    found = used(tmp_path)
    if update_golden:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    limits = json.loads(GOLDEN.read_text("utf-8"))
    assert found.keys() == limits.keys()
    more = {
        name: (took, limits[name])
        for name, took in found.items()
        if any(took[what] > limits[name][what] for what in took)
    }
    assert not more
    assert not any(took["spilled"] for took in found.values())
