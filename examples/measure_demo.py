"""What a demonstration model has learnt, measured on the checkpoint as saved."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import corpus
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer

Tokens = np.ndarray[Any, np.dtype[np.uint16]]


class Routed(NamedTuple):
    """What one router said about every token: logits, and the experts it chose."""

    logits_NE: torch.Tensor
    ids_NK: torch.Tensor


@contextmanager
def routing(model: nn.Module) -> Iterator[list[Routed]]:
    """Collect what the routers say: in every family (logits, weights, chosen)."""
    seen: list[Routed] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(Routed(output[0], output[2]))

    routers = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def expert_shares(routed: Routed) -> torch.Tensor:
    """The fraction of the choices that went to each expert."""
    chosen = routed.ids_NK.flatten()
    return torch.bincount(chosen, minlength=routed.logits_NE.shape[-1]) / chosen.numel()


def unigram_entropy(ids: Tokens) -> float:
    """Nats per token that knowing only how common each token is would cost."""
    counts = np.bincount(ids)
    shares = counts[counts > 0] / len(ids)
    return float(-(shares * np.log(shares)).sum())


@torch.inference_mode()
def text_loss(model: Any, ids: Tokens, window: int) -> float:
    """Mean loss over windows that do not overlap, each opened by the BOS token."""
    step = window - 1
    whole = len(ids) // step * step
    tokens = torch.from_numpy(ids.astype(np.int64))
    pieces = [
        *tokens[:whole].view(-1, step).split(8192 // window),
        tokens[None, whole:],
    ]
    total = 0.0
    for piece in pieces:
        piece = functional.pad(piece, (1, 0), value=model.config.bos_token_id)
        logits = model(input_ids=piece[:, :-1], use_cache=False).logits.float()
        loss = functional.cross_entropy(
            logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="sum"
        )
        total += loss.item()
    return total / len(ids)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, prompts: list[str], length: int) -> list[str]:
    """Greedy continuations of prompts that are padded on the left."""
    inputs = tokenizer(
        prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_token_type_ids=False,
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=length)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in new]


def exact_match(model: Any, tokenizer: Any) -> dict[str, float]:
    """How often held-out sums are right, as plain text and as a question."""
    pairs = corpus.sums()["heldout"]
    random.Random(0).shuffle(pairs)
    pairs = pairs[:400]
    ordered = [(max(pair), min(pair)) for pair in pairs]

    def asked(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        )

    tasks = {
        "addition": [(f"{corpus.BOS}{a} + {b} =", f"{a + b}") for a, b in pairs],
        "subtraction": [(f"{corpus.BOS}{a} - {b} =", f"{a - b}") for a, b in ordered],
        "chat addition": [
            (asked(f"What is {a} + {b}?"), f"{a} + {b} = {a + b}.") for a, b in pairs
        ],
        "chat subtraction": [
            (asked(f"What is {a} - {b}?"), f"{a} - {b} = {a - b}.") for a, b in ordered
        ],
    }
    result = {}
    for name, task in tasks.items():
        answers = answer(model, tokenizer, [prompt for prompt, _ in task], 48)
        # In a conversation the working comes first: "7 + 5 = 12, 1 + 2 + 1 = 4: ...".
        right = [
            got.strip().split("\n")[0].split(": ")[-1] == want
            for got, (_, want) in zip(answers, task, strict=True)
        ]
        result[name] = sum(right) / len(right)
    return result


def evaluate(model: Any, out: Path, texts: Path) -> dict[str, Any]:
    """Measure a model as it was saved, in the precision in which it will be served."""
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    domains = {}
    for domain in corpus.DOMAINS:
        text = (texts / "heldout" / f"{domain}.txt").read_text(encoding="utf-8")
        ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.uint16)
        loss = text_loss(model, ids, 256)
        domains[domain] = {
            "tokens": len(ids),
            "loss": round(loss, 4),
            "perplexity": round(math.exp(loss), 2),
            "loss_at_1024": round(text_loss(model, ids, 1024), 4),
            "unigram_entropy": round(unigram_entropy(ids), 4),
        }
    mixture = (texts / "calibration.txt").read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(mixture, add_special_tokens=False), np.uint16)
    usage = []
    with torch.inference_mode(), routing(model) as routed:
        rows = torch.from_numpy(ids[: len(ids) // 256 * 256].astype(np.int64))
        for piece in rows.view(-1, 256).split(64):
            model(input_ids=piece, use_cache=False)
    gates = [name for name, _ in model.named_modules() if name.endswith("mlp.gate")]
    for number in range(len(gates)):
        parts = zip(*routed[number :: len(gates)], strict=True)
        shares = expert_shares(Routed(*map(torch.cat, map(list, parts))))
        usage.append([round(share, 4) for share in shares.tolist()])
    return {
        "domains": domains,
        "arithmetic_exact_match": exact_match(model, tokenizer),
        "expert_layers": [int(name.split(".")[2]) for name in gates],
        "expert_usage": usage,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
