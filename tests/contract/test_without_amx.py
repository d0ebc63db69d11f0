"""``WITHOUT_AMX=1 make test`` runs as on a processor without AMX."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "without_amx"
ASKING = """
import torch

# A processor that has everything, whatever this one has.
real = torch._C._cpu._get_cpu_capability()
everything = real | {"amx_tile": True, "amx_fp16": True, "avx512_bf16": True}
torch._C._cpu._get_cpu_capability = lambda: everything
from vllm_moe_prune.kernels import cpu_library
from vllm_moe_prune.plugin.compat import has_amx

print(
    has_amx(),
    torch.cpu._is_amx_fp16_supported(),
    torch.cpu._is_avx512_bf16_supported(),
    torch.cpu.get_capabilities()["architecture"] == real["architecture"],
    cpu_library.level() < cpu_library.AMX,
)
"""


def ask(*first: Path) -> list[str]:
    root = FOLDER.parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*first, root]))}
    ran = subprocess.run(
        [sys.executable, "-c", ASKING],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return ran.stdout.split()


def test_a_processor_without_amx_is_told_from_one_with_it() -> None:
    assert ask()[:4] == ["True", "True", "True", "True"]
    assert ask(FOLDER) == ["False", "False", "True", "True", "True"]
