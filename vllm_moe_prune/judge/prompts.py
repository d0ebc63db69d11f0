"""Prompts as token ids: both models are given the same ones."""

import hashlib
from dataclasses import dataclass

from ..calibrate.text import name_of, read_prompts
from ..checkpoint.open import Checkpoint
from ..checkpoint.panics import tokenizer_errors
from ..checkpoint.tokenizer import load_tokenizer
from ..errors import EvaluationError

MOST = 10_000
"""Prompts; more would be answered for days, and all answers are held in memory."""


@dataclass(frozen=True)
class Prompts:
    """What models are given to answer."""

    source: str
    """The file's name, or ``hub:...``."""
    texts: tuple[str, ...]
    """With the chat template's marks, where there is one."""
    ids: tuple[tuple[int, ...], ...]

    @property
    def sha256(self) -> str:
        """Identifies the ids, the same on every machine."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()


def load_prompts(checkpoint: Checkpoint, source: str) -> Prompts:
    """Read prompts and tokenize them as the checkpoint is used.

    Args:
        checkpoint: Whose tokenizer and chat template count; those of a pruned one are
            its original's.
        source: See ``calibrate.text.read_prompts``.

    Raises:
        CalibrationError: The file, a prompt or the tokenizer cannot be used.
        EvaluationError: There is no prompt, or there are too many.
    """
    tokenizer = load_tokenizer(checkpoint.folder, trust_code=checkpoint.trust_code)
    texts: list[str] = []
    ids: list[tuple[int, ...]] = []
    for prompt in read_prompts(source, tokenizer):
        if len(texts) == MOST:
            raise EvaluationError(
                f"{source}: holds more than {MOST:,} prompts. Give fewer."
            )
        with tokenizer_errors(
            f"{checkpoint.folder}: its tokenizer gives up on prompt "
            f"{len(texts) + 1} of {source}",
            "Check the patterns in its tokenizer.json.",
        ):
            # A rendered conversation has its special tokens already.
            found = tokenizer(
                prompt.text, add_special_tokens=prompt.ends, verbose=False
            )["input_ids"]
        if not found:
            raise EvaluationError(
                f"{source}: prompt {len(texts) + 1} has no tokens. Leave it out."
            )
        texts.append(prompt.text)
        ids.append(tuple(found))
    if not texts:
        raise EvaluationError(f"{source}: is empty; there is no prompt in it.")
    return Prompts(name_of(source), tuple(texts), tuple(ids))
