"""Told to vLLM now, imported when vLLM needs it.

vLLM loads plugins in each of a server's three processes, before it has imported what
models are made of, and two of the three never do. What is registered with it as a class
would drag all of that in: a second or more until the server is ready.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


def when_imported(module: str, then: Callable[[], None]) -> None:
    """Do something as soon as a module has been imported; now, if it has been."""
    if module in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _ImportHook(module, then))


class _ImportHook(MetaPathFinder):
    """Leaves finding to those behind it, but adds something to the loader's work."""

    def __init__(self, module: str, then: Callable[[], None]) -> None:
        self.module, self.then = module, then

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """What the others find; it may be looked for without being imported."""
        if fullname != self.module:
            return None
        # Those before it have been asked already, and found nothing.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Then(spec.loader, self)
                return spec
        return None

    def imported(self) -> None:
        """What was waited for has happened; once is enough."""
        if self in sys.meta_path:
            # If it raises, the import fails, and the next one tries again.
            self.then()
            sys.meta_path.remove(self)


class _Then(Loader):
    """Another loader's work, and then something else."""

    def __init__(self, loader: Loader, watch: _ImportHook) -> None:
        self.loader, self.watch = loader, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the loader does; the module knows only that one."""
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.watch.imported()


def quantization(load: Callable[[], type[Any]]) -> type[QuantizationConfig]:
    """Stands for a configuration class until a model has such a configuration.

    Args:
        load: Imports the class.
    """

    class Deferred(QuantizationConfig):
        def __new__(cls) -> Any:
            """Without a block in config.json; never one of this class."""
            # No instance of Deferred, so Python does not call __init__ on it.
            return load()()

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
            found: QuantizationConfig = load().from_config(config)
            return found

        @staticmethod
        def get_config_filenames() -> list[str]:
            """None: the block in config.json says everything."""
            return []

    return Deferred
