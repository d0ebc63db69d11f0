"""From what the user typed, a folder or a Hub id, to a checkpoint folder."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CheckpointError, MoePruneError
from ..files.json_file import read_json
from .build import build_checkpoint
from .index import CONFIG, ITEM_BYTES, TensorInfo, read_index
from .open import Checkpoint, Origin
from .remap import CONFIG_BLOCK, FILE_NAME

log = logging.getLogger(__name__)

# Everything a safetensors checkpoint needs, and no second copy of the weights.
WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md"]
WANTED += ["*.tiktoken", "LICENSE*", "NOTICE*"]
UNWANTED = ["consolidated*", "original/*", "*.bin", "*.pth", "*.gguf", "onnx/*"]


def open_checkpoint(
    source: str | Path,
    revision: str | None = None,
    *,
    trust_code: bool = False,
    allow_links: bool = False,
) -> Checkpoint:
    """Open a local folder, or download a Hub repository and open its snapshot.

    Args:
        source: A folder, or ``owner/name`` on the Hub.
        revision: Branch, tag or commit of a Hub repository.
        trust_code: Whether its own code may tokenize, where no file says how.
        allow_links: Follow links that lead out of a local folder.

    Raises:
        CheckpointError: The folder or repository is missing, damaged or unsupported.
    """
    local = _find(source, revision)
    origin = Origin(local.name, local.revision)
    config = read_json(local.folder / "config.json", CONFIG)
    # What the Hub's library has linked, in a cache that may lie on several disks.
    follow = allow_links or local.revision is not None
    tensors = read_index(local.folder, allow_links=follow)
    opened = build_checkpoint(local.folder, config, tensors, origin)
    return replace(opened, trust_code=trust_code, allow_links=follow)


@dataclass(frozen=True)
class _Local:
    folder: Path
    name: str
    revision: str | None


def _find(source: str | Path, revision: str | None) -> _Local:
    folder = Path(source)
    # A local folder comes before a Hub repository of the same name.
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{source}: is a local folder; --revision is for Hub repositories."
            )
        return _Local(folder, folder.resolve().name, None)
    if not is_hub_id(str(source)):
        raise CheckpointError(
            f"{source}: no such folder, and not a Hub id of the form owner/name."
        )
    return _download(str(source), revision)


def may_be_checkpoint(source: str) -> bool:
    """Whether there is such a folder, or a Hub id may look so."""
    return Path(source).is_dir() or is_hub_id(source)


def is_hub_id(text: str) -> bool:
    """Whether it has the form ``owner/name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    # An id without an owner, such as gpt2, is taken for a mistyped folder.
    return text.count("/") == 1 and not text.startswith((".", "~"))


def _download(repo_id: str, revision: str | None) -> _Local:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except LocalEntryNotFoundError as error:
        # "Not in the cache" may only follow from an answer of the Hub, which says more.
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(repo_id, revision, error.__cause__) from error
        raise CheckpointError(
            f"{repo_id}: not a local folder, not in the local Hub cache, and the Hub "
            "cannot be reached (or HF_HUB_OFFLINE is set)."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _refused(repo_id, revision, error) from error
    # A snapshot folder is named after the commit it holds.
    return _Local(Path(folder), repo_id, Path(folder).name)


def _refused(repo_id: str, revision: str | None, error: Exception) -> CheckpointError:
    """What an answer of the Hub means, in one line."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in = "log in (`hf auth login`) or set HF_TOKEN."
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RevisionNotFoundError):
        meaning = f"has no revision {revision!r}. Give a branch, a tag or a commit."
    elif isinstance(error, GatedRepoError):
        meaning = f"is gated. Accept its terms on its page on the Hub, then {log_in}"
    elif isinstance(error, RepositoryNotFoundError) or status in {401, 403}:
        meaning = (
            "no such folder, and no such repository on the Hub. If it is private, "
            + log_in
        )
    elif isinstance(error, EntryNotFoundError):
        meaning = "the repository has no config.json, so it holds no model."
    else:
        meaning = f"cannot be downloaded: {' '.join(str(error).split())[:300]}"
    return CheckpointError(f"{repo_id}: {meaning}")


def open_remote(repo_id: str, revision: str | None = None) -> Checkpoint:
    """The headers of a Hub checkpoint without its weights (for ``inspect``).

    Raises:
        CheckpointError: See ``open_checkpoint``.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return _look(repo_id, revision)
    except MoePruneError:
        raise
    except HfHubHTTPError as error:
        raise _refused(repo_id, revision, error) from error
    except Exception as error:  # each HTTP library has its own for a lost connection
        log.info("%s: not reached (%s), looking in the cache", repo_id, error)
        return open_checkpoint(repo_id, revision)


def _look(repo_id: str, revision: str | None) -> Checkpoint:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    config_file = Path(hf_hub_download(repo_id, "config.json", revision=revision))
    # Cached files lie in a folder named after their commit.
    folder, commit = config_file.parent, config_file.parent.name
    config = read_json(config_file, CONFIG)
    if CONFIG_BLOCK in config:
        # By commit from here on: a branch may move between two requests.
        hf_hub_download(repo_id, FILE_NAME, revision=commit)
    try:
        metadata = get_safetensors_metadata(repo_id, revision=commit)
    except NotASafetensorsRepoError as error:
        raise CheckpointError(f"{repo_id}: has no safetensors weights.") from error
    except SafetensorsParsingError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{repo_id}: damaged weights: {reason}") from error
    tensors = {}
    for file_name, file in metadata.files_metadata.items():
        for name, info in file.tensors.items():
            if info.dtype not in ITEM_BYTES:
                raise CheckpointError(
                    f"{repo_id}: {name}: data type {info.dtype} is not supported."
                )
            first, last = info.data_offsets
            tensors[name] = TensorInfo(
                name=name,
                dtype=str(info.dtype),
                shape=tuple(info.shape),
                file=folder / file_name,
                # Counted from the data: the file is not here, and no weight is read.
                offset=first,
                nbytes=last - first,
            )
    return build_checkpoint(folder, config, tensors, Origin(repo_id, commit))


def open_headers(
    source: str | Path, revision: str | None = None, *, allow_links: bool = False
) -> Checkpoint:
    """Like ``open_checkpoint``, but a Hub id is only looked at, not downloaded."""
    if Path(source).is_dir() or not is_hub_id(str(source)):
        return open_checkpoint(source, revision, allow_links=allow_links)
    return open_remote(str(source), revision)
