"""Text to tokens: windows of equal length, chosen by a seed, of one or more sources.

No more text is read than four times the tokens asked for: of a huge file or data set
that is its beginning, of which the seed chooses windows. The windows of several sources
are mixed, so that the first of them are of all sources too.

Axes: S sequences (windows), T tokens of a window.
"""

import copy
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoint.claims import warn_once
from ..checkpoint.open import Checkpoint
from ..checkpoint.panics import tokenizer_errors
from ..checkpoint.tokenizer import load_tokenizer
from ..errors import CalibrationError
from ..recipes.calibration import Calibration, NamedText
from .shipped import NOTE, SHIPPED, fitting, shipped_texts
from .text import Document, name_of, read_documents

log = logging.getLogger(__name__)

Ids = NDArray[np.int64]

# Of this many times the tokens asked for, the seed chooses; beyond is not read.
READ_MULTIPLE = 4
# Handed to the tokenizer at once, which spreads the documents over the cores.
ENCODE_CHARACTERS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one source gave."""

    name: str
    """Empty where the only source has no name."""
    source: str
    samples: int
    windows: int
    """How many windows there were to choose from."""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Calibration tokens and where they came from."""

    ids_ST: torch.Tensor
    """int64; each window starts with the BOS token if the tokenizer adds one."""
    source: str
    sha256: str
    """Of the ids, little-endian int64, after their shape; of several sources also which
    window is of which."""
    seed: int = 0
    length_asked: int | None = None
    """The sequence length asked for, where the model's maximum is shorter."""
    windows: int | None = None
    """How many windows there were to choose from."""
    parts: tuple[Part, ...] = ()
    """The sources that have names."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources; none where there is one without a name."""
        return tuple(part.name for part in self.parts)

    @property
    def source_S(self) -> torch.Tensor:
        """The index in ``names`` of each window's source, int64; 0 without names."""
        if not self.parts:
            return torch.zeros(len(self.ids_ST), dtype=torch.int64)
        return torch.tensor(_mixed([part.samples for part in self.parts]))

    def describe(self) -> dict[str, Any]:
        """What provenance records: only what determines the ids."""
        samples, length = self.ids_ST.shape
        record: dict[str, Any] = {
            "source": self.source,
            "sha256": self.sha256,
            "samples": samples,
            "sequence_length": length,
            "seed": self.seed,
        }
        if self.length_asked is not None:
            record["sequence_length_asked"] = self.length_asked
        if self.windows is not None:
            record["windows"] = self.windows
        if self.parts:
            record["sources"] = [asdict(part) for part in self.parts]
        return record


def load_tokens(checkpoint: Checkpoint, calibration: Calibration) -> Tokens:
    """The calibration windows that a recipe asks for.

    Raises:
        CalibrationError: An unusable source, no tokenizer, or too little text.
    """
    return _load(checkpoint, calibration.texts, calibration)


def load_heldout(checkpoint: Checkpoint, calibration: Calibration) -> Tokens:
    """Windows to judge candidates on: of texts of their own, or kept apart.

    Raises:
        CalibrationError: As ``load_tokens``, or the text is too short for both.
    """
    if calibration.heldout_source is not None:
        own = calibration.model_copy(update={"samples": calibration.heldout})
        return _load(checkpoint, calibration.heldout_texts, own)
    return _load(checkpoint, calibration.texts, calibration, apart=True)


def _load(
    checkpoint: Checkpoint,
    texts: Sequence[NamedText],
    calibration: Calibration,
    *,
    apart: bool = False,
) -> Tokens:
    """The windows of all texts, mixed; with ``apart`` the held-out ones."""
    shipped = not texts
    if shipped:
        warn_once(NOTE)
        # Of fewer windows than sources each is of another source.
        texts = shipped_texts()[: min(calibration.samples, calibration.heldout)]
    reader = TokenReader(checkpoint, texts[0].text)
    weights = [text.weight for text in texts]
    samples = _shared(calibration.samples, weights, "--samples")
    heldout = [0] * len(texts)
    if apart or shipped:
        heldout = _shared(calibration.heldout, weights, "--heldout")
    asked = calibration.sequence_length
    length = reader.cap(asked)
    rows, parts = [], []
    for text, count, held in zip(texts, samples, heldout, strict=True):
        found, windows = _chosen(
            reader.reading(text.text),
            length,
            calibration.seed,
            (count, held),
            apart=apart,
            shipped=shipped,
        )
        rows.append(found)
        parts.append(
            Part(
                name=text.name,
                source=SHIPPED if shipped else name_of(text.text),
                samples=len(found),
                windows=windows,
                weight=text.weight,
            )
        )
    named = bool(texts[0].name)
    # Of each source its windows in order: the next one of whichever source comes next.
    taken = [iter(found) for found in rows]
    mixed = np.stack([next(taken[at]) for at in _mixed([len(one) for one in rows])])
    ids_ST = reader.with_bos(mixed)
    sha256 = sha256_of(ids_ST)
    if named:
        told = [(part.name, part.samples) for part in parts]
        sha256 = hashlib.sha256(f"{told} {sha256}".encode()).hexdigest()
    return Tokens(
        ids_ST=ids_ST,
        source=SHIPPED if shipped else " + ".join(part.source for part in parts),
        sha256=sha256,
        seed=calibration.seed,
        length_asked=None if length == asked else asked,
        windows=sum(part.windows for part in parts),
        parts=tuple(parts) if named else (),
    )


def _chosen(
    text: "TokenReader",
    length: int,
    seed: int,
    numbers: tuple[int, int],
    *,
    apart: bool,
    shipped: bool,
) -> tuple[Ids, int]:
    """Windows of one source in the order in which they stand, and how many there are.

    Those that calibrate are the first that the seed takes, held-out ones the next.

    Args:
        text: The source.
        length: Tokens of a window.
        seed: Ranks the windows.
        numbers: How many calibrate, and how many are held out.
        apart: Whether those that are held out are meant.
        shipped: Whether fewer will do.
    """
    samples, held = numbers
    payload = text.payload(length)
    # By samples alone, whatever is held out: both calls must rank the same windows, or
    # what is judged on could also calibrate.
    ids = text.read(None if shipped else READ_MULTIPLE * samples * payload)
    windows = len(ids) // payload
    if shipped and windows > 1:
        samples, held = fitting(windows, samples, held)
    last = samples + held if apart else samples
    if windows < last:
        raise CalibrationError(
            f"{text.source}: gives {windows} windows of {length} tokens, but {samples} "
            f"are asked for{f' and {held} apart to judge on' if apart else ''}. "
            "Use a longer text, or fewer or shorter windows: --samples, --heldout, "
            "--sequence-length."
        )
    first = samples if apart else 0
    chosen = sorted(_ranked(windows, seed)[first:last])
    rows: Ids = ids[: windows * payload].reshape(windows, payload)[chosen]
    return rows, windows


def _shared(total: int, weights: Sequence[float], flag: str) -> list[int]:
    """Whole windows in proportion to the weights, at least one of each source.

    Raises:
        CalibrationError: There are fewer windows than sources.
    """
    if total < len(weights):
        raise CalibrationError(
            f"{flag} {total}: is less than one window of each of the {len(weights)} "
            "sources. Ask for more windows, or leave sources out."
        )
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [max(1, int(share)) for share in exact]
    # What is missing goes where most is missing; what is too much leaves the largest.
    while sum(counts) < total:
        gaps = [share - count for share, count in zip(exact, counts, strict=True)]
        counts[gaps.index(max(gaps))] += 1
    while sum(counts) > total:
        counts[counts.index(max(counts))] -= 1
    return counts


def _mixed(counts: Sequence[int]) -> list[int]:
    """The source of each window: every source evenly spread, ties to the first."""
    places = [
        ((at + 0.5) / count, source)
        for source, count in enumerate(counts)
        for at in range(count)
    ]
    return [source for _, source in sorted(places)]


def sha256_of(ids_ST: torch.Tensor) -> str:
    """Identifies token ids, the same on every machine."""
    digest = hashlib.sha256(repr(tuple(ids_ST.shape)).encode())
    digest.update(ids_ST.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _ranked(windows: int, seed: int) -> list[int]:
    """All windows, mixed by a hash, so that no library's RNG matters."""
    return sorted(
        range(windows),
        key=lambda window: hashlib.sha256(f"{seed} {window}".encode()).digest(),
    )


class TokenReader:
    """The ids of a text source under a checkpoint's own tokenizer."""

    def __init__(self, checkpoint: Checkpoint, source: str) -> None:
        """Load the tokenizer; read no text yet."""
        self.source = source
        self.folder = checkpoint.folder
        self.tokenizer = load_tokenizer(
            checkpoint.folder, trust_code=checkpoint.trust_code
        )
        self.bos = _added_bos(self.tokenizer)
        self.eos: int | None = self.tokenizer.eos_token_id
        self.max_length = checkpoint.config.get("max_position_embeddings")
        embedding = checkpoint.tensors.get(checkpoint.arch.embedding)
        self.vocabulary = embedding.shape[0] if embedding else None

    def reading(self, source: str) -> "TokenReader":
        """The same tokenizer for another text."""
        other = copy.copy(self)
        other.source = source
        return other

    def cap(self, length: int) -> int:
        """The sequence length, no longer than the model's positions."""
        if self.max_length is None:
            return length
        if not isinstance(self.max_length, int) or self.max_length < 2:
            raise CalibrationError(
                f"{self.source}: no window fits, since config.json's "
                f"max_position_embeddings is {self.max_length!r}."
            )
        if length <= self.max_length:
            return length
        log.info("sequence length %s capped at %s", length, self.max_length)
        return self.max_length

    def payload(self, length: int) -> int:
        """Tokens of text in a window of ``length``."""
        return length if self.bos is None else length - 1

    def with_bos(self, rows: Ids) -> torch.Tensor:
        """Windows of text as a tensor, each after a BOS token if there is one."""
        if self.bos is not None:
            rows = np.insert(rows, 0, self.bos, axis=1)
        return torch.from_numpy(np.ascontiguousarray(rows))

    def read(self, limit: int | None = None) -> Ids:
        """The first ``limit`` token ids of the source, all if None.

        No special tokens are added, except the end-of-text token between unrelated
        records.
        """
        parts: list[Ids] = []
        count = 0
        documents = read_documents(self.source, self.tokenizer)
        for batch in _batches(documents):
            for part in self._encode(batch):
                self._check(part)
                parts.append(part)
                count += len(part)
            if limit is not None and count >= limit:
                log.info("%s: stopped reading after %s tokens", self.source, count)
                break
        if count == 0:
            raise CalibrationError(f"{self.source}: is empty; there is no text in it.")
        return np.concatenate(parts)[:limit]

    def _check(self, ids: Ids) -> None:
        # initial: an empty document has no maximum, and the BOS is looked up too.
        largest = int(ids.max(initial=self.bos or 0))
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise CalibrationError(
                f"{self.folder}: its tokenizer gives token {largest}, but the model "
                f"knows {self.vocabulary}. The tokenizer is another model's. (Text: "
                f"{self.source})"
            )

    def _encode(self, batch: list[Document]) -> Iterator[Ids]:
        texts = [document.text for document in batch]
        with tokenizer_errors(
            f"{self.folder}: its tokenizer gives up on {self.source}",
            "Check the patterns in its tokenizer.json.",
        ):
            # Else it warns of texts beyond model_max_length, which are cut later.
            encoded = self.tokenizer(
                texts,
                add_special_tokens=False,
                return_attention_mask=False,
                verbose=False,
            )
        for document, ids in zip(batch, encoded["input_ids"], strict=True):
            end = [self.eos] if document.ends and self.eos is not None else []
            yield np.array(ids + end, dtype=np.int64)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        # At least 1, or empty documents would never fill a batch.
        size += len(document.text) + 1
        if size >= ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _added_bos(tokenizer: Any) -> int | None:
    """The BOS token, if the tokenizer puts it in front of a text by itself."""
    bos: int | None = tokenizer.bos_token_id
    # Tried out: a tokenizer may name a BOS token and not add it.
    first = tokenizer("a")["input_ids"][:1]
    return bos if bos is not None and first == [bos] else None
