"""Are the files beside the weights those of the source?"""

from pathlib import Path

from ..checkpoint.open import Checkpoint
from ..checkpoint.tokenizer import corrections
from ..errors import CheckpointError
from ..files.regular import MIB, open_regular
from .output import companions


def check_companions(folder: Path, source: Checkpoint) -> None:
    """Compare every companion file with the source's, in all folders.

    A tokenizer's files may also be what ``corrections`` makes of the source's.

    Raises:
        CheckpointError: One is missing or differs.
    """
    corrected = corrections(source.folder)
    originals = {
        path.relative_to(source.folder).as_posix(): path for path in companions(source)
    }
    for name in sorted(originals.keys() | corrected.keys()):
        found, original = folder / name, originals.get(name)
        if not found.is_file():
            raise CheckpointError(f"{found}: missing, but the source has it.")
        if original is not None and _same(original, found):
            continue
        data = corrected.get(name)
        # Size first, so that no larger file is read into memory.
        if data is None or found.stat().st_size != len(data) or data != _all(found):
            raise CheckpointError(f"{found}: differs from the source's.")


def _same(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with open_regular(one) as first, open_regular(other) as second:
        while part := first.read(MIB):
            if part != second.read(len(part)):
                return False
    return True


def _all(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()
