"""Triton kernels without a device: interpreted, and compiled for every one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.limits import above_limits

ROOT = Path(__file__).parents[2]
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


LAYERS = {
    # Pointers to values and to scales, and devices.
    "bf16": ("*bf16", "*bf16", CAPABILITIES),
    # Integers do the same on all; the newest and the oldest.
    "fp8": ("*u8", "*fp32", (80, 120)),
}


def used(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What every variant of every kernel takes on every device."""
    pytest.importorskip("triton")
    from tests.compiling import compiled
    from vllm_moe_prune.kernels.triton import expand, fused

    kernels = [
        (expand, expand.expand_kernel, {"SOURCES": 2}),
        (fused, fused.gate_up_kernel, {"TOP_K": 2, "GROUP": fused.GROUP}),
        (fused, fused.down_kernel, {"GROUP": fused.GROUP}),
    ]
    found = {}
    for stored, (values, scales, capabilities) in LAYERS.items():
        types = dict.fromkeys(("x_TD", "inner_SF", "out_ENK"), "*bf16")
        types["starts_EB1"] = "*i64"
        types |= dict.fromkeys(("weight_S", "out_SD"), "*fp32")
        types |= dict.fromkeys(("masks_EBS", "used_E", "expert_G", "slot_GM"), "*i32")
        for module, kernel, constants in kernels:
            sizes = {"BLOCKS": module.BLOCKS, "STEPS": module.STEPS}
            known = {"SCALED": stored == "fp8"} | sizes | constants
            # It copies what has no scales as integers.
            if module is expand and stored != "fp8":
                types |= dict.fromkeys(("values", "scales_EBC", "out_ENK"), "*i16")
            else:
                types |= {"values": values, "scales_EBC": scales}
            names = [name for name in kernel.arg_names if name not in known]
            for capability in capabilities:
                took = compiled(
                    *(kernel, capability),
                    {name: types.get(name, "i32") for name in names},
                    *(known, tmp_path),
                    num_warps=module.WARPS,
                    num_stages=1,
                )
                name = kernel.fn.__name__.removesuffix("_kernel")
                found[f"{name} {stored} sm_{capability}"] = took._asdict()
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)  # 20 s of processor time
def test_kernels_take_no_more_than_they_did(
    tmp_path: Path, update_golden: bool
) -> None:
    """More must be accepted by hand: --update-golden."""
    found = used(tmp_path)
    assert not above_limits(found, "triton.json", update=update_golden)
    assert not any(took["spilled"] for took in found.values())
