"""What is no ordinary file, in the place of every file the tool reads."""

from pathlib import Path
from typing import Any

from tests.fuzz.spoil import put_special

from .case import (
    CONFIG,
    INDEX,
    PAPER,
    SHARD,
    SMALL,
    Case,
    Spoil,
    both,
    in_header,
    in_json,
)

PLAN = f"plan ckpt --calibration text.txt {SMALL} {PAPER} -o new.json"
WITH_STATS = f"{PLAN} --stats stats.safetensors"
VERIFY = "verify out --source ckpt"
SPEEDS = "compare ckpt out --speed-from speed.json"
SAVED = "eval ckpt --text text.txt --sequence-length 32 --against saved.json"
READ_BY = {
    CONFIG: "inspect ckpt",
    INDEX: "inspect ckpt",
    SHARD: "inspect ckpt",
    "stats.safetensors": WITH_STATS,
    "plan.json": "cut ckpt --plan plan.json -o new --calibration text.txt",
    "my.yaml": f"{WITH_STATS} --recipe my.yaml",
    "out/expert_remap.json": "verify out",
    "out/plan.json": VERIFY,
    "out/provenance.json": "report out",
    "out/moe_prune/stats.safetensors": "report out --stats stats.safetensors",
    "out/tensor_hashes.json": "verify out",
    "speed.json": SPEEDS,
    "saved.json": SAVED,
    "ckpt/README.md": "cut ckpt --plan plan.json -o new --calibration text.txt",
}
"""File -> a command that reads it."""
SAYS = {"fifo": "FIFO", "zero": "device", "huge": "6442450944 bytes"}
# Named by another file, so looked for first; or only read where they are files.
BEFORE = {
    (SHARD, "fifo"): "is missing",
    (SHARD, "zero"): "is not inside the folder",
    ("saved.json", "fifo"): "no such folder",
    ("saved.json", "zero"): "no such folder",
    (SHARD, "huge"): "damaged or truncated safetensors file",
    ("stats.safetensors", "huge"): "damaged statistics file",
    ("out/moe_prune/stats.safetensors", "huge"): "damaged statistics file",
}
PASSED_OVER = {
    *((INDEX, kind) for kind in ("fifo", "zero")),
    *(("out/moe_prune/stats.safetensors", kind) for kind in ("fifo", "zero")),
    *(("ckpt/README.md", kind) for kind in ("fifo", "zero")),
}
"""Optional files that are taken for absent."""


def special(kind: str, name: str) -> Spoil:
    """Put it there, whether there was something or not."""

    def spoil(folder: Path) -> None:
        (folder / name).touch()
        put_special(kind, folder / name)

    return spoil


def nested(metadata: dict[str, Any]) -> None:
    """JSON in a string, deeper than Python's own reader goes."""
    metadata["calibration"] = "[" * 3000 + "]" * 3000


def in_text(name: str, old: str, new: str) -> Spoil:
    """Other text in a file, where JSON could not be written so."""

    def spoil(folder: Path) -> None:
        text = (folder / name).read_text("utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new), "utf-8")

    return spoil


CASES = [
    Case(
        f"special: {kind} as {name}",
        command,
        (Path(name).name, BEFORE.get((name, kind), said)),
        special(kind, name),
    )
    for name, command in READ_BY.items()
    for kind, said in SAYS.items()
    if (name, kind) not in PASSED_OVER
] + [
    Case(
        "special: a journal without end",
        "cut ckpt --plan plan.json -o new --calibration text.txt --resume",
        ("journal.jsonl", "6442450944 bytes"),
        both(
            lambda folder: (folder / "new.partial").mkdir(),
            special("huge", "new.partial/journal.jsonl"),
        ),
    ),
    Case(
        "special: deep JSON in a header's strings",
        WITH_STATS,
        ("stats.safetensors", "deeper than 64 levels"),
        in_header("stats.safetensors", lambda header: nested(header["__metadata__"])),
    ),
    Case(
        "special: a name twice in config.json",
        "inspect ckpt",
        ("config.json", "'hidden_size' twice"),
        in_text(CONFIG, '"hidden_size": 32', '"hidden_size": 32, "hidden_size": 32'),
    ),
    Case(
        "special: a number beyond floats in config.json",
        "inspect ckpt",
        ("config.json", "1e999"),
        in_text(CONFIG, '"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e999'),
    ),
    Case(
        "special: half a character in config.json",
        "inspect ckpt",
        ("config.json", "half a UTF-16 pair"),
        in_json(CONFIG, lambda config: config.update(hidden_act="\ud800")),
    ),
]
