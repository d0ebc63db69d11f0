"""The one builder of tiny real checkpoints, and of text to calibrate them with.

A model is made from its seed in a canonical form and then spelt in any layout of the
family's table, so the same seed gives the same function under every layout.
"""

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests import families
from vllm_moe_prune.archs import find_arch
from vllm_moe_prune.archs.spec import GatedMlp, Layout, MoeArch

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
SPECIAL = ["<unk>", "<s>", "</s>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] "
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SUBJECTS = "a miller,the old clock,every router,our harbour,the north wind,one expert"
VERBS = "carries,counts,forgets,repairs,answers,measures,follows,keeps,leaves,paints"
OBJECTS = "seven stones,the long letter,a quiet road,both rivers,its own shadow,bread"
ENDS = "before noon,in the rain,without a word,once a year,for the last time,slowly"


def tiny_checkpoint(
    folder: Path,
    *,
    layout: str | None = None,
    model_type: str = "mixtral",
    layers: int = 4,
    experts: int | None = None,
    top_k: int | None = None,
    hidden: int = 64,
    width: int = 96,
    heads: int = 2,
    kv_heads: int = 1,
    vocab: int = 512,
    max_positions: int = 512,
    dtype: str = "bfloat16",
    shards: int = 3,
    seed: int = 0,
    clusters: int | None = None,
    tokenizer: bool = True,
    tied: bool = False,
    sliding_window: int | None = None,
    fp8: tuple[int, int] | None = None,
    **config: Any,
) -> Path:
    """Write a checkpoint folder as the Hub has them, and return it.

    Head size is hidden / heads; 32 is the smallest that vLLM's CPU backend takes.

    Args:
        folder: Made if it is not there.
        layout: A layout name of the family's table; None: as the Hub spells it.
        experts: None: enough for the family's groups.
        clusters: Experts e and e + clusters resemble each other (weights and router
            rows); None: all are independent.
        shards: 1 writes ``model.safetensors`` without an index.
        tied: The embedding is the head; no head is written.
        fp8: Size of the blocks of FP8 matrices; None: everything in ``dtype``.
        config: More keys for config.json, or others instead.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arch = find_arch(model_type, "tiny_checkpoint")
    counts = families.default_counts(model_type)
    experts, top_k = experts or counts[0], top_k or counts[1]
    values = {
        "architectures": [arch.stock_architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "max_position_embeddings": max_positions,
        "model_type": model_type,
        "num_attention_heads": heads,
        "num_experts_per_tok": top_k,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "transformers_version": "4.36.0",
        "use_cache": True,
        "vocab_size": vocab,
    }
    values |= families.family_fields(
        model_type, experts, width, heads, sliding_window, layers
    )
    if sliding_window is not None:
        values["sliding_window"] = sliding_window
    for key in families.UNSAID.get(model_type, ()):
        del values[key]
    values |= config
    if fp8:
        values["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(fp8),
            **families.fp8_fields(model_type, layers),
        }
    _write_json(folder / "config.json", values)
    _write_json(
        folder / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2},
    )
    layout = layout or families.LAYOUTS[model_type]
    found = next(item for item in arch.layouts if item.name == layout)
    draw = _Draw(seed, DTYPES[dtype], clusters)
    tensors = dict(_tensors(arch, found, values, draw, tied))
    if fp8:
        tensors = dict(_in_blocks(tensors, fp8))
    _write_shards(folder, tensors, shards)
    if tokenizer:
        write_tokenizer(folder, vocab)
    return folder


class _Draw:
    """Random tensors, each from a generator of its own, named by what it is for."""

    def __init__(self, seed: int, dtype: torch.dtype, clusters: int | None) -> None:
        self.seed, self.dtype, self.clusters = seed, dtype, clusters

    def normal(self, key: str, shape: tuple[int, ...], scale: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(
            random.Random(f"{self.seed} {key}").getrandbits(63)
        )
        return torch.randn(shape, generator=generator) * scale

    def expert(
        self, key: str, expert: int, shape: tuple[int, ...], scale: float
    ) -> torch.Tensor:
        if self.clusters is None:
            return self.normal(f"{key} {expert}", shape, scale)
        shared = self.normal(f"{key} shared {expert % self.clusters}", shape, scale)
        return shared + self.normal(f"{key} {expert}", shape, 0.2 * scale)


def _tensors(
    arch: MoeArch, layout: Layout, config: dict[str, Any], draw: _Draw, tied: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    further = config.get(arch.config.mtp_layers or "", 0)

    def norm(key: str, size: int = hidden) -> torch.Tensor:
        return (1 + draw.normal(key, (size,), 0.1)).to(draw.dtype)

    yield arch.embedding, draw.normal("embed", (vocab, hidden), 0.7).to(draw.dtype)
    count = config["num_hidden_layers"]
    for index in range(count + further):
        prefix = arch.layer_prefix.format(layer=index)
        matrices, vectors = families.attention(config)
        for name, shape in matrices:
            wide = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
            scale = wide * shape[1] ** -0.5
            yield prefix + name, draw.normal(prefix + name, shape, scale).to(draw.dtype)
        for name, size in vectors:
            if name.endswith("norm.weight"):
                yield prefix + name, norm(prefix + name, size)
            else:
                bias = draw.normal(prefix + name, (size,), 0.5)
                yield prefix + name, bias.to(draw.dtype)
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield prefix + name, norm(prefix + name)
        if index >= count or arch.pattern.has_moe(config, index):
            yield from _moe_tensors(arch, layout, index, config, draw)
            if arch.shared and arch.shared_key.read(config):
                width = arch.shared_key.read(config)
                width *= 1 if arch.shared_width else config[arch.config.width]
                yield from _mlp(arch.shared, prefix, width, hidden, draw)
            if arch.residual and arch.residual.present.read(config):
                yield from _mlp(arch.residual.mlp, prefix, hidden, hidden, draw)
                name = f"{prefix}{arch.residual.norm}.weight"
                yield name, norm(name)
        elif arch.dense_mlp:
            width = config["intermediate_size"]
            yield from _mlp(arch.dense_mlp, prefix, width, hidden, draw)
        if index >= count:
            for name, shape in families.mtp_matrices(config, index):
                drawn = draw.normal(name, shape, shape[1] ** -0.5)
                yield name, drawn.to(draw.dtype)
            for name in families.MTP_NORMS:
                yield prefix + name, norm(prefix + name)
    yield arch.final_norm, norm("final norm")
    if not tied:
        head = draw.normal("head", (vocab, hidden), 2.5 * hidden**-0.5)
        yield arch.head, head.to(draw.dtype)


def _mlp(
    mlp: GatedMlp, prefix: str, width: int, hidden: int, draw: _Draw
) -> Iterator[tuple[str, torch.Tensor]]:
    gate, up, down = mlp.names
    for name, shape in (
        (gate, (width, hidden)),
        (up, (width, hidden)),
        (down, (hidden, width)),
    ):
        drawn = draw.normal(prefix + name, shape, 1.5 * shape[1] ** -0.5)
        yield prefix + name, drawn.to(draw.dtype)
    if mlp.weigher:
        drawn = draw.normal(prefix + mlp.weigher, (1, hidden), 2 * hidden**-0.5)
        yield prefix + mlp.weigher, drawn.to(draw.dtype)


def _moe_tensors(
    arch: MoeArch, layout: Layout, index: int, config: dict[str, Any], draw: _Draw
) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, width = config["hidden_size"], config[arch.config.width]
    experts = range(config[arch.config.experts_in_files or arch.config.experts])
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}

    def matrix(role: str, expert: int) -> torch.Tensor:
        if role == "gate_up":
            return torch.cat([matrix("gate", expert), matrix("up", expert)])
        shape = shapes[role]
        key = f"layer {index} {role}"
        return draw.expert(key, expert, shape, 1.5 * shape[1] ** -0.5).to(draw.dtype)

    # Normed inputs have unit size, so logits spread by about 2: experts do differ.
    rows = [
        draw.expert(f"layer {index} router", expert, (hidden,), 2 * hidden**-0.5)
        for expert in experts
    ]
    yield layout.router.name(index), torch.stack(rows).to(draw.dtype)
    if bias := layout.rule("router_bias"):
        # As published: fp32, and large enough to change which experts are chosen.
        yield bias.name(index), draw.normal(f"layer {index} bias", (len(experts),), 0.2)
    for rule in layout.experts:
        if rule.per_expert:
            for expert in experts:
                yield rule.name(index, expert), matrix(rule.role, expert)
        else:
            packed = torch.stack([matrix(rule.role, expert) for expert in experts])
            yield rule.name(index), packed


def _in_blocks(
    tensors: dict[str, torch.Tensor], block: tuple[int, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every linear layer but the router as e4m3 with one fp32 scale per block."""
    rows, cols = block
    for name, tensor in tensors.items():
        linear = "proj" in name or ".w1." in name or ".w2." in name or ".w3." in name
        if tensor.dim() != 2 or not linear or "eh_proj" in name:
            yield name, tensor
            continue
        height, width = tensor.shape
        padded = torch.nn.functional.pad(
            tensor.float(), (0, -width % cols, 0, -height % rows)
        )
        tiles = padded.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
        scale = tiles.abs().amax(dim=(1, 3)) / 448
        spread = scale.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
        weight = (padded / spread)[:height, :width]
        yield name, weight.to(torch.float8_e4m3fn).contiguous()
        yield name + "_scale_inv", scale


def _write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    total, done = sum(sizes.values()), 0
    weight_map = {}
    for name in tensors:
        number = done * shards // total + 1
        weight_map[name] = f"model-{number:05d}-of-{shards:05d}.safetensors"
        done += sizes[name]
    for file_name in sorted(set(weight_map.values())):
        part = {
            name: tensors[name] for name, at in weight_map.items() if at == file_name
        }
        save_file(part, folder / file_name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(folder: Path, vocab: int = 512) -> None:
    """A byte-level BPE tokenizer that puts ``<s>`` in front, with a chat template."""
    (folder / "tokenizer.json").write_text(_trained_tokenizer(vocab))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 30,
            "chat_template": CHAT_TEMPLATE,
        },
    )


@functools.cache
def _trained_tokenizer(vocab: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sentences(4000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return str(tokenizer.to_str())


def tiny_text(folder: Path, characters: int = 120_000, seed: int = 0) -> Path:
    """Write ``text.txt``, for calibration; about 4 characters make a token."""
    path = folder / "text.txt"
    path.write_text(sentences(characters, seed), encoding="utf-8")
    return path


def sentences(characters: int, seed: int = 0) -> str:
    """Plain sentences, the same for the same seed."""
    choose = random.Random(seed).choice
    parts = [words.split(",") for words in (SUBJECTS, VERBS, OBJECTS, ENDS)]
    lines: list[str] = []
    size = 0
    while size < characters:
        line = " ".join(choose(words) for words in parts).capitalize() + "."
        lines.append(line)
        size += len(line) + 1
    return "\n".join(lines)[:characters]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
