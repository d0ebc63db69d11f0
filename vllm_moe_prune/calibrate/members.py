"""Is everything there that the forward needs? Asked of names and shapes alone."""

import re
from collections.abc import Sequence
from typing import Any

from ..archs.spec import MOE_NORM
from ..checkpoint.block_fp8 import SUFFIX
from ..checkpoint.claims import warn_once
from ..checkpoint.dense_parts import DensePart, dense_parts
from ..checkpoint.index import TensorInfo
from ..checkpoint.open import Checkpoint
from ..errors import CheckpointError
from .stock import stock_layer

# Saved by early transformers versions; recomputed from the config since.
IGNORED = ("rotary_emb.inv_freq",)


def info_of(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """A tensor that the forward needs.

    Raises:
        CheckpointError: It is missing.
    """
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {name!r} is missing, so the model "
            "cannot be run. Download the checkpoint again."
        )
    return info


def check_layers(checkpoint: Checkpoint, config: Any) -> None:
    """Compare tensors outside the MoE sublayers with the stock class.

    Raises:
        CheckpointError: Naming the first that is missing or misshapen.
    """
    unused: list[str] = []
    for layer in checkpoint.layers:
        unused += _check_layer(checkpoint, config, layer.index)
    _warn_of_unused(checkpoint, unused)


def _check_layer(checkpoint: Checkpoint, config: Any, index: int) -> list[str]:
    """Check one layer; the names below it that the forward does not use."""
    arch = checkpoint.arch
    prefix = arch.layer_prefix.format(layer=index)
    # On the meta device: the shapes that config.json implies, without memory.
    expected = stock_layer(arch, config, index).state_dict()
    for name, tensor in expected.items():
        _check_shape(info_of(checkpoint, prefix + name), tuple(tensor.shape))
    layer = checkpoint.layers[index]
    if layer.has_moe or layer.norm_only:
        info_of(checkpoint, f"{prefix}{MOE_NORM}.weight")
    for part in dense_parts(checkpoint, layer):
        _check_mlp(checkpoint, prefix, part, config.hidden_size)
    if layer.mtp:
        names = arch.mtp
        for inner in (names.embedding_norm, names.hidden_norm, names.proj):
            info_of(checkpoint, f"{prefix}{inner}.weight")
    extras = checkpoint.extras(layer) if layer.has_moe else []
    unused = [
        extra.name(expert) for extra in extras for expert in range(layer.num_experts)
    ]
    for name in checkpoint.layer_names(index):
        inner = name.removeprefix(prefix)
        known = inner in expected or arch.is_moe_member(name, index)
        residual = arch.residual
        beside = residual is not None and inner.startswith(
            (residual.mlp.prefix, f"{residual.norm}.")
        )
        beside |= layer.mtp and inner in arch.mtp.all
        if not known and not beside and not inner.endswith((*IGNORED, SUFFIX)):
            unused.append(inner)
    return unused


def _warn_of_unused(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Say once which kinds of tensors the forward does without."""
    # Layers and experts by a star: kinds are few where names are thousands.
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    if not kinds:
        return
    more = f" and {len(kinds) - 3} other kinds" if len(kinds) > 3 else ""
    warn_once(
        f"{checkpoint.folder}: {len(names)} tensors are not used by the forward, as "
        f"transformers does not use them: {', '.join(kinds[:3])}{more}. A cut copies "
        "them."
    )


def _check_mlp(
    checkpoint: Checkpoint, prefix: str, part: DensePart, hidden: int
) -> None:
    # Gate and up [F, D], down [D, F], as GatedMlp.names lists them.
    shapes = ((part.width, hidden), (part.width, hidden), (hidden, part.width))
    for name, shape in zip(part.mlp.names, shapes, strict=True):
        _check_shape(info_of(checkpoint, prefix + name), shape)
    if part.mlp.weigher is not None:
        _check_shape(info_of(checkpoint, prefix + part.mlp.weigher), (1, hidden))
    if part.norm is not None:
        info_of(checkpoint, f"{prefix}{part.norm}.weight")


def _check_shape(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.file}: {info.name} has shape {list(info.shape)}, "
            f"config.json asks for {list(shape)}."
        )
