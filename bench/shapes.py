"""Shapes of MoE layers that several benches measure."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One MoE layer."""

    hidden: int
    width: int
    experts: int
    top_k: int


MIXTRAL = Shape(4096, 14336, 8, 2)
DEEPSEEK_V2_LITE = Shape(2048, 1408, 64, 6)
