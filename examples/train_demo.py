"""Train a small Mixture-of-Experts language model on two processor cores.

The demonstration model is meant to be real: random weights would let a pruned
model look as good as the original. It learns Python, prose, licences, sums and
a chat format in minutes, so its experts do differ and losing them does cost.

    python examples/train_demo.py --family mixtral --out examples/demo-mixtral
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import shipped_texts
import torch
from arctic_model import ArcticConfig
from measure_demo import Routed, Tokens, evaluate, expert_shares, routing
from model_card import model_card
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GenerationConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

Rows = np.ndarray[Any, np.dtype[np.int64]]

VOCABULARY = 1536
BOS, EOS, PAD = corpus.BOS, corpus.EOS, "<pad>"
SPECIAL = [BOS, EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>"]
HERE = Path(__file__).resolve().parent


MIXTRAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "router_aux_loss_coef": 0.01,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": SPECIAL.index(BOS),
    "eos_token_id": SPECIAL.index(EOS),
    "pad_token_id": SPECIAL.index(PAD),
}


def mixtral() -> PreTrainedConfig:
    """Sixteen experts of which two are used, in four layers.

    Head size 32 is the smallest that vLLM's processor backend takes; two key
    heads and widths of 128 leave room for two tensor-parallel ranks and for
    block-wise quantization.
    """
    return MixtralConfig(**MIXTRAL)


def arctic() -> PreTrainedConfig:
    """Mixtral's sizes, with Arctic's residual MLP beside the experts."""
    return ArcticConfig(**MIXTRAL)


#: The same in every DeepSeek: a dense layer, then layers of 24 experts in 4 groups,
#: of which the best 2 are chosen from, and an expert that every token uses. The latent
#: sizes of MLA are the published ones, as vLLM's processor backend knows no others.
DEEPSEEK: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "n_routed_experts": 24,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": SPECIAL.index(BOS),
    "eos_token_id": SPECIAL.index(EOS),
    "pad_token_id": SPECIAL.index(PAD),
}


def deepseek_v2() -> PreTrainedConfig:
    """Softmax scores; a group is as good as its best expert."""
    return DeepseekV2Config(
        **DEEPSEEK,
        topk_method="group_limited_greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=4.0,
    )


def deepseek_v3() -> PreTrainedConfig:
    """Sigmoid scores with a bias that balances the load; latent queries too."""
    return DeepseekV3Config(
        **{**DEEPSEEK, "q_lora_rank": 64},
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=0,
    )


#: A family is added here, with one function that makes its configuration.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": mixtral,
    "arctic": arctic,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
}


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train."""

    seed: int = 1
    steps: int = 700
    batch_tokens: int = 4096
    window: int = 256
    long_window: int = 1024
    long_share: float = 0.15
    learning_rate: float = 4e-3
    warmup: int = 100
    balance: float = 0.01
    z_loss: float = 1e-4
    bias_step: float = 2e-3

    def window_at(self, step: int) -> int:
        """Short windows first, as they are cheap; long ones for the last part."""
        late = step >= self.steps * (1 - self.long_share)
        return self.long_window if late else self.window

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.495 * (1 + math.cos(math.pi * done)))


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


def token_streams(
    tokenizer: PreTrainedTokenizerFast, documents: list[corpus.Document]
) -> dict[str, Tokens]:
    """The training documents of each domain, shuffled, as one run of tokens."""
    streams = {}
    for domain in corpus.DOMAINS:
        texts = [d.text for d in documents if (d.domain, d.split) == (domain, "train")]
        random.Random(domain).shuffle(texts)
        if domain != "chat":  # conversations bring their own marks
            texts = [f"{BOS}{text}{EOS}" for text in texts]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        streams[domain] = np.concatenate([np.array(e, np.uint16) for e in encoded])
    return streams


def batch(
    streams: dict[str, Tokens], rows: int, window: int, generator: np.random.Generator
) -> torch.Tensor:
    """Random windows, each opened by the token that opens every prompt later."""
    domains = generator.choice(
        list(corpus.MIXTURE), size=rows, p=list(corpus.MIXTURE.values())
    )
    shape = (rows, window + 1)
    result: Rows = np.full(shape, SPECIAL.index(BOS), np.int64)
    for row, domain in enumerate(domains):
        start = generator.integers(len(streams[domain]) - window)
        result[row, 1:] = streams[domain][start : start + window]
    return torch.from_numpy(result)


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
    model: Any, streams: dict[str, Tokens], recipe: Recipe, threads: int, resume: Path
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
    average, first = 0.0, 0
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
        ids = batch(streams, recipe.batch_tokens // window, window, generator)
        with routing(model) as routed:
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + router_loss(routed, scores, recipe)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        balance_biases(model, routed, recipe)
        average += (loss.item() - average) * (0.02 if step else 1.0)
        if step % 20 == 0 or step + 1 == recipe.steps:
            spent = time.monotonic() - started
            sys.stderr.write(
                f"\rstep {step + 1}/{recipe.steps}  loss {average:.3f}  {spent:.0f} s "
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
    model.generation_config = GenerationConfig(
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
    )
    model.save_pretrained(out, max_shard_size="4MB")
    tokenizer.save_pretrained(out)
    # The name that every release of transformers knows for this kind of file.
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
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
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--texts",
        type=Path,
        default=HERE,
        help="where the held-out and calibration texts are; made there if absent",
    )
    options = parser.parse_args()
    recipe = Recipe(seed=options.seed, steps=options.steps)
    torch.manual_seed(recipe.seed)

    documents = corpus.build(seed=0)
    if not (options.texts / "calibration.txt").exists():
        shipped_texts.write_texts(documents, options.texts, seed=0)
    train_only = (d.text for d in documents if d.split == "train")
    tokenizer = train_tokenizer(train_only)
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
