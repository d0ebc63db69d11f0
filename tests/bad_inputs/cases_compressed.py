"""Compressed checkpoints that were tampered with: parts, headers, config."""

from pathlib import Path

import torch

from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.convert import convert

from .case import Case, Change, Spoil, added, gone, in_json, in_tensors

BASE = "model.layers.1.block_sparse_moe.experts.1.w2"
VERIFY = "verify packed --json"
CONFIG = "packed/config.json"
FILE = "packed/model.safetensors"


def packed(then: Spoil) -> Spoil:
    """The good output stored compressed, then spoilt."""

    def spoil(folder: Path) -> None:
        convert(open_checkpoint(folder / "out"), folder / "packed", "bitmask")
        then(folder)

    return spoil


def parts(**changes: Change) -> Spoil:
    """Change parts of one tensor: what each is becomes what its function returns."""
    named = {f"{BASE}.{part}": change for part, change in changes.items()}
    return packed(in_tensors(FILE, named))


def block(**values: object) -> Spoil:
    """Change the ``quantization_config`` block."""
    return packed(
        in_json(CONFIG, lambda config: config["quantization_config"].update(values))
    )


DENSE_TOO = added(FILE, f"{BASE}.weight", torch.zeros(32, 48).bfloat16())
"""A tensor that is there in both forms."""
CASES = [
    Case("a flipped mask", VERIFY, (BASE, "offsets[1]"), parts(mask=lambda t: t ^ 1)),
    Case("a lost mask", VERIFY, (BASE, "has no"), parts(mask=gone)),
    Case("lost values", VERIFY, (BASE, "no values"), parts(values=gone)),
    Case("lost offsets", VERIFY, (BASE, "has no offsets"), parts(offsets=gone)),
    Case(
        "too few values",
        VERIFY,
        (BASE, "values"),
        parts(values=lambda t: t[: len(t) - 1]),
    ),
    Case(
        "more values than elements",
        VERIFY,
        (BASE, "do not fit"),
        parts(values=lambda t: t.repeat(9)),
    ),
    Case(
        "integer values",
        VERIFY,
        (BASE, "values are I16"),
        parts(values=lambda t: t.view(torch.int16)),
    ),
    Case(
        "descending offsets",
        VERIFY,
        (BASE, "offsets"),
        parts(offsets=lambda t: t.flip(0)),
    ),
    Case(
        "offsets beyond the end",
        VERIFY,
        (BASE, "offsets"),
        parts(offsets=lambda t: t + 2**40),
    ),
    Case(
        "offsets that overflow",
        VERIFY,
        (BASE, "offsets"),
        parts(offsets=lambda t: t - 2**63),
    ),
    Case("short offsets", VERIFY, (BASE, "do not fit"), parts(offsets=lambda t: t[1:])),
    Case("narrow offsets", VERIFY, (BASE, "I64"), parts(offsets=lambda t: t.int())),
    Case(
        "a mask of another shape",
        VERIFY,
        (BASE,),
        parts(mask=lambda t: t[:, 1:]),
    ),
    Case("a flat mask", VERIFY, (BASE, "2 axes"), parts(mask=lambda t: t.view(-1))),
    Case("both forms", VERIFY, (BASE, "dense and compressed"), packed(DENSE_TOO)),
    Case(
        "a compressed layer that should be dense",
        VERIFY,
        ("model.layers.1.", "is compressed", "dense_layers"),
        block(dense_layers=[1]),
    ),
    Case("a later format", VERIFY, ("format_version",), block(format_version=2)),
    Case("another format", VERIFY, ("format",), block(format="csr")),
    Case("an unknown key", VERIFY, ("zip",), block(zip=True)),
    Case(
        "a block that is taken away",
        VERIFY,
        ("no router and experts found",),
        packed(in_json(CONFIG, lambda config: config.pop("quantization_config"))),
    ),
    Case(
        "damage found while converting back",
        "convert packed new --storage dense --json",
        (BASE, "offsets"),
        parts(offsets=lambda t: t.flip(0)),
        leaves=("new.partial/*",),
    ),
    Case(
        "an unknown layout",
        "convert ckpt new --storage zip",
        ("zip", "dense, bitmask"),
    ),
]
