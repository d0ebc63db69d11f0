"""Where an output may go: apart from its input, and where something can be written.

Asked before any work is done. What is in the way there (an earlier output, an
unfinished run) is another question: see ``cut.output``.
"""

import errno
import os
from pathlib import Path

from ..errors import OutputError
from ..files.atomic import check_regular


def check_folder(output: Path, source: Path) -> None:
    """Refuse an output folder that cannot be made, or would harm the input.

    Args:
        output: The folder to be made or replaced.
        source: The checkpoint folder that is read.

    Raises:
        OutputError: Naming both folders.
    """
    if output.name in {"", ".."}:
        raise OutputError(
            f"{str(output)!r}: the output is built beside its place and then renamed, "
            "which this folder cannot be. Name a new folder, such as ./pruned."
        )
    if output.is_symlink() or output.is_mount():
        kind = "link" if output.is_symlink() else "mount point"
        raise OutputError(
            f"{output}: is a {kind}, which a finished output cannot replace. "
            f"Choose a folder inside it: {output / 'pruned'}"
        )
    _check_links(output)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; choose another output folder.")
    _check_apart(output, source)
    _check_writable(output)


def check_file(output: Path, source: Path) -> None:
    """Refuse an output file that cannot be written, or would harm the input.

    Args:
        output: The file to be made or replaced.
        source: The checkpoint folder that is read.

    Raises:
        OutputError: Naming the file or its folder.
    """
    if not output.parent.exists():
        raise OutputError(f"{output.parent}: no such folder; make it first.")
    _check_links(output)
    check_regular(output)
    _check_apart(output, source)
    _check_writable(output)


def _check_links(output: Path) -> None:
    try:
        output.stat()
    except OSError as error:
        # Circles alone: a path that does not exist yet is the usual case.
        if error.errno == errno.ELOOP:
            raise OutputError(
                f"{output}: leads in a circle of links. Choose another output."
            ) from error


def _check_apart(output: Path, source: Path) -> None:
    target, origin = output.resolve(), source.resolve()
    if target == origin:
        raise OutputError(
            f"{output}: is the input itself, which is never changed. Choose another "
            "output."
        )
    if target.is_relative_to(origin):
        raise OutputError(
            f"{output}: is inside the input {source}, which is never changed. "
            "Choose an output outside it."
        )
    if origin.is_relative_to(target):
        raise OutputError(
            f"{output}: contains the input {source}, so it cannot be replaced. "
            "Choose another output."
        )


def _check_writable(output: Path) -> None:
    """Look at the nearest folder above that exists; those below can be made."""
    folder = output.resolve().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{output}: cannot be made, {folder} is not a folder.")
    # Effective ids are those that the kernel will look at when we write.
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise OutputError(
            f"{output}: cannot be made, {folder} is not writable. "
            "Choose another output, or change its permissions."
        )
