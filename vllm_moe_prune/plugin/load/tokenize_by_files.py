"""vLLM's tokenizer of a checkpoint of our families: what the checkpoint's files say.

vLLM lets transformers pick one, by the class that tokenizer_config.json names. Outputs
are written so that it picks the right one; originals are not.
"""

import logging
from pathlib import Path
from typing import Any

from ...archs import known
from ...checkpoint.index import CONFIG
from ...checkpoint.tokenizer import (
    corrections,
    load_tokenizer,
    names_code,
    needs_code,
)
from ...files.json_file import read_json

log = logging.getLogger(__name__)


def go_by_files() -> None:
    """Make vLLM load tokenizers of our families by their files."""
    from vllm.tokenizers.hf import CachedHfTokenizer, get_cached_tokenizer

    picked = CachedHfTokenizer.from_pretrained

    def from_pretrained(
        _class: type[Any],
        path_or_repo_id: str | Path,
        /,
        *args: Any,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Any:
        found = tokenizer_by_files(Path(path_or_repo_id), trust_code=trust_remote_code)
        if found is None:
            return picked(
                path_or_repo_id, *args, trust_remote_code=trust_remote_code, **options
            )
        if "truncation_side" in options:
            found.truncation_side = options["truncation_side"]
        # vLLM's proxy: transformers works the vocabulary out anew at every call.
        return get_cached_tokenizer(found)

    CachedHfTokenizer.from_pretrained = classmethod(from_pretrained)


def tokenizer_by_files(folder: Path, *, trust_code: bool) -> Any | None:
    """The tokenizer that a checkpoint's files say, where vLLM would load another.

    Returns:
        None where vLLM loads the right one, or the checkpoint is of another family.

    Raises:
        MoePruneError: Only code can tokenize and may not run; or the files are damaged.
    """
    config = folder / "config.json"
    if not config.is_file() or read_json(config, CONFIG).get("model_type") not in (
        known()
    ):
        return None
    if needs_code(folder, trust_code=trust_code):
        return None
    # Code that may run wins over the files in transformers.
    runs_code = trust_code and names_code(folder)
    if not runs_code and not corrections(folder):
        return None
    log.warning("%s: tokenized by its files, not by the class they name", folder)
    return load_tokenizer(folder)
