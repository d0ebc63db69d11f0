"""What a long stage tells whoever is watching, once per layer or 64 MiB."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a stage has come."""

    stage: str
    layer: int
    """Layers finished."""
    layers: int
    bytes_done: int
    bytes_total: int


Report = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """The report of a caller that does not watch."""
