"""Quantized checkpoints that were tampered with, and wishes that nothing meets."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.reference import write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan

from .case import Case, Change, Spoil, added, gone, in_json, in_tensors

BASE = "model.layers.1.block_sparse_moe.experts.1.w2"
VERIFY = "verify quantized --json"
EVAL = "eval quantized --text text.txt --sequence-length 32 --max-tokens 64 --json"
CONFIG = "quantized/config.json"
FILE = "quantized/model.safetensors"
INT4 = {"method": "rtn", "group_size": 32, "zero_point": True}


@cache
def good() -> dict[str, bytes]:
    """The files of a checkpoint with 4-bit experts."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"layers": 2, "experts": 2, "hidden": 64, "width": 64}
        source = open_checkpoint(tiny_checkpoint(folder / "ckpt", **sizes))
        plan = write_plan(folder / "plan.json", source, {}, quantize=INT4)
        execute_plan(source, load_plan(plan), folder / "out")
        return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


def quantized(then: Spoil) -> Spoil:
    """That checkpoint, then spoilt."""

    def spoil(folder: Path) -> None:
        (folder / "quantized").mkdir()
        for name, data in good().items():
            (folder / "quantized" / name).write_bytes(data)
        then(folder)

    return spoil


def parts(**changes: Change) -> Spoil:
    """Change parts of one matrix: what each is becomes what its function returns."""
    named = {f"{BASE}.weight_{part}": change for part, change in changes.items()}
    return quantized(in_tensors(FILE, named))


def block(**values: Any) -> Spoil:
    """Change the ``quantization_config`` block."""
    return quantized(
        in_json(CONFIG, lambda config: config["quantization_config"].update(values))
    )


def weights(**values: Any) -> Spoil:
    """Change what the block says of weights."""

    def edit(config: dict[str, Any]) -> None:
        (group,) = config["quantization_config"]["config_groups"].values()
        group["weights"].update(values)

    return quantized(in_json(CONFIG, edit))


G_IDX = added(FILE, f"{BASE}.weight_g_idx", torch.arange(64).int())
CASES = [
    Case("lost scales", VERIFY, (BASE, "is missing"), parts(scale=gone)),
    Case("lost zero points", VERIFY, (BASE, "is missing"), parts(zero_point=gone)),
    Case("a lost shape", VERIFY, (BASE, "is missing"), parts(shape=gone)),
    Case("lost 4-bit values", VERIFY, (BASE, "no weight"), parts(packed=gone)),
    Case(
        "scales of another shape",
        VERIFY,
        (BASE, "[64, 1]", "[64, 2]"),
        parts(scale=lambda t: t[:, :1]),
    ),
    Case(
        "scales that are integers",
        VERIFY,
        (BASE, "I16", "BF16"),
        parts(scale=lambda t: t.view(torch.int16)),
    ),
    Case(
        "values of another width",
        VERIFY,
        (BASE, "56 columns"),
        parts(packed=lambda t: t[:, 1:]),
    ),
    Case(
        "values of one axis",
        VERIFY,
        (BASE, "two axes"),
        parts(packed=lambda t: t.view(-1)),
    ),
    Case(
        "a shape that is not the matrix's",
        VERIFY,
        (BASE, "stored with shape"),
        parts(shape=lambda t: t * 2),
    ),
    Case(
        "a scale that is infinite",
        EVAL,
        (BASE, "NaN or infinite"),
        parts(scale=lambda t: t / 0),
    ),
    Case(
        "a group index",
        VERIFY,
        (BASE, "weight_g_idx"),
        quantized(G_IDX),
    ),
    Case(
        "groups that do not divide rows",
        VERIFY,
        ("64 columns do not divide into groups of 48",),
        weights(group_size=48),
    ),
    Case("2-bit weights", VERIFY, ("Supported: int4",), weights(num_bits=2)),
    Case("groups that are reordered", VERIFY, ("Supp",), weights(actorder="group")),
    Case("groups of no size", VERIFY, ("quantization_config",), weights(group_size=0)),
    Case("a strategy unknown", VERIFY, ("quantization_config",), weights(strategy="x")),
    Case("groups that are a list", VERIFY, ("quantization_",), block(config_groups=[])),
    Case("no groups", VERIFY, ("Supported",), block(config_groups={})),
    Case(
        "quantized again",
        "run quantized new --recipe gptq4 --calibration text.txt --samples 2 "
        "--sequence-length 32 --json",
        ("quantized already",),
        quantized(lambda folder: None),
    ),
    Case(
        "without its zeros",
        "convert quantized new --storage bitmask",
        ("are quantized",),
        quantized(lambda folder: None),
    ),
    Case(
        "quantize: 48 columns in groups of 32",
        "run ckpt new --recipe awq4 --calibration text.txt",
        ("48 columns", "int8"),
    ),
    Case("recommend: no wish", "recommend ckpt", ("--memory", "--speed")),
    Case("recommend: junk memory", "recommend ckpt --memory much", ("'much'",)),
    Case("recommend: junk speed", "recommend ckpt --speed fast", ("'fast'", "2x")),
    Case(
        "recommend: nothing is so small",
        "recommend ckpt --memory 1KB --json",
        ("no shipped recipe meets that", "smallest is"),
    ),
]
