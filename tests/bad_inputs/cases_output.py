"""Places where an output cannot or must not go."""

import json
import os
import shutil
import struct
from pathlib import Path

from .case import CUT, INDEX, PAPER, RUN, SMALL, Case, both, in_json

TEXT = f"--calibration text.txt {SMALL} --json"
PLANNED = "--plan plan.json --calibration text.txt --json"


def run_to(output: str, flags: str = "") -> str:
    """A run with another output."""
    return f"run ckpt {output} {TEXT} {PAPER} {flags}"


def cut_to(output: str, flags: str = "") -> str:
    """A cut with another output."""
    return f"cut ckpt -o {output} {PLANNED} {flags}"


def both_commands(
    name: str, output: str, flags: str, says: tuple[str, ...], **more: object
) -> list[Case]:
    """The same output for ``run`` and for ``cut``."""
    return [
        Case(
            f"output: {name}, {what(output).split()[0]}",
            what(output, flags),
            says,
            **more,
        )  # type: ignore[arg-type]
        for what in (run_to, cut_to)
    ]


def within_output(folder: Path) -> None:
    """Move the checkpoint into what is going to be replaced."""
    shutil.rmtree(folder / "out")
    (folder / "out").mkdir()
    (folder / "ckpt").rename(folder / "out/ckpt")
    (folder / "ckpt").symlink_to(folder / "out/ckpt")


def linked_output(folder: Path) -> None:
    """A link that leads to the checkpoint."""
    (folder / "link").symlink_to(folder / "ckpt")


def linked_elsewhere(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "link").symlink_to(folder / "elsewhere")


def linked_in_a_circle(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "link")


def read_only(folder: Path) -> None:
    """A folder in which nothing can be made, even by root (see ``conftest``)."""
    (folder / "locked").mkdir(mode=0o555)


def piped(folder: Path) -> None:
    """A pipe, which a rename would replace as it would a device."""
    os.mkfifo(folder / "pipe")


def unfinished(folder: Path) -> None:
    (folder / "new.partial").mkdir()
    (folder / "new.partial/journal.jsonl").write_text('{"key": "other"}\n')


def too_large(folder: Path) -> None:
    """A tensor larger than the disk, in a file full of holes."""
    free = shutil.disk_usage(folder).free
    size = (free + (1 << 33)) // 2 * 2
    name, file_name = "model.extra.weight", "model-00004-of-00004.safetensors"
    entry = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}
    header = json.dumps({name: entry}).encode()
    with (folder / "ckpt" / file_name).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    in_json(INDEX, lambda index: index["weight_map"].update({name: file_name}))(folder)


def broken_link(folder: Path) -> None:
    (folder / "ckpt/notes.txt").symlink_to(folder / "nowhere.txt")


def linked_tokenizer(folder: Path) -> None:
    (folder / "ckpt/notes.txt").symlink_to(folder / "text.txt")


def unplanned(folder: Path) -> None:
    """Fit the plan to the checkpoint that was just changed."""
    from vllm_moe_prune.checkpoint.source import open_checkpoint

    fingerprint = open_checkpoint(folder / "ckpt").fingerprint
    in_json("plan.json", lambda plan: plan["model"].update(fingerprint=fingerprint))(
        folder
    )


CASES = [
    *both_commands("not empty", "out", "", ("out", "not empty", "--overwrite")),
    *both_commands(
        "not empty, resumed", "out", "--resume", ("out", "not empty", "--overwrite")
    ),
    *both_commands("a file", "text.txt", "--overwrite", ("text.txt", "is a file")),
    *both_commands("below a file", "text.txt/new", "", ("text.txt", "not a folder")),
    *both_commands("the input", "ckpt", "--overwrite", ("ckpt", "input")),
    *both_commands("the input, spelt out", "out/../ckpt", "--overwrite", ("input",)),
    *both_commands("in the input", "ckpt/new", "", ("ckpt/new", "inside the input")),
    *both_commands(
        "a link to the input",
        "link",
        "--overwrite",
        ("link", "is a link"),
        spoil=linked_output,
    ),
    *both_commands("a link", "link", "", ("link",), spoil=linked_elsewhere),
    *both_commands(
        "below a link to itself",
        "link/new",
        "",
        ("link/new", "circle of links"),
        spoil=linked_in_a_circle,
    ),
    *both_commands(
        "around the input",
        "out",
        "--overwrite",
        ("out", "contains the input"),
        spoil=within_output,
    ),
    *both_commands("this folder", ".", "--overwrite", ("'.'",)),
    *both_commands("the folder above", "..", "--overwrite", ("'..'",)),
    *both_commands("nameless", "''", "--overwrite", ("'.'",)),
    *both_commands(
        "in a read-only folder",
        "locked/new",
        "",
        ("locked", "not writable"),
        spoil=read_only,
    ),
    *both_commands(
        "unfinished",
        "new",
        "",
        ("new.partial", "--resume", "--overwrite"),
        spoil=unfinished,
    ),
    *both_commands(
        "another unfinished run",
        "new",
        "--resume",
        ("new.partial", "another plan", "--overwrite"),
        spoil=unfinished,
    ),
    Case(
        "output: no space, run",
        RUN,
        ("GiB", "free"),
        too_large,
        leaves=("out.partial/*",),  # the statistics
    ),
    Case(
        "output: no space, cut",
        CUT,
        ("GiB", "free"),
        both(too_large, unplanned),
    ),
    Case(
        "output: a link beside the weights",
        RUN,
        ("notes.txt", "is a link to"),
        linked_tokenizer,
    ),
    Case(
        "measure: into a folder",
        f"measure ckpt -o out {TEXT} {PAPER}",
        ("out", "is a folder"),
    ),
    Case(
        "measure: into a pipe",
        f"measure ckpt -o pipe {TEXT} {PAPER}",
        ("pipe: is a FIFO", "name of a file"),
        piped,
    ),
    Case(
        "measure: into a link to a device",
        f"measure ckpt -o link {TEXT} {PAPER}",
        ("link: is a device", "name of a file"),
        lambda folder: (folder / "link").symlink_to("/dev/full"),
    ),
    Case(
        "plan: into a pipe",
        f"plan ckpt --stats stats.safetensors -o pipe {PAPER}",
        ("pipe: is a FIFO",),
        piped,
    ),
    Case(
        "run: statistics into a pipe",
        run_to("new", "--stats pipe"),
        ("pipe: is a FIFO",),
        piped,
    ),
    *both_commands("a pipe", "pipe", "--overwrite", ("pipe", "file"), spoil=piped),
    Case(
        "measure: into a link to itself",
        f"measure ckpt -o link {TEXT} {PAPER}",
        ("link", "circle of links"),
        linked_in_a_circle,
    ),
    Case(
        "measure: over the weights",
        f"measure ckpt -o ckpt/model-00001-of-00003.safetensors {TEXT} {PAPER}",
        ("ckpt", "inside the input"),
    ),
    Case(
        "measure: into a folder that is not there",
        f"measure ckpt -o nowhere/new.safetensors {TEXT} {PAPER}",
        ("nowhere", "no such folder"),
    ),
    Case(
        "measure: into a read-only folder",
        f"measure ckpt -o locked/new.safetensors {TEXT} {PAPER}",
        ("locked", "not writable"),
        read_only,
    ),
    Case(
        "plan: over the configuration",
        f"plan ckpt --stats stats.safetensors -o ckpt/config.json {PAPER}",
        ("ckpt", "inside the input"),
    ),
    Case(
        "plan: into a folder",
        f"plan ckpt --stats stats.safetensors -o out {PAPER}",
        ("out", "is a folder"),
    ),
    Case(
        "plan: into a folder that is not there",
        f"plan ckpt --stats stats.safetensors -o nowhere/plan.json {PAPER}",
        ("nowhere", "no such folder"),
    ),
    Case(
        "run: statistics into a folder that is not there",
        run_to("new", "--stats nowhere/stats.safetensors"),
        ("nowhere", "no such folder"),
    ),
    Case(
        "run: statistics into the input",
        run_to("new", "--stats ckpt/stats.safetensors"),
        ("ckpt", "inside the input"),
    ),
]
