"""Hides AMX from every Python started with this folder first on PYTHONPATH.

Torch's question for tiles is answered no, which is also vLLM's, ours gets the next best
instructions, and oneDNN, which asks the processor itself, is told to leave them alone.
``tests/conftest.py`` does it for a whole run: ``WITHOUT_AMX=1 make test``.
"""

import os
import sys
from collections.abc import Callable
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"


def hide_from_torch(module: ModuleType) -> None:
    asked: Callable[[], dict[str, Any]] = module.get_capabilities

    @cache
    def get_capabilities() -> MappingProxyType[str, Any]:
        hidden = {name: False for name in asked() if name.startswith("amx")}
        return MappingProxyType({**asked(), **hidden})

    module.get_capabilities = get_capabilities


def hide_from_vllm(module: ModuleType) -> None:
    module.cpu_has_amx_fp8 = lambda: False


def hide_from_us(module: ModuleType) -> None:
    asked: Callable[[], int] = module.level
    module.level = cache(lambda: min(asked(), module.BF16))


HIDERS = {
    "torch.cpu": hide_from_torch,
    "vllm._custom_ops": hide_from_vllm,
    "vllm_moe_prune.kernels.cpu_library": hide_from_us,
}


class Finder:
    """Leaves finding to those behind it, and hides AMX from what has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in HIDERS:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in behind)
        spec = next(filter(None, specs), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                HIDERS[name](module)

            spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
