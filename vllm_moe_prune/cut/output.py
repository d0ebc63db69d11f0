"""The output folder: built beside its final place, resumable, renamed when complete.

``OUT.partial`` holds the journal, finished shards and saved hidden states; ``OUT``
itself appears only when everything is in it, and an earlier ``OUT`` stays as it was
until then.
"""

import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.index import check_link
from ..checkpoint.open import Checkpoint
from ..checkpoint.side_files import side_files
from ..checkpoint.tensor_hashes import FILE_NAME as HASHES
from ..checkpoint.tokenizer import corrections
from ..checkpoint.writer import (
    JOURNAL_NAME,
    ShardPlan,
    finished_shards,
    read_journal,
    rewrite_journal,
    writing,
)
from ..errors import CheckpointError, OutputError
from ..files.regular import copy_regular

log = logging.getLogger(__name__)

WORK_NAME = "work"
STATS_FILE = Path("moe_prune", "stats.safetensors")
"""In a folder of its own: loaders take every safetensors file beside config.json."""
RECOVERED = "recovered"
"""The key of provenance.json that lists trainings after the cut."""
RECORDS = {
    "expert_remap.json",
    "plan.json",
    "moe_prune.yaml",
    "provenance.json",
    "run.json",
    STATS_FILE.as_posix(),
}
# Written anew for the output of a cut, so never copied from its input.
OWN_FILES = {"config.json", "README.md", HASHES, JOURNAL_NAME, WORK_NAME} | RECORDS


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """An output folder under construction."""

    out: Path
    partial: Path
    journal: list[dict[str, object]]
    finished: dict[str, dict[str, str]]
    """Shards an earlier run completed: SHA-256 of each of their tensors."""
    lock: int
    """File descriptor; a second run in this folder is refused while it is open."""
    overwrite: bool

    @property
    def work(self) -> Path:
        """Where hidden states and statistics live until the output is complete."""
        return self.partial / WORK_NAME

    def release(self) -> None:
        """Let other runs in, which the end of the process would do as well."""
        os.close(self.lock)


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
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise OutputError(
            f"{out}: is not a checkpoint (it has no config.json), so --overwrite does "
            "not replace it. Choose another output, or delete that folder yourself."
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


def staging_folder(out: Path) -> Path:
    """Where the dense weights of a compressed output are until it is complete."""
    return out.parent / (out.name + ".partial.dense")


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
            run was another one, or is not dead.
    """
    check_output(out, resume=resume, overwrite=overwrite)
    partial = partial_folder(out)
    fresh = not partial.exists()
    lock = _lock(partial)
    try:
        journal, finished = _continue(partial, key, shards, resume=resume)
        needed = sum(
            shard.file_bytes for shard in shards if shard.file_name not in finished
        )
        _check_space(out, needed)
    except BaseException:
        os.close(lock)
        if fresh:
            shutil.rmtree(partial)
        raise
    return Workspace(
        out=out,
        partial=partial,
        journal=journal,
        finished=finished,
        lock=lock,
        overwrite=overwrite,
    )


def _lock(partial: Path) -> int:
    """Make the folder ours, until the descriptor is closed or the process ends."""
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise OutputError(
            f"{partial}: another run is writing there. Wait for it to end, or end it."
        ) from error
    except OSError:
        # A file system without locks; then nothing can be found out.
        log.debug("%s: cannot be locked", partial)
    return lock


def _continue(
    partial: Path, key: str, shards: Sequence[ShardPlan], *, resume: bool
) -> tuple[list[dict[str, object]], dict[str, dict[str, str]]]:
    """What is left of an unfinished run: its journal, and the shards it finished."""
    journal = read_journal(partial) if resume else []
    begun = [entry["key"] for entry in journal if "key" in entry]
    if begun and begun[0] != key:
        raise OutputError(
            f"{partial}: the unfinished run there used another plan, input or "
            "calibration text. Pass --overwrite to start again."
        )
    if not begun:
        # Without a key nobody knows what the files there belong to.
        _empty(partial)
    finished = finished_shards(partial, shards, journal)
    # Written anew: a line cut short by a kill must not swallow the next one.
    kept = [entry for entry in journal if entry.get("shard") in (None, *finished)]
    rewrite_journal(partial, kept if begun else [{"key": key}])
    return kept, finished


def _empty(folder: Path) -> None:
    with writing(folder):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _check_space(out: Path, needed: int) -> None:
    existing = out.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OutputError(
            f"{out}: needs {needed / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB "
            "are free on that disk. Make room, or choose a folder on another disk."
        )


def companions(checkpoint: Checkpoint) -> list[Path]:
    """Everything that is not weights (tokenizer, templates, code), to be copied.

    Raises:
        CheckpointError: See ``side_files``.
    """
    return side_files(checkpoint.folder, OWN_FILES, allow_links=checkpoint.allow_links)


def copy_companions(checkpoint: Checkpoint, folder: Path) -> tuple[str, ...]:
    """Copy the companion files byte for byte, but for a tokenizer that misleads.

    Returns:
        The files that are not those of the input; see ``tokenizer.corrections``.
    """
    corrected = corrections(checkpoint.folder)
    for path in companions(checkpoint):
        relative = path.relative_to(checkpoint.folder)
        if relative.as_posix() not in corrected:
            _copy(path, folder / relative)
    for name, data in corrected.items():
        (folder / name).write_bytes(data)
        log.warning(
            "%s: with its %s, transformers and vLLM would tokenize otherwise than its "
            "files say; the output has a corrected one",
            checkpoint.folder,
            name,
        )
    return tuple(corrected)


def copy_records(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what an earlier cut left beside the weights: table, plan, provenance.

    Raises:
        CheckpointError: A file is a link out of the folder.
    """
    found = [checkpoint.folder / name for name in sorted(RECORDS)]
    for path in found:
        if path.is_file():
            check_link(checkpoint.folder, path, allow_links=checkpoint.allow_links)
    for path in found:
        if path.is_file():
            _copy(path, folder / path.relative_to(checkpoint.folder))


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        copy_regular(path, to)
    except OSError as error:
        if error.filename != str(path):
            raise
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}."
        ) from error


def publish(workspace: Workspace) -> None:
    """Turn the finished partial folder into the output, replacing an earlier one."""
    partial, out = workspace.partial, workspace.out
    if workspace.work.exists():
        shutil.rmtree(workspace.work)
    retired = None
    if out.exists():
        if any(out.iterdir()) and not workspace.overwrite:
            raise OutputError(
                f"{out}: files appeared there during the run. Move them away, then "
                "run the same command with --resume."
            )
        # A new name: a folder OUT.old may be somebody's copy of something.
        name = tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".old", dir=out.parent)
        retired = out.rename(name)
    (partial / JOURNAL_NAME).unlink()
    partial.rename(out)
    if retired is not None:
        shutil.rmtree(retired)
