"""One output, all or nothing: built beside its place, resumable, renamed when complete.

``OUT.partial`` holds, until ``OUT`` is complete,

    journal.jsonl   whose run it is (its key), from which files, and what is finished
    result/         what becomes OUT
    work/           what is needed meanwhile: hidden states, statistics, other outputs
    replaced/       the earlier OUT, between the two renames that replace it

A run may be killed at any moment. With ``resume`` the same run continues, and says so
of an output that is complete already; without, what it left is refused or forgotten.
"""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.file_state import check_states
from ..checkpoint.open import Checkpoint
from ..checkpoint.shared_writer import SharedWriter
from ..checkpoint.writer import (
    JOURNAL_NAME,
    ShardPlan,
    ShardWriter,
    append_journal,
    finished_shards,
    read_journal,
    rewrite_journal,
)
from ..errors import CheckpointError, OutputError
from ..files.atomic import sync_folder, write_file, writing
from ..files.json_file import read_json
from ..files.regular import MIB, Kind
from ..progress import peak_rss_bytes
from ..ranks.group import ALONE, Ranks

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
RUN = Kind(name=RUN_FILE, max_bytes=MIB, error=CheckpointError)
COMPLETE: dict[str, object] = {"complete": True}
"""The journal's last line: from here on nothing but renames and removals is left."""


@dataclass(kw_only=True)
class Workspace:
    """An output folder under construction."""

    out: Path
    partial: Path
    journal: list[dict[str, object]]
    """What an interrupted run has recorded."""
    ranks: Ranks = ALONE
    """Who writes into it; see ``shared_output.py``."""
    writer: ShardWriter | None = field(default=None, init=False)

    @property
    def result(self) -> Path:
        """What becomes the output."""
        return self.partial / "result"

    @property
    def work(self) -> Path:
        """What is gone once the output is complete; made by who needs it."""
        return self.partial / "work"

    def record(self, entry: dict[str, object]) -> None:
        """Add a line to the journal, which rank 0 keeps."""
        if self.ranks.rank == 0:
            append_journal(self.partial, entry)

    def write_shards(self, shards: Sequence[ShardPlan]) -> ShardWriter:
        """A writer for the planned shards that goes on where an earlier one stopped.

        Raises:
            OutputError: The disk is too full.
        """
        finished = self.ranks.first(lambda: self._prepare(shards))
        how: dict[str, Any] = {"folder": self.result, "shards": shards}
        how |= {"finished": finished, "journal": self.partial}
        alone = self.ranks.size == 1
        self.writer = (
            ShardWriter(**how) if alone else SharedWriter(**how, ranks=self.ranks)
        )
        return self.writer

    def _prepare(self, shards: Sequence[ShardPlan]) -> dict[str, dict[str, str]]:
        """Shards that are finished already, and room for the others."""
        with writing(self.partial):
            self.result.mkdir(exist_ok=True)
        finished = finished_shards(self.result, shards, self.journal)
        needed = sum(
            shard.file_bytes for shard in shards if shard.file_name not in finished
        )
        _check_space(self.out, self.partial, needed)
        # Written anew: shards that are spoilt must not be taken for finished later.
        self.journal = [
            entry for entry in self.journal if entry.get("shard") in (None, *finished)
        ]
        rewrite_journal(self.partial, self.journal)
        return finished


def partial_folder(out: Path) -> Path:
    """Where an output is built: beside it, on the same file system."""
    return out.parent / (out.name + ".partial")


def check_output(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse an output that is in the way, before any work is done.

    Whether one that is there is what a resumed run would make, its key tells later.

    Raises:
        OutputError: The folder is not empty, or an unfinished run lies beside it.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; choose another output folder.")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite and not (resume and keys_of(out)):
            raise OutputError(
                f"{out}: the output folder is not empty. Choose another one, or pass "
                "--overwrite to replace it once the new one is complete."
            )
        if not (out / "config.json").is_file():
            raise OutputError(
                f"{out}: is not a checkpoint (it has no config.json), so --overwrite "
                "does not replace it. Choose another output, or delete that folder "
                "yourself."
            )
    partial = partial_folder(out)
    if partial.exists() and not resume and not overwrite:
        raise OutputError(
            f"{partial}: an unfinished run is there. Pass --resume to continue it, "
            "or --overwrite to start again."
        )


def keys_of(out: Path) -> list[str]:
    """Which runs a finished output is the result of; none where it does not say."""
    try:
        found = read_json(out / RUN_FILE, RUN).get("keys")
    except CheckpointError:
        return []
    return list(map(str, found)) if isinstance(found, list) else []


def is_complete(out: Path, key: str, *, resume: bool, overwrite: bool) -> bool:
    """Whether a resumed run has nothing left to do; ends one that was killed late.

    Args:
        out: The output folder.
        key: See ``output_transaction``.
        resume: False: nothing is looked at.
        overwrite: Whether an earlier output may be replaced.

    Raises:
        OutputError: The run is not dead, or the disk refuses.
    """
    if not resume:
        return False
    partial = partial_folder(out)
    if partial.is_dir():
        lock = _lock(partial)
        try:
            journal = read_journal(partial)
            left = journal or any(partial.iterdir())
            # COMPLETE, or nothing left at all: only renames and removals remain.
            if left and not (_begun(journal) == key and COMPLETE in journal):
                return False
            with writing(partial):
                _replace(out, partial, overwrite=overwrite)
        finally:
            os.close(lock)
    return key in keys_of(out)


@contextmanager
def output_transaction(
    out: Path,
    key: str,
    sources: Sequence[Checkpoint],
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[Workspace]:
    """Build an output; it appears when the block has ended well.

    After an error or a kill, ``OUT.partial`` keeps what is finished, unless nothing is.

    Args:
        out: The final folder.
        key: Hash of everything that determines the bytes; a resumed run must match.
        sources: What is read. Should its files change meanwhile, nothing is published.
        resume: Continue an unfinished run if there is one.
        overwrite: Replace an existing output; without ``resume`` forget an unfinished
            run.

    Raises:
        OutputError: The output is in the way; or the unfinished run was another one, or
            is not dead; or the disk refuses.
        CheckpointError: A file of a source has changed.
    """
    started = time.monotonic()
    check_output(out, resume=resume, overwrite=overwrite)
    partial = partial_folder(out)
    fresh = not partial.exists()
    lock = _lock(partial)
    space = Workspace(out=out, partial=partial, journal=[])
    try:
        space.journal = _continue(space, key, sources, resume=resume)
        _check_place(out, overwrite=overwrite)
        yield space
        if space.writer is not None:
            space.writer.close()
        for source in sources:
            # Bytes of two versions of a source must not end up in one output.
            check_states(source.folder, source.files)
        with writing(partial):
            _record_run(space.result, key, time.monotonic() - started, resume)
            sync_folder(space.result)
            # After the sync: COMPLETE vouches for names that are on the disk.
            append_journal(partial, COMPLETE)
            _replace(out, partial, overwrite=overwrite)
    except BaseException:
        if space.writer is not None:
            space.writer.abort()
        if fresh and _has_nothing(partial):
            # As far as it goes: the error that led here is the one to be told.
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


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


def _begun(journal: Sequence[dict[str, object]]) -> object:
    """The key of the run that a journal is of."""
    return next((entry["key"] for entry in journal if "key" in entry), None)


def _continue(
    space: Workspace, key: str, sources: Sequence[Checkpoint], *, resume: bool
) -> list[dict[str, object]]:
    """The journal of an unfinished run, or that of a new one in an empty folder."""
    files: object = [list(state) for source in sources for state in source.files]
    journal = read_journal(space.partial) if resume else []
    begun = _begun(journal)
    if begun not in (None, key):
        raise OutputError(
            f"{space.partial}: the unfinished run there used another plan, input or "
            "calibration text. Pass --overwrite to start again."
        )
    if begun is not None and journal[0].get("files") != files:
        # Its sampled bytes are the same (they are in the key), but nobody knows of the
        # others: one output is made from one source.
        log.warning(
            "%s: files of the input were changed or copied since this run began, so "
            "it starts again.",
            space.partial,
        )
        begun = None
    if begun is None:
        with writing(space.partial):
            _restore(space)
            _empty(space.partial)
        journal = [{"key": key, "files": files}]
    # Written anew: a line cut short by a kill must not swallow the next one.
    journal = [entry for entry in journal if entry != COMPLETE]
    rewrite_journal(space.partial, journal)
    return journal


def _check_place(out: Path, *, overwrite: bool) -> None:
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputError(
            f"{out}: the output folder is not empty, and was not made by this command. "
            "Choose another one, or pass --overwrite to replace it once the new one is "
            "complete."
        )


def _restore(space: Workspace) -> None:
    """Put back an earlier output that a run killed between its renames had moved."""
    replaced = space.partial / "replaced"
    if replaced.is_dir() and not space.out.exists():
        replaced.rename(space.out)


def _replace(out: Path, partial: Path, *, overwrite: bool) -> None:
    """Rename the result to its place and remove the rest; the journal goes last."""
    result, replaced = partial / "result", partial / "replaced"
    if result.exists():
        if out.exists():
            if any(out.iterdir()) and not overwrite:
                raise OutputError(
                    f"{out}: files are there that were not when the run began. Move "
                    "them away, or add --overwrite, then run the same command with "
                    "--resume."
                )
            if replaced.exists():
                shutil.rmtree(replaced)
            # A kill before the next rename: --resume ends it, --overwrite restores OUT.
            out.rename(replaced)
        result.rename(out)
        sync_folder(out.parent)
    # While anything is left, a resumed run reads COMPLETE in the journal.
    _empty(partial, last=JOURNAL_NAME)
    partial.rmdir()


def _empty(folder: Path, last: str | None = None) -> None:
    for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _has_nothing(partial: Path) -> bool:
    """Whether a run that failed has left nothing but its journal and empty folders."""
    names = (path.name for path in partial.rglob("*") if not path.is_dir())
    return all(name == JOURNAL_NAME for name in names)


def _record_run(folder: Path, key: str, elapsed_s: float, resumed: bool) -> None:
    """``run.json``: time and memory, the one file that differs between equal runs."""
    record: dict[str, Any] = {
        "elapsed_s": round(elapsed_s, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "resumed": resumed,
        # An output may be the last stage of another run.
        "keys": [*(one for one in keys_of(folder) if one != key), key],
    }
    write_file(folder / RUN_FILE, (json.dumps(record, indent=2) + "\n").encode())


def _check_space(out: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{out}: needs {needed / 2**30:.2f} GiB, but only {free / 2**30:.2f} GiB "
            "are free on that disk. Make room, or choose a folder on another disk."
        )
