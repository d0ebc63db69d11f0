"""The output folder: built beside its final place, resumable, renamed when complete.

``OUT.partial`` holds the journal, finished shards and saved hidden states; ``OUT``
itself appears only when everything is in it, and an earlier ``OUT`` stays as it was
until then.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.index import is_inside
from ..checkpoint.open import Checkpoint
from ..checkpoint.writer import (
    JOURNAL_NAME,
    ShardPlan,
    finished_shards,
    read_journal,
    rewrite_journal,
)
from ..errors import CheckpointError, OutputError

WORK_NAME = "work"
# Written anew for the output, so never copied from the input.
OWN_FILES = {
    "config.json",
    "README.md",
    "expert_remap.json",
    "plan.json",
    "moe_prune.yaml",
    "provenance.json",
    "run.json",
}
WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pth", ".pt", ".gguf")
# Tokenizers and templates are megabytes; anything larger is not metadata.
MAX_COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class Workspace:
    """An output folder under construction."""

    out: Path
    partial: Path
    journal: list[dict[str, object]]
    finished: frozenset[str]
    overwrite: bool

    @property
    def work(self) -> Path:
        """Where hidden states and statistics live until the output is complete."""
        return self.partial / WORK_NAME


def check_output(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output that exists, before any work is done.

    Raises:
        OutputError: The folder is not empty, or an unfinished run lies beside it.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; choose another output folder.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputError(
            f"{out}: the output folder is not empty. Choose another one, or pass "
            "--overwrite to replace it once the new one is complete."
        )
    partial = partial_folder(out)
    if partial.exists() and not resume and not overwrite:
        raise OutputError(
            f"{partial}: an unfinished run is there. Pass --resume to continue it, "
            "or --overwrite to start again."
        )


def partial_folder(out: Path) -> Path:
    """Where an output is built: beside it, on the same file system."""
    return out.parent / (out.name + ".partial")


def open_workspace(
    out: Path, key: str, shards: Sequence[ShardPlan], *, resume: bool, overwrite: bool
) -> Workspace:
    """Create or continue ``OUT.partial``.

    Args:
        out: The final folder.
        key: Hash of everything that determines the bytes; a resumed run must match.
        shards: The planned shards.
        resume: Continue an unfinished run if there is one.
        overwrite: Replace an existing output and forget an unfinished run.

    Raises:
        OutputError: See ``check_output``; or the disk is too full, or the unfinished
            run was another one.
    """
    check_output(out, resume=resume, overwrite=overwrite)
    partial = partial_folder(out)
    journal = read_journal(partial) if resume else []
    begun = [entry["key"] for entry in journal if "key" in entry]
    if begun and begun[0] != key:
        raise OutputError(
            f"{partial}: the unfinished run there used another plan, input or "
            "calibration text. Pass --overwrite to start again."
        )
    if not resume and partial.exists():
        shutil.rmtree(partial)
    finished = finished_shards(partial, shards, journal)
    needed = sum(
        shard.file_bytes for shard in shards if shard.file_name not in finished
    )
    _check_space(out, needed)
    partial.mkdir(parents=True, exist_ok=True)
    # Written anew: a line cut short by a kill must not swallow the next one.
    kept = [entry for entry in journal if entry.get("shard") in (None, *finished)]
    rewrite_journal(partial, kept if begun else [{"key": key}])
    return Workspace(out, partial, kept, finished, overwrite)


def _check_space(out: Path, needed: int) -> None:
    existing = out.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OutputError(
            f"{out}: needs {needed / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB "
            f"are free on that disk."
        )


def copy_companions(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Copy everything that is not weights (tokenizer, templates, code) as it is."""
    copied = []
    for path in sorted(checkpoint.folder.iterdir()):
        name = path.name
        if (
            name in OWN_FILES
            or name.startswith(".")
            or name.endswith(WEIGHT_SUFFIXES)
            or not path.is_file()
        ):
            continue
        if not is_inside(checkpoint.folder, path):
            raise CheckpointError(f"{path}: is a link out of the checkpoint folder.")
        if path.stat().st_size > MAX_COPIED_BYTES:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes is too large for a companion "
                "file; move it out of the checkpoint folder."
            )
        (folder / name).write_bytes(path.read_bytes())
        copied.append(name)
    return copied


def publish(workspace: Workspace) -> None:
    """Turn the finished partial folder into the output, replacing an earlier one."""
    if workspace.work.exists():
        shutil.rmtree(workspace.work)
    (workspace.partial / JOURNAL_NAME).unlink()
    out = workspace.out
    if out.exists() and any(out.iterdir()):
        retired = out.parent / (out.name + ".old")
        out.rename(retired)
        workspace.partial.rename(out)
        shutil.rmtree(retired)
        return
    if out.exists():
        out.rmdir()
    workspace.partial.rename(out)
