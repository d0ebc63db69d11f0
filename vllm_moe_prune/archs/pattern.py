"""Which decoder layers have experts, and keys of config.json; words of ``spec.py``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SPARSE, DENSE = "sparse", "dense"


@dataclass(frozen=True)
class Key:
    """A key of config.json, and what holds where it is absent or null.

    A constant is a key without a name.
    """

    name: str | None
    default: Any

    def read(self, config: Mapping[str, Any]) -> Any:
        """The value that ``config`` gives it."""
        value = config.get(self.name) if self.name is not None else None
        return self.default if value is None else value


@dataclass(frozen=True)
class MoePattern:
    """Which decoder layers have experts, as two keys of config.json say it.

    Layer i has them if ``i >= first`` and ``(i + offset) % frequency == 0``, or, where
    config.json has the list ``types``, if that says "sparse" of it and not "dense".
    """

    first: Key = Key(None, 0)
    frequency: Key = Key(None, 1)
    offset: int = 0
    types: str | None = None
    """The key of a list that transformers reads, while vLLM reads ``first``."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the keys that the family has."""
        return tuple(key.name for key in (self.first, self.frequency) if key.name)

    def has_moe(self, view: Mapping[str, Any], index: int) -> bool:
        """Whether a layer has experts; ``view`` is the config as this layer sees it."""
        listed = self.listed(view)
        return self.counted(view, index) if listed is None else listed[index] == SPARSE

    def listed(self, view: Mapping[str, Any]) -> list[str] | None:
        """The list of types; None where there is none."""
        found: list[str] | None = view.get(self.types) if self.types else None
        return found

    def counted(self, view: Mapping[str, Any], index: int) -> bool:
        """What the two keys alone say."""
        first, frequency = self.first.read(view), self.frequency.read(view)
        return bool(index >= first and (index + self.offset) % frequency == 0)

    def renumbered(
        self, config: Mapping[str, Any], has_moe: Sequence[bool | None]
    ) -> tuple[dict[str, int], dict[int, dict[str, int]]]:
        """How config.json says which of the layers that are left have experts.

        Args:
            config: The config before, whose values stay if they can.
            has_moe: One entry per layer that is left; None where it does not matter.

        Returns:
            Changed global values, and for layers that no global values describe
            what they see instead.
        """
        # Index of the first layer with experts, before which all may be dense.
        dense = next((at for at, moe in enumerate(has_moe) if moe), len(has_moe))
        changes: list[dict[str, int]] = [{}]
        if self.first.name:
            changes.append({self.first.name: dense})
            if self.frequency.name:
                changes.append({self.first.name: dense, self.frequency.name: 1})
        elif self.frequency.name:
            changes.append({self.frequency.name: 1})
        # Fewest changes first; a None entry agrees with any of them.
        for change in changes:
            if not self._wrong({**config, **change}, has_moe):
                return change, {}
        # No global values fit: they stay, and single layers see others.
        wrong = self._wrong(config, has_moe)
        return {}, {index: self._alone(index, moe) for index, moe in wrong.items()}

    def spelled(
        self, config: Mapping[str, Any], alone: Mapping[int, Mapping[str, int]], n: int
    ) -> dict[str, Any]:
        """The same for both readers, where the family has two.

        Args:
            config: With the values of ``renumbered``; its list of types may be stale.
            alone: What single layers see instead.
            n: How many layers there are.
        """
        if self.types is None or self.first.name is None:
            return {}
        moe = (self.counted({**config, **alone.get(at, {})}, at) for at in range(n))
        types = [SPARSE if one else DENSE for one in moe]
        return {self.first.name: self.first.read(config), self.types: types}

    def _wrong(
        self, config: Mapping[str, Any], has_moe: Sequence[bool | None]
    ) -> dict[int, bool]:
        return {
            index: moe
            for index, moe in enumerate(has_moe)
            if moe is not None and self.counted(config, index) != moe
        }

    def _alone(self, index: int, moe: bool) -> dict[str, int]:
        """Values under which one layer has, or has not, experts."""
        if moe:
            values = {self.first.name: 0, self.frequency.name: 1}
        elif self.first.name:
            # Experts would begin behind this layer.
            values = {self.first.name: index + 1}
        else:
            # n % (n + 1) is n: not 0, as i + offset is at least 1 in such a family.
            values = {self.frequency.name: index + self.offset + 1}
        return {name: value for name, value in values.items() if name is not None}
