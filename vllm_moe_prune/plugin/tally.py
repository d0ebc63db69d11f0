"""Counts router and expert weights while they stream into a model.

vLLM notices a missing parameter by its name, and all experts of a layer share one
parameter: a checkpoint without expert 5 loads silently with whatever was in memory.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import torch

from ..archs.spec import MoeArch, Role
from ..checkpoint.compressed import dense_name
from ..errors import CheckpointError
from .layers import ServedLayer

Piece = tuple[int, int, Role]
"""Layer, expert (-1 for the router), gate, up, down or router."""


class WeightTally:
    """Demands every router and every expert matrix exactly once."""

    def __init__(
        self, arch: MoeArch, layers: Sequence[ServedLayer], where: str
    ) -> None:
        """The layers say what to expect; ``where`` is named in every error."""
        self._layers = layers
        self._where = where
        self._patterns: list[tuple[re.Pattern[str], Role]] = list(
            dict.fromkeys(
                (rule.pattern, rule.role)
                for layout in arch.layouts
                for rule in layout.rules
            )
        )
        self._seen: set[Piece] = set()

    def watch(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass weights on, refusing one that is unknown or comes a second time."""
        for name, tensor in weights:
            for piece in self._pieces(name, tensor):
                if piece in self._seen:
                    raise CheckpointError(
                        f"{self._where}: {_describe(piece)} is there twice; the second "
                        f"is {name!r}."
                    )
                self._seen.add(piece)
            yield name, tensor

    def finish(self) -> None:
        """Refuse if anything was missing."""
        missing = [piece for piece in self._expected() if piece not in self._seen]
        if missing:
            raise CheckpointError(
                f"{self._where}: {_describe(missing[0])} is missing "
                f"({len(missing)} such weights)."
            )

    def _expected(self) -> Iterator[Piece]:
        for layer in self._layers:
            if layer.has_moe:
                yield layer.index, -1, "router"
            for expert in range(layer.experts):
                for role in ("gate", "up", "down"):
                    yield layer.index, expert, role

    def _pieces(self, name: str, tensor: torch.Tensor) -> Iterator[Piece]:
        # Of a matrix stored in parts the mask counts; the loader wants all of them.
        dense = dense_name(name)
        found = None if dense is None else self._match(dense)
        if found is None:
            return
        match, role = found
        index = int(match["layer"])
        if index >= len(self._layers) or not self._layers[index].has_moe:
            raise CheckpointError(
                f"{self._where}: holds {name!r}, but layer {index} has no MoE sublayer."
            )
        layer = self._layers[index]
        if role == "router":
            self._check_size(name, "router rows", tensor.shape[0], layer.router_rows)
            yield index, -1, role
            return
        if (single := match.groupdict().get("expert")) is None:
            self._check_size(name, "experts", tensor.shape[0], layer.experts)
            experts: Iterable[int] = range(layer.experts)
        elif int(single) >= layer.experts:
            raise CheckpointError(
                f"{self._where}: layer {index}: expert {single} is out of range; the "
                f"layer has experts 0 to {layer.experts - 1}."
            )
        else:
            experts = (int(single),)
        roles: tuple[Role, ...] = ("gate", "up") if role == "gate_up" else (role,)
        for expert in experts:
            yield from ((index, expert, part) for part in roles)

    def _match(self, name: str) -> tuple[re.Match[str], Role] | None:
        for pattern, role in self._patterns:
            if match := pattern.match(name):
                return match, role
        return None

    def _check_size(self, name: str, what: str, found: int, expected: int) -> None:
        if found != expected:
            raise CheckpointError(
                f"{self._where}: {name!r} has {found} {what}, expected {expected}."
            )


def _describe(piece: Piece) -> str:
    layer, expert, role = piece
    if role == "router":
        return f"layer {layer}: the router"
    return f"layer {layer}: expert {expert} ({role})"
