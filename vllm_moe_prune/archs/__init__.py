"""The supported families: a module here named after config.json's ``model_type``."""

import importlib
import pkgutil

from ..errors import CheckpointError
from .spec import MoeArch

__all__ = ["find_arch", "supported"]


def supported() -> list[str]:
    """Every ``model_type`` that has a table, sorted."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if name != "spec")


def find_arch(model_type: object, where: str) -> MoeArch:
    """The table of a family; ``where`` is named in the error for an unknown one."""
    if model_type not in supported():
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not supported. "
            f"Supported families: {', '.join(supported())}."
        )
    arch = importlib.import_module(f"{__name__}.{model_type}").ARCH
    assert isinstance(arch, MoeArch)
    return arch
