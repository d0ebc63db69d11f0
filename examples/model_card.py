"""The model card of a demonstration model, written from its metrics."""

from __future__ import annotations

from typing import Any

CARD = """\
# Demonstration model: {family}

A small Mixture-of-Experts language model, trained from nothing in about {minutes}
minutes of processor time, to show pruning and serving on a model that has something
to lose.
It is a demonstration and not an assistant: it knows the sound of Python, of its
documentation and of licences, and it answers in a chat format. How far it got with
sums is in the second table.

## How it was trained

    python examples/train_demo.py --family {family} --out examples/demo-{family}

{parameters:,} parameters in bf16, {steps} steps, {tokens:,} tokens, seed {seed}.
Trained in fp32 with AdamW on the standard library of Python, on its documentation,
on licence texts and on generated sums and conversations; see `examples/README.md`
for the texts and their licences. Windows of {window} tokens, at the end of 1024. The
text depends a little on the Python release and on the packages that are installed,
so another machine trains a slightly different model.

## What it learnt

Nats per token on the held-out texts in `examples/heldout/`, measured on the saved
bf16 checkpoint in windows of 256 tokens (and of 1024). The unigram entropy is what
a model would reach that knew only how common each token is.

| domain | tokens | unigram entropy | loss | perplexity | loss at 1024 |
| --- | ---: | ---: | ---: | ---: | ---: |
{domains}

Greedy answers to sums that were never seen in training, 400 of each kind; in a chat
the working is part of the answer, and only its last sum is looked at:

| task | exact |
| --- | ---: |
{tasks}

Share of the routed tokens of the calibration text that each expert of a layer
gets; an even share would be {even:.1%}:

| layer | least used | most used |
| --- | ---: | ---: |
{usage}

The same numbers are in `metrics.json`.
"""


def model_card(metrics: dict[str, Any]) -> str:
    """Render the card, so that its numbers are always those that were measured."""
    domains = [
        f"| {name} | {row['tokens']} | {row['unigram_entropy']:.2f} "
        f"| **{row['loss']:.2f}** | {row['perplexity']:.2f} "
        f"| {row['loss_at_1024']:.2f} |"
        for name, row in metrics["domains"].items()
    ]
    tasks = [
        f"| {name} | {share:.1%} |"
        for name, share in metrics["arithmetic_exact_match"].items()
    ]
    usage = [
        f"| {layer} | {min(shares):.1%} | {max(shares):.1%} |"
        for layer, shares in zip(
            metrics["expert_layers"], metrics["expert_usage"], strict=True
        )
    ]
    return CARD.format(
        family=metrics["family"],
        minutes=round(metrics["core_minutes"]),
        parameters=metrics["parameters"],
        steps=metrics["steps"],
        window=metrics["window"],
        tokens=metrics["training_tokens"],
        seed=metrics["seed"],
        domains="\n".join(domains),
        tasks="\n".join(tasks),
        even=1 / len(metrics["expert_usage"][0]),
        usage="\n".join(usage),
    )
