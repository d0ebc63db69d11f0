"""Reading a regular file, up to a limit: no FIFO that waits, no device without end."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from ..errors import MoePruneError

KIB, MIB = 1 << 10, 1 << 20
OTHERS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file: how much of one is read, and what errors about it say."""

    name: str
    """As in "not a plan file"."""
    max_bytes: int
    """Far above the largest real one; a larger file is refused unread."""
    error: type[MoePruneError]
    absent: str = "no such file."
    """What is said where there is none."""
    remedy: str = "Copy or download it again."
    """What to do about a damaged one."""


def open_regular(path: Path) -> FileIO:
    """Open a file for reading, without buffer, if it is a regular one.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    # Opening a FIFO would wait for its writer, a terminal would become ours.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        # fstat of the opened file: the path may lead elsewhere by now.
        _refuse_irregular(os.fstat(fd).st_mode, path)
        return FileIO(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def kind_of(mode: int) -> str | None:
    """What a file is by its mode, in words; None: a regular one."""
    if stat.S_ISREG(mode):
        return None
    return next((name for is_it, name in OTHERS if is_it(mode)), "special")


def _refuse_irregular(mode: int, path: Path) -> None:
    if found := kind_of(mode):
        raise OSError(None, f"is {found}, not a regular file", str(path))


def read_bounded(path: Path, limit: int) -> bytes:
    """All bytes of a regular file that has at most so many.

    Raises:
        OSError: It cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # One byte more than allowed tells "too large" from "just fits".
        parts, left = [], limit + 1
        # Its size is what it says; files of /proc say 0.
        while size <= limit and left and (part := file.read(min(left, MIB))):
            parts.append(part)
            left -= len(part)
    if size > limit or not left:
        found = f"{size} bytes" if size > limit else "more"
        raise OSError(None, f"{found}, but at most {limit} are read", str(path))
    return b"".join(parts)


def read_file(path: Path, kind: Kind) -> bytes:
    """All bytes of a file of a kind.

    Raises:
        MoePruneError: ``kind.error``: it is absent, cannot be read, is no regular file
            or larger than any real one.
    """
    try:
        return read_bounded(path, kind.max_bytes)
    except FileNotFoundError as error:
        raise kind.error(f"{path}: {kind.absent}") from error
    except OSError as error:
        said = error.strerror or str(error)
        # Errors raised here carry no errno; they end with the kind expected.
        ours = "" if error.errno else f"; expected a {kind.name}"
        raise kind.error(f"{path}: {said}{ours}.") from error


def read_text(path: Path, kind: Kind) -> str:
    """The text of a UTF-8 file of a kind.

    Raises:
        MoePruneError: As ``read_file``; or it is not UTF-8.
    """
    data = read_file(path, kind)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind.error(
            f"{path}: byte {error.start} is not UTF-8; expected a {kind.name}."
        ) from error
