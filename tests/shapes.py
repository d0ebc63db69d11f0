"""What decisions know of a layer, without a checkpoint."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    num_experts: int = 8
    top_k: int = 2
    has_moe: bool = True
    groups: tuple[int, ...] | None = None
    group_floor: int = 1
    mtp: bool = False
