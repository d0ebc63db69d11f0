"""Experts that are routed by groups: how many may leave each, and in what order.

Routing chooses the best groups of a layer and then experts within them, so every group
must keep a few (``LayerShape.group_floor``). ``equal`` takes one expert from every
group at a time, so that stock routers, which cut rows into equal groups, see the right
ones; ``uneven`` takes the lowest of the layer, and the remap table keeps the groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..recipes.schema import ExpertStage
from .cut_plan import LayerShape


class HasHeight(Protocol):
    """One expert leaving a layer."""

    @property
    def height(self) -> float: ...


T = TypeVar("T", bound=HasHeight)


@dataclass(frozen=True)
class Together(Generic[T]):
    """Experts that leave at once: one, or one of every group."""

    steps: tuple[T, ...]

    @property
    def height(self) -> float:
        """That of the last of them."""
        return max(step.height for step in self.steps)


def together(shape: LayerShape, stage: ExpertStage) -> int:
    """How many experts of a layer leave at once."""
    equal = shape.groups is not None and stage.equal_groups
    return len(_sizes(shape)) if equal else 1


def grouped_room(layer: int, shape: LayerShape, stage: ExpertStage) -> int:
    """How many experts the groups of a layer can lose in all."""
    rooms = _rooms(layer, shape, stage).values()
    if together(shape, stage) > 1:
        # All lose equally many, so the tightest group sets the number.
        return min(rooms) * len(rooms)
    return sum(rooms)


def in_groups(
    steps: Sequence[T],
    expert_of: Callable[[T], int],
    layer: int,
    shape: LayerShape,
    stage: ExpertStage,
) -> list[Together[T]]:
    """A layer's steps, lowest first, as they may be taken.

    Args:
        steps: All of them, lowest first.
        expert_of: An expert of the group that a step takes from.
        layer: The layer, for its protected experts.
        shape: Its groups.
        stage: Says whether they lose equally many.
    """
    if shape.groups is None:
        return [Together((step,)) for step in steps]
    rooms = _rooms(layer, shape, stage)
    taken: dict[int, list[T]] = {group: [] for group in rooms}
    allowed = []
    for step in steps:
        group = shape.groups[expert_of(step)]
        # A group without room is passed over: each loses a prefix of its own steps.
        if len(taken[group]) < rooms[group]:
            taken[group].append(step)
            allowed.append(step)
    if not stage.equal_groups:
        return [Together((step,)) for step in allowed]
    # The n-th step of every group at once; it ends with the tightest group.
    return [Together(one_each) for one_each in zip(*taken.values(), strict=False)]


def _sizes(shape: LayerShape) -> dict[int, int]:
    groups = shape.groups or (0,) * shape.num_experts
    return {group: groups.count(group) for group in sorted(set(groups))}


def _rooms(layer: int, shape: LayerShape, stage: ExpertStage) -> dict[int, int]:
    """How many experts each group can lose."""
    groups = shape.groups or (0,) * shape.num_experts
    protected = [groups[expert] for expert in stage.protected.get(layer, ())]
    return {
        # Protected experts count towards the floor.
        group: max(0, size - max(shape.group_floor, protected.count(group)))
        for group, size in _sizes(shape).items()
    }
