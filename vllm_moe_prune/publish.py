"""Uploading a finished output to the Hub: verified, resumable, its card last.

Files go up by huggingface_hub's ``upload_folder``, which skips what is there already:
the same command again continues an interrupted upload. The card, which names the
repository, follows when everything it speaks of is there.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint.index import check_link
from .checkpoint.open import Checkpoint
from .checkpoint.source import is_hub_id
from .cut.card import source_card
from .cut.transaction import RUN_FILE
from .errors import CheckpointError, OutputError, RemapError

CARD = "README.md"
KEPT_BACK = [RUN_FILE, CARD, ".*", "*/.*"]
"""Not uploaded with the folder: the record of this machine, the card, hidden files."""
REPLACED = ["*.safetensors", "*.index.json"]
"""Others of these are deleted from the repository: loaders would read them too."""
FOLDER = "<this folder>"
"""What the card of an output calls it."""


@dataclass(frozen=True)
class Parcel:
    """What is to be uploaded, and where to."""

    folder: Path
    repo: str
    private: bool
    files: dict[str, int]
    """Path in the repository -> bytes; the card too."""
    card: str

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Pushed:
    """Where an upload went."""

    url: str
    commit: str


def pack(
    output: Checkpoint, repo: str, *, private: bool, base_model: str | None
) -> Parcel:
    """List what an upload of an output is made of; nothing is sent.

    Args:
        output: A folder that ``cut``, ``run``, ``convert`` or ``recover`` wrote.
        repo: ``owner/name`` on the Hub.
        private: Whether only its owner may see it.
        base_model: Hub id of the original, if it was cut from a local folder.

    Raises:
        OutputError: An id is none.
        RemapError: The folder is no output of this tool.
        CheckpointError: It has no card, or a file is a link out of it.
    """
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    for asked in filter(None, (repo, base_model)):
        if not is_hub_id(asked):
            raise OutputError(f"{asked}: is no Hub id of the form owner/name.")
    if output.remap is None or output.origin.revision is not None:
        raise RemapError(
            f"{output.origin.name}: is no folder that vllm-moe-prune wrote."
        )
    found = {
        path.relative_to(output.folder).as_posix(): path
        for path in sorted(output.folder.rglob("*"))
        if not path.is_dir()
    }
    files = {}
    # Sorted out as upload_folder will do it.
    for name in filter_repo_objects(found, ignore_patterns=KEPT_BACK):
        path = found[name]
        check_link(output.folder, path, allow_links=output.allow_links)
        if not path.is_file():
            raise CheckpointError(f"{path}: is no regular file; remove it.")
        files[name] = path.stat().st_size
    card = _card(output, repo, base_model)
    return Parcel(
        output.folder, repo, private, {CARD: len(card.encode()), **files}, card
    )


def _card(output: Checkpoint, repo: str, base_model: str | None) -> str:
    from huggingface_hub import ModelCard

    path = output.folder / CARD
    text = source_card(output)
    if text is None:
        raise CheckpointError(
            f"{path}: missing. Copy the folder again, or cut it anew."
        )
    try:
        card = ModelCard(text.replace(FOLDER, repo), ignore_metadata_errors=False)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: its front matter cannot be read: "
            f"{' '.join(str(error).split())[:300]}."
        ) from error
    if base_model is not None:
        card.data["base_model"] = base_model
    return str(card)


def push(parcel: Parcel, *, bars: bool = False) -> Pushed:
    """Create the repository if need be, and upload; again the same: continue.

    Args:
        parcel: What and where to. Its folder should be verified.
        bars: Whether the library may draw progress bars.

    Raises:
        OutputError: The Hub refused, or cannot be reached; the token is never told.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # Its warnings and hints would stand among our lines; failures are raised anyway.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not bars:
        disable_progress_bars()
    api = HfApi()
    where: dict[str, Any] = {"repo_id": parcel.repo, "repo_type": "model"}
    try:
        # First, so that a missing token is told before anything is read.
        api.whoami()
        api.create_repo(**where, private=parcel.private, exist_ok=True)
        found = api.repo_info(**where)
        if parcel.private and not found.private:
            raise OutputError(
                f"{parcel.repo}: exists and is public. Choose another name, make it "
                "private on the Hub, or push with --public."
            )
        api.upload_folder(
            **where,
            folder_path=parcel.folder,
            ignore_patterns=KEPT_BACK.copy(),
            delete_patterns=REPLACED,
            commit_message="Upload with vllm-moe-prune",
        )
        done = api.upload_file(
            **where,
            path_or_fileobj=parcel.card.encode(),
            path_in_repo=CARD,
            commit_message="Upload the card with vllm-moe-prune",
        )
    # httpx's errors are no OSError; RuntimeError is what a failed transfer becomes,
    # LookupError an answer that lacks something.
    except (OSError, ValueError, RuntimeError, LookupError, _transport()) as error:
        raise OutputError(_refused(parcel.repo, error)) from error
    return Pushed(f"{api.endpoint}/{parcel.repo}", str(done.oid))


def _transport() -> type[Exception]:
    import httpx

    return httpx.HTTPError


def _refused(repo: str, error: Exception) -> str:
    """What stopped an upload, in one line without secrets."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    # A failed transfer says which file; why is in its cause.
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return (
            f"{repo}: the Hub does not know you. Log in (`hf auth login`) or set "
            "HF_TOKEN to a token that may write."
        )
    if status == 403:
        return f"{repo}: your token may not write there. Use one that may."
    said = " ".join(f"{error} {cause or ''}".split())
    return (
        f"{repo}: the upload stopped: {redacted(said)[:400]} What has arrived is kept: "
        "run the same command again to continue."
    )


def redacted(text: str) -> str:
    """A message without what gives access: the token, signatures in addresses."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "***")
    # An address of a storage service carries its signature behind the question mark.
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1?...", text)
