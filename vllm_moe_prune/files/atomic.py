"""Files and folders that change in one step: a kill leaves the old or the new one."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import OutputError
from .regular import MIB, kind_of, open_regular

RESUME = "run the same command with --resume"
REPEAT = "run the same command again"


@contextmanager
def writing(path: Path, then: str = RESUME) -> Iterator[None]:
    """Turn what the disk refuses into an error that says how to go on.

    Raises:
        OutputError: Instead of any OSError; names ``path``.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}. "
            f"Free space or mend the disk, then {then}."
        ) from error


def check_regular(path: Path) -> None:
    """Refuse what is there and neither a regular file nor a link to one.

    Raises:
        OutputError: Saying what it is.
    """
    try:
        found = kind_of(path.stat().st_mode)
    except FileNotFoundError:
        return
    if found:
        raise OutputError(f"{path}: is {found}; give the name of a file.")


def copy_file(path: Path, to: Path) -> None:
    """Copy the bytes of a regular file, a piece at a time; see ``write_file``.

    Raises:
        OSError: It cannot be read, is no regular file, or ``to`` cannot be written.
    """
    with open_regular(path) as file:
        write_file(to, iter(lambda: file.read(MIB), b""))


def write_file(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Make or replace a regular file: write beside it, flush to disk, rename.

    A link keeps being one: what it leads to is replaced.

    Args:
        path: The file.
        data: Its bytes, whole or in pieces.

    Raises:
        OutputError: Something else than a regular file is there.
        OSError: The disk refuses; an earlier file is as it was.
    """
    check_regular(path)
    # A rename onto a link would replace the link.
    target = path.resolve()
    # In the same folder, so on the same file system, where a rename is one step.
    temporary = target.with_name(f".{target.name}.tmp")
    # O_NOFOLLOW: a link planted under this name must not be written through.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    try:
        with open(os.open(temporary, flags, 0o666), "wb") as file:  # noqa: PTH123
            for part in (data,) if isinstance(data, bytes) else data:
                file.write(part)
            file.flush()
            # First the bytes: after a crash the name must not lead to an empty file.
            os.fsync(file.fileno())
        temporary.replace(target)
    # BaseException: Ctrl-C must leave no temporary file behind either.
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder at once: no kill leaves a part of it under its name.

    What a killed removal left is removed too.
    """
    going = folder.with_name(f".{folder.name}.removed")
    if going.exists():
        shutil.rmtree(going)
    if folder.exists():
        folder.rename(going)
        shutil.rmtree(going)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems do that by themselves and know no such call.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
