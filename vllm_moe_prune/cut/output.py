"""What an output holds beside its weights: files copied from the input, and our own."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..calibrate.data import Tokens
from ..calibrate.stats import Stats
from ..checkpoint.index import check_link
from ..checkpoint.open import Checkpoint
from ..checkpoint.side_files import side_files
from ..checkpoint.tensor_hashes import FILE_NAME as HASHES
from ..checkpoint.tokenizer import corrections
from ..checkpoint.writer import ShardPlan
from ..decide.cut_plan import CutPlan, dump_plan
from ..errors import CheckpointError
from ..files.atomic import copy_file, write_file
from ..files.regular import MIB, open_regular
from .transaction import RUN_FILE

log = logging.getLogger(__name__)

STATS_FILE = Path("moe_prune", "stats.safetensors")
"""In a folder of its own: loaders take every safetensors file beside config.json."""
CHANNELS_FILE = STATS_FILE.with_name("channels.safetensors")
"""Which channels narrowed experts kept; see ``cut/channels.py``."""
RECOVERED = "recovered"
"""The key of provenance.json that lists trainings after the cut."""
RECORDS = {
    "expert_remap.json",
    "plan.json",
    "moe_prune.yaml",
    "provenance.json",
    STATS_FILE.as_posix(),
    CHANNELS_FILE.as_posix(),
}
# Written anew for the output of a cut, so never copied from its input.
OWN_FILES = {"config.json", "README.md", HASHES, RUN_FILE} | RECORDS


def cut_key(
    checkpoint: Checkpoint,
    plan: CutPlan,
    shards: Sequence[ShardPlan],
    tokens: Tokens | None,
    stats: Stats | None,
    storage: str = "dense",
) -> str:
    """Hash of everything that determines the output's bytes."""
    said = (__version__, companions_sha256(checkpoint), stats is not None, storage)
    digest = hashlib.sha256(repr(said).encode())
    digest.update(dump_plan(plan).encode())
    # The header holds every name, dtype, shape and offset of its shard.
    for shard in shards:
        digest.update(shard.header)
    if plan.needs_activations and tokens is not None:
        digest.update(tokens.sha256.encode())
    return digest.hexdigest()


def companions(checkpoint: Checkpoint) -> list[Path]:
    """Everything that is not weights (tokenizer, templates, code), to be copied.

    Raises:
        CheckpointError: See ``side_files``.
    """
    return side_files(checkpoint.folder, OWN_FILES, allow_links=checkpoint.allow_links)


def companions_sha256(checkpoint: Checkpoint) -> str:
    """Hash of all files beside the weights: an output is made of them too."""
    digest = hashlib.sha256()
    # Not copied by a cut, but the card, provenance and table derive from them.
    others = [checkpoint.folder / name for name in sorted({"README.md"} | RECORDS)]
    for path in (*companions(checkpoint), *others):
        if path.is_file():
            name = path.relative_to(checkpoint.folder).as_posix()
            # Sizes delimit the contents: moving bytes between files changes the hash.
            digest.update(f"\n{name} {path.stat().st_size}\n".encode())
            with open_regular(path) as file:
                while part := file.read(MIB):
                    digest.update(part)
    return digest.hexdigest()


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
        write_file(folder / name, data)
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
            # All links first, so that a refusal leaves nothing half-copied.
            check_link(checkpoint.folder, path, allow_links=checkpoint.allow_links)
    for path in found:
        if path.is_file():
            _copy(path, folder / path.relative_to(checkpoint.folder))


def _copy(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        copy_file(path, to)
    except OSError as error:
        # What the output's disk refuses is told by whoever called.
        if error.filename != str(path):
            raise
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}."
        ) from error
