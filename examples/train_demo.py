"""Train a small Mixture-of-Experts language model on two processor cores.

The demonstration model is meant to be real: random weights would let a pruned
model look as good as the original. It learns Python, prose, licences, sums and
a chat format in minutes, so its experts do differ and losing them does cost.

    python examples/train_demo.py --family mixtral --out examples/demo-mixtral
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import shipped_texts
import torch
from demo_families import FAMILIES, RECIPES, Recipe
from measure_demo import Routed, evaluate, expert_shares, routing
from model_card import model_card
from torch import nn
from torch.nn import functional
from training_text import (
    SPECIAL_IDS,
    Stream,
    batch,
    token_streams,
    train_tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).resolve().parent


def router_loss(routed: list[Routed], scores: str, recipe: Recipe) -> torch.Tensor:
    """Load balance and size of the logits, layer by layer.

    The loss that transformers offers is taken over all layers at once, which
    lets an expert die in one layer as long as its number is busy in another.
    """
    total = torch.zeros(())
    for layer in routed:
        logits = layer.logits_NE
        if scores == "sigmoid":
            share = functional.normalize(logits.sigmoid(), p=1, dim=-1)
        else:
            share = logits.softmax(dim=-1)
            total = total + recipe.z_loss * logits.logsumexp(dim=-1).square().mean()
        balance = (expert_shares(layer) * share.mean(dim=0)).sum()
        total = total + recipe.balance * logits.shape[-1] * balance
    return total


@torch.no_grad()
def balance_biases(model: Any, routed: list[Routed], recipe: Recipe) -> None:
    """Raise the bias of experts with less than an even share, lower the others'."""
    gates = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    for gate, layer in zip(gates, routed, strict=True):
        if hasattr(gate, "e_score_correction_bias"):
            shares = expert_shares(layer)
            gate.e_score_correction_bias += recipe.bias_step * torch.sign(
                shares.mean() - shares
            )


def train(
    model: Any, streams: dict[str, Stream], recipe: Recipe, threads: int, resume: Path
) -> float:
    """Train in place and return the minutes of processor time that it took.

    ``resume`` is written every 50 steps, and continued from where it is found.
    """
    torch.set_num_threads(threads)
    generator = np.random.default_rng(recipe.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.1,
        fused=True,
    )
    scores = getattr(model.config, "scoring_func", "softmax")
    started, spent_before = time.monotonic(), 0.0
    began = time.process_time()
    average, first = torch.zeros(2), 0
    if resume.is_file():
        saved = torch.load(resume, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.bit_generator.state = json.loads(saved["generator"])
        first, average = saved["step"], saved["average"]
        spent_before = saved["seconds"]
    model.train()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        window = recipe.window_at(step)
        rows = recipe.batch_tokens // window
        ids, results = batch(streams, recipe.mixture, rows, window, generator)
        with routing(model) as routed:
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        of_result = results[:, 1:].flatten()
        weights = 1 + (recipe.result_weight - 1) * of_result
        loss = (losses * weights).sum() / weights.sum()
        (loss + router_loss(routed, scores, recipe)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        balance_biases(model, routed, recipe)
        of_results = (losses * of_result).sum() / of_result.sum().clamp(min=1)
        seen = torch.stack((losses.mean(), of_results)).detach()
        average += (seen - average) * (0.02 if step else 1.0)
        if step % 20 == 0 or step + 1 == recipe.steps:
            spent = time.monotonic() - started
            sys.stderr.write(
                f"\rstep {step + 1}/{recipe.steps}  loss {average[0]:.3f}"
                f"  of results {average[1]:.3f}  {spent:.0f} s "
            )
        if (step + 1) % 50 == 0:
            saved = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": json.dumps(generator.bit_generator.state),
                "step": step + 1,
                "average": average,
                "seconds": spent_before + time.process_time() - began,
            }
            torch.save(saved, resume.with_suffix(".tmp"))
            resume.with_suffix(".tmp").replace(resume)
    sys.stderr.write("\n")
    return (spent_before + time.process_time() - began) / 60


def save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a checkpoint as it would come from the Hub: bf16 and sharded."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16)
    model.config.use_cache = True
    model.generation_config = GenerationConfig(**SPECIAL_IDS)
    model.save_pretrained(out, max_shard_size="4MB")
    tokenizer.save_pretrained(out)
    # The name that every release of transformers knows for this kind of file.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for how in ("is_local", "local_files_only"):  # how a shared one was loaded
        settings.pop(how, None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load(out: Path) -> Any:
    """The model as it was saved."""
    model: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    model.set_experts_implementation("grouped_mm")
    return model


def main() -> None:
    """Build the text, train, save, measure, and write the model card."""
    parser = argparse.ArgumentParser(description="Train a demonstration model.")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="mixtral")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="instead of the family's own number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=HERE / "demo-mixtral",
        help="taken from there if it is there, so that all families share one",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        default=HERE,
        help="where the held-out and calibration texts are; made there if absent",
    )
    options = parser.parse_args()
    recipe = RECIPES.get(options.family, Recipe())
    recipe = replace(recipe, seed=options.seed, steps=options.steps or recipe.steps)
    torch.manual_seed(recipe.seed)

    documents = corpus.build(seed=0)
    if not (options.texts / "calibration.txt").exists():
        shipped_texts.write_texts(documents, options.texts, seed=0)
    if (options.tokenizer / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    else:
        tokenizer = train_tokenizer(d.text for d in documents if d.split == "train")
    streams = token_streams(tokenizer, documents)

    model: Any = AutoModelForCausalLM.from_config(FAMILIES[options.family]())
    model.set_experts_implementation("grouped_mm")  # the loop is half as fast
    resume = options.out.with_name(options.out.name + ".train")
    minutes = train(model, streams, recipe, options.threads, resume)
    save(model, tokenizer, options.out)
    resume.unlink()

    metrics = {
        "family": options.family,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "window": recipe.window,
        "training_tokens": recipe.steps * recipe.batch_tokens,
        "core_minutes": round(minutes, 1),
        **evaluate(load(options.out), options.out, options.texts),
    }
    path = options.out / "metrics.json"
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    card = model_card(metrics)
    (options.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
