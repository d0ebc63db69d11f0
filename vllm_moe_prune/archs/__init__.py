"""The supported families: a module here named after config.json's ``model_type``."""

import importlib
import pkgutil
from collections.abc import Sequence

from ..errors import CheckpointError
from .spec import MoeArch

__all__ = ["ALIASES", "ALIAS_CHECKPOINTS", "find_arch", "known", "supported"]

ALIASES = {"kimi_k2": "deepseek_v3"}
"""Families whose tensors, routers and config keys are those of another one's table."""
ALIAS_CHECKPOINTS = {"kimi_k2": "Kimi-K2"}
"""Their published checkpoints, for people."""
NO_TABLES = ("pattern", "spec", "support")


def supported() -> list[str]:
    """Every ``model_type`` that has a table, sorted."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if name not in NO_TABLES)


def known() -> list[str]:
    """Every ``model_type`` that is read: those with a table, and aliases; sorted."""
    return sorted([*supported(), *ALIASES])


def find_arch(
    model_type: object, where: str, architectures: Sequence[object] = ()
) -> MoeArch:
    """The table of a family.

    Args:
        model_type: As config.json has it.
        where: Named in the error for an unknown one.
        architectures: The classes that config.json names; they tell what an unknown
            one may be another name of.

    Raises:
        CheckpointError: There is no such table.
    """
    # It comes from the file, and becomes part of a module's name below.
    if model_type not in known():
        found = _meant(str(model_type), architectures)
        meant = f" If it is a {found}, set model_type to {found!r}." if found else ""
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not supported. "
            f"Supported families: {', '.join(known())}.{meant}"
        )
    return _table(ALIASES.get(str(model_type), str(model_type)))


def _table(model_type: str) -> MoeArch:
    arch = importlib.import_module(f"{__name__}.{model_type}").ARCH
    assert isinstance(arch, MoeArch)
    return arch


def _meant(alias: str, architectures: Sequence[object]) -> str | None:
    """The family of which a name seems to be another spelling, if there is one."""
    # A class name is better evidence than a similar model_type.
    for model_type in supported():
        arch = _table(model_type)
        if {arch.stock_architecture, arch.pruned_architecture} & {
            *map(str, architectures)
        }:
            return model_type
    plain = {_letters(name): name for name in supported()}
    return plain.get(_letters(alias))


def _letters(name: str) -> str:
    """A name without what spellings differ in: case, hyphens, words for a class."""
    letters = "".join(each for each in name.lower() if each.isalnum())
    return letters.removesuffix("forcausallm").removesuffix("moe")
