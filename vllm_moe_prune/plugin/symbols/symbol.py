"""What an entry of the list of vLLM's symbols says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Symbol:
    """Something of vLLM's that we import, subclass, call or read."""

    module: str
    """Where we import it from, or where its class is defined."""
    name: str
    """Its name there; ``Class.member`` for what we call, override or read."""
    parameters: tuple[str, ...] | None = None
    """Every parameter that we pass, or accept when overriding; None: not called."""


def members(module: str, owner: str, *names: str) -> tuple[Symbol, ...]:
    """One symbol for each attribute or method of a class."""
    return tuple(Symbol(module, f"{owner}.{name}") for name in names)
