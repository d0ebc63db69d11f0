"""Whether files are what they were: size and times, as build tools compare them."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError


class FileState(NamedTuple):
    """What a file system says of a file that nobody has touched."""

    name: str
    size: int
    modified_ns: int
    changed_ns: int
    """Of the inode: unlike the time of modification it cannot be set back."""


def file_states(folder: Path, paths: Iterable[Path]) -> tuple[FileState, ...]:
    """The state of each file in a folder, sorted by name.

    Files of a Hub repository that are only looked at are not there and have none.
    """
    found = []
    for path in sorted(paths):
        with suppress(FileNotFoundError):
            state = path.stat()
            name = path.relative_to(folder).as_posix()
            times = state.st_mtime_ns, state.st_ctime_ns
            found.append(FileState(name, state.st_size, *times))
    return tuple(found)


def check_states(folder: Path, before: Iterable[FileState]) -> None:
    """Refuse files that have changed since.

    Raises:
        CheckpointError: Naming the first one.
    """
    for state in before:
        path = folder / state.name
        try:
            now = file_states(folder, [path])
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read any more: {error.strerror or error}."
            ) from error
        # A file that is gone has no state, which differs as well.
        if now != (state,):
            raise CheckpointError(
                f"{path}: was changed while it was being read. Run the same command "
                "again when nobody writes there."
            )
