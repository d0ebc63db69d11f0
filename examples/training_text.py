"""From documents to batches: the tokenizer, the streams of tokens, windows of them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import corpus
import numpy as np
import torch
from measure_demo import Tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

Rows = np.ndarray[Any, np.dtype[np.int64]]
Marks = np.ndarray[Any, np.dtype[np.bool_]]

VOCABULARY = 1536
BOS, EOS, PAD = corpus.BOS, corpus.EOS, "<pad>"
SPECIAL = [BOS, EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>"]
#: As configurations name them.
SPECIAL_IDS = {
    f"{name}_token_id": SPECIAL.index(token)
    for name, token in {"bos": BOS, "eos": EOS, "pad": PAD}.items()
}
#: The result of a sum in a list of them; the whole answer to one in a conversation.
RESULT = re.compile(r"(?:= |\bis )(\d+[.\n]?)|<\|assistant\|>(\d[^<]*</s>)")


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which each digit is a token, so that sums can be learnt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, SPECIAL.index(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=SPECIAL[3:],
        chat_template=corpus.CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


class Stream(NamedTuple):
    """The tokens of one domain, and which of them are a digit of a sum's result."""

    ids: Tokens
    results: Marks


def token_streams(
    tokenizer: PreTrainedTokenizerFast, documents: list[corpus.Document]
) -> dict[str, Stream]:
    """The training documents of each domain, shuffled, as one run of tokens."""
    streams = {}
    for domain in corpus.DOMAINS:
        texts = [d.text for d in documents if (d.domain, d.split) == (domain, "train")]
        random.Random(domain).shuffle(texts)
        if domain != "chat":  # conversations bring their own marks
            texts = [f"{BOS}{text}{EOS}" for text in texts]
        encoded = tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True
        )
        ids = [np.array(e, np.uint16) for e in encoded["input_ids"]]
        marked = [np.zeros(len(e), np.bool_) for e in ids]
        if domain in ("arithmetic", "chat"):
            offsets = encoded["offset_mapping"]
            marked = list(map(of_results, texts, offsets))
        streams[domain] = Stream(np.concatenate(ids), np.concatenate(marked))
    return streams


def of_results(text: str, offsets: list[tuple[int, int]]) -> Marks:
    """Which tokens lie in a result."""
    inside = np.zeros(len(text) + 1, np.bool_)
    for match in RESULT.finditer(text):
        start, end = match.span(match.lastindex)
        inside[start:end] = True
    return inside[np.array([start for start, _ in offsets])]


def batch(
    streams: dict[str, Stream],
    mixture: dict[str, float],
    rows: int,
    window: int,
    generator: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows, each opened by the token that opens every prompt later.

    Returns ids of shape (rows, window + 1), and which of them belong to results.
    """
    domains = generator.choice(list(mixture), size=rows, p=list(mixture.values()))
    shape = (rows, window + 1)
    ids: Rows = np.full(shape, SPECIAL.index(BOS), np.int64)
    results = np.zeros(shape, np.bool_)
    for row, domain in enumerate(domains):
        stream = streams[domain]
        start = generator.integers(len(stream.ids) - window)
        ids[row, 1:] = stream.ids[start : start + window]
        results[row, 1:] = stream.results[start : start + window]
    return torch.from_numpy(ids), torch.from_numpy(results)
