"""Everything in a checkpoint's folder that is not weights, folders in it included."""

from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import CheckpointError
from .index import check_link

WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pth", ".pt", ".gguf")
# Folders of the Hub that hold the same weights once more, with what belongs to those.
OTHER_COPIES = {"original", "onnx"}
# Tokenizers and templates are megabytes; anything larger is not metadata.
MAX_FILE_BYTES = 1 << 30
MAX_FILES = 10_000
MAX_DEPTH = 16
"""Of folders in folders; a link to a folder above has no end."""


def side_files(
    folder: Path, own: Collection[str], *, allow_links: bool = False
) -> list[Path]:
    """Files to be copied with a checkpoint: tokenizer, templates, code, in all folders.

    Left out are weights, hidden files, and other copies of the weights.

    Args:
        folder: The checkpoint.
        own: Names, relative to it, of what is written anew.
        allow_links: Follow links that lead out of it.

    Raises:
        CheckpointError: One is a link out of the folder, or to nothing; is neither file
            nor folder; is implausibly large, deep down, or there are too many.
    """
    found: list[Path] = []
    for path in _walk(folder, folder, own, allow_links):
        found.append(path)
        if len(found) > MAX_FILES:
            raise CheckpointError(
                f"{folder}: has more than {MAX_FILES} files beside its weights; move "
                "those out that do not belong to it."
            )
    return found


def _walk(
    root: Path, folder: Path, own: Collection[str], allow_links: bool, depth: int = 0
) -> Iterator[Path]:
    if depth > MAX_DEPTH:
        raise CheckpointError(
            f"{folder}: is nested deeper than {MAX_DEPTH} folders; perhaps a link "
            "in it leads back to a folder above. Remove it."
        )
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be read: {error.strerror or error}."
        ) from error
    for path in paths:
        name, relative = path.name, path.relative_to(root).as_posix()
        if name.startswith(".") or name.endswith(WEIGHT_SUFFIXES) or relative in own:
            continue
        if path.is_dir():
            if relative not in OTHER_COPIES:
                check_link(root, path, allow_links=allow_links)
                yield from _walk(root, path, own, allow_links, depth + 1)
            continue
        check_link(root, path, allow_links=allow_links)
        _check_file(path)
        yield path


def _check_file(path: Path) -> None:
    # exists() follows links, and is False for one that dangles.
    if not path.exists():
        raise CheckpointError(f"{path}: is a link to nothing; remove it.")
    if not path.is_file():
        raise CheckpointError(
            f"{path}: is neither a file nor a folder, so it is not copied; remove it."
        )
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path}: {size} bytes is too large for a companion file; move it out of "
            "the checkpoint folder."
        )
