"""The tensors and the block of a checkpoint that is written again, spelled anew."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .. import __version__
from ..checkpoint.index import TensorInfo
from ..checkpoint.open import Checkpoint
from ..checkpoint.remap import (
    CONFIG_BLOCK,
    FILE_NAME,
    FORMAT_VERSION,
    ExpertRemap,
    dump_remap,
)
from .slice import StoredPart
from .spell import (
    Means,
    Spelling,
    constant,
    constant_parts,
    spelled_part,
    spelled_rows,
)


@dataclass(frozen=True)
class Stored:
    """How one tensor of the dense form is written."""

    info: TensorInfo
    layer: int | None
    parts: tuple[StoredPart, ...]
    group: tuple[int, int] | None = None
    """(n, m) where it is compressed at a fixed rate."""
    make: Callable[[], torch.Tensor] | None = None
    """Gives what is written where that is not what is read."""

    @property
    def compressed(self) -> bool:
        """Whether it is written in parts."""
        return len(self.parts) > 1


def hash_of(means: Means | None) -> str:
    """SHA-256 of all vectors."""
    digest = hashlib.sha256()
    for layer, found in sorted((means or {}).items()):
        for expert, value_D in sorted(found.items()):
            digest.update(f"{layer} {expert}".encode() + value_D.numpy().tobytes())
    return digest.hexdigest()


def in_spelling(
    checkpoint: Checkpoint, spelling: Spelling, plan: list[Stored], means: Means | None
) -> list[Stored]:
    """The same tensors under stock vLLM's names, and those it wants besides."""
    found, rules = [], checkpoint.layout.router_parts
    for item in plan:
        part = spelled_part(spelling, item.info, item.layer, rules)
        make = None
        if part.shape != item.info.shape and item.layer is not None:
            make = partial(
                spelled_rows, checkpoint, item.info.name, item.layer, spelling
            )
        found.append(replace(item, parts=(part,), make=make))
    for layer, one in sorted(spelling.layers.items()):
        for part in constant_parts(checkpoint, layer, one):
            info = plan[0].info
            found.append(
                Stored(info, layer, (part,), make=partial(constant, part, layer, means))
            )
    return found


def with_block(checkpoint: Checkpoint, remap: ExpertRemap) -> dict[str, Any]:
    """config.json of what another tool cut, with the table that was made for it."""
    block = {
        "format_version": FORMAT_VERSION,
        "tool_version": __version__,
        "remap": FILE_NAME,
        "remap_sha256": hashlib.sha256(dump_remap(remap)).hexdigest(),
    }
    return {**checkpoint.config, CONFIG_BLOCK: block}
