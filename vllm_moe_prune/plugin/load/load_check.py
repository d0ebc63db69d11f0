"""Counts router and expert weights while they stream into a model.

vLLM notices a missing parameter by its name, and all experts of a layer share one
parameter: a checkpoint without expert 5 loads silently with whatever was in memory.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ...archs.spec import ROUTER_ROLES, MoeArch, Role
from ...checkpoint.compressed import dense_names
from ...checkpoint.gptq_awq import auto_name
from ...checkpoint.quantized_tensors import values_name
from ...errors import CheckpointError
from .served_layer import ServedLayer

Piece = tuple[int, int, Role]
"""Layer, expert (-1 for the router and its bias), and what of it."""


class LoadCheck:
    """Demands every router and every expert matrix exactly once."""

    def __init__(
        self,
        arch: MoeArch,
        layers: Sequence[ServedLayer],
        where: str,
        mtp_layers: int = 0,
    ) -> None:
        """The layers say what to expect; ``where`` is named in every error.

        Layers behind the last one that predict further tokens are not counted: vLLM
        skips their weights, which only a draft model loads.
        """
        self._layers = layers
        self._where = where
        self._mtp = range(len(layers), len(layers) + mtp_layers)
        self._router_roles = tuple(rule.role for rule in arch.layouts[0].router_parts)
        # Layouts share rules: each is tried once for a name.
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
                yield from ((layer.index, -1, role) for role in self._router_roles)
            for expert in range(layer.experts):
                for role in ("gate", "up", "down"):
                    yield layer.index, expert, role

    def _pieces(self, name: str, tensor: torch.Tensor) -> Iterator[Piece]:
        # Of a matrix stored in parts one counts; the loader wants all of them.
        known: str | None = name
        for known_as in (values_name, auto_name):
            known = None if known is None else known_as(known)
        candidates = () if known is None else dense_names(known)
        matches = (self._match(each) for each in candidates)
        found = next((match for match in matches if match is not None), None)
        if found is None:
            return
        match, role = found
        index = int(match["layer"])
        if index in self._mtp:
            return
        if index >= len(self._layers) or not self._layers[index].has_moe:
            raise CheckpointError(
                f"{self._where}: holds {name!r}, but layer {index} has no MoE sublayer."
            )
        layer = self._layers[index]
        if role in ROUTER_ROLES:
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
        # A fused tensor stands for both of its matrices.
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


def first_load_check(
    arch: MoeArch, layers: Sequence[ServedLayer], vllm_config: Any
) -> LoadCheck | None:
    """The load_check of a model's first load; None where no weights will be loaded."""
    if vllm_config.load_config.load_format == "dummy":
        return None
    model_config, mtp_layers = vllm_config.model_config, 0
    if arch.config.mtp_layers is not None:
        mtp_layers = getattr(model_config.hf_config, arch.config.mtp_layers, None) or 0
    return LoadCheck(arch, layers, model_config.model, mtp_layers)


def load_counted(
    model: Any,
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], set[str]],
    weights: Iterable[tuple[str, torch.Tensor]],
) -> set[str]:
    """Run a model's loader, checked on its first load; later ones may be partial."""
    load_check, model.load_check = model.load_check, None
    if load_check is None:
        return load(weights)
    # Counted as they are read, also those of another rank, which vLLM then skips.
    loaded = load(load_check.watch(weights))
    load_check.finish()
    return loaded


def _describe(piece: Piece) -> str:
    layer, expert, role = piece
    if expert < 0:
        return f"layer {layer}: the {role.replace('_', ' ')}"
    return f"layer {layer}: expert {expert} ({role})"
