"""Which tensors belong to which expert, as their names tell.

The family's table lists the matrices of an expert. Whatever else stands below an expert
(a ``bias``, an ``input_scale``) is an extra of it and goes where the expert goes.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..archs.spec import Layout, MoeArch
from ..errors import CheckpointError

# Greedy: where a name has "experts.N." more than once, the last one counts.
EXPERT = re.compile(r"(?P<before>(?:.*\.)?experts\.)(?P<expert>\d+)(?P<after>\..+)\Z")


class Extra(NamedTuple):
    """A kind of tensor that every expert of a layer has, and the table does not know.

    Its name below the layer's prefix is ``before``, the expert, ``after``.
    """

    before: str
    after: str

    def name(self, expert: int) -> str:
        """Below the layer's prefix."""
        return f"{self.before}{expert}{self.after}"


@dataclass
class ExpertTensors:
    """The names of a checkpoint, sorted out once."""

    held: dict[tuple[int, str], set[int]] = field(default_factory=dict)
    """Expert ids per (layer, role) of the matrices that the table lists."""
    extras: dict[int, dict[Extra, set[int]]] = field(default_factory=dict)
    """Expert ids of every extra, by layer."""

    def experts_of(self, layer: int) -> set[int]:
        """Every expert of which a layer holds anything."""
        held = [ids for (at, _), ids in self.held.items() if at == layer]
        return set().union(*held, *self.extras.get(layer, {}).values())

    def check(self, layer: int, experts: int, key: str, where: str) -> None:
        """Refuse what could not be kept in step with a layer's experts.

        Args:
            layer: Its index.
            experts: How many it has; 0 where it has no MoE sublayer.
            key: The key of config.json that says so.
            where: Named in the error.

        Raises:
            CheckpointError: Naming the tensor.
        """
        if beyond := sorted(self.experts_of(layer) - set(range(experts))):
            found = f"{where}: layer {layer}: expert {beyond[0]} found, but"
            if experts:
                raise CheckpointError(f"{found} config.json says {key} is {experts}.")
            raise CheckpointError(f"{found} by config.json it has no experts.")
        for extra, ids in self.extras.get(layer, {}).items():
            if missing := sorted(set(range(experts)) - ids):
                raise CheckpointError(
                    f"{where}: layer {layer}: expert {min(ids)} has a tensor "
                    f"{extra.name(min(ids))!r}, expert {missing[0]} has none like it. "
                    "Give it to every expert of the layer or to none."
                )


def expert_tensors(
    arch: MoeArch, layout: Layout, names: Iterable[str], scales: frozenset[str]
) -> ExpertTensors:
    """Sort out the tensors of routers and experts.

    Args:
        arch: The family.
        layout: How the checkpoint spells its router and experts.
        names: Of all tensors, in their dense form.
        scales: Those that belong to a matrix of the table.
    """
    found = ExpertTensors()
    patterns = [(rule, rule.pattern) for rule in layout.rules]
    for name in names:
        layer = arch.layer_of(name)
        if layer is None or name in scales:
            continue
        matches = ((rule, pattern.match(name)) for rule, pattern in patterns)
        rule, match = next(((r, m) for r, m in matches if m), (None, None))
        if rule is not None and match is not None:
            # Packed tensors name no expert; their first axis is compared later.
            if rule.per_expert:
                ids = found.held.setdefault((layer, rule.role), set())
                ids.add(int(match["expert"]))
            continue
        inner = name.removeprefix(arch.layer_prefix.format(layer=layer))
        if one := EXPERT.match(inner):
            extra = Extra(one["before"], one["after"])
            extras = found.extras.setdefault(layer, {})
            extras.setdefault(extra, set()).add(int(one["expert"]))
    return found


def find_layout(
    arch: MoeArch, tensors: Collection[str], count: int, folder: Path
) -> Layout:
    """How a checkpoint spells its router and experts.

    Raises:
        CheckpointError: In no way that the family knows.
    """
    for layout in arch.layouts:
        # Any layer will do: leading ones may be dense, others dropped.
        for index in range(count):
            names = [layout.router.name(index)]
            names += [rule.name(index, 0) for rule in layout.experts]
            if all(name in tensors for name in names):
                return layout
    tried = ", ".join(layout.name for layout in arch.layouts)
    raise CheckpointError(
        f"{folder}: no router and experts found under the names of a "
        f"{arch.model_type} checkpoint (tried {tried})."
    )
