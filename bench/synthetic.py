"""Synthetic Mixtral-shaped checkpoints for the benches: real files, random weights.

python bench/synthetic.py FOLDER [--tokenizer examples/demo-mixtral] [--layers 8]
    [--hidden 1024] [--width 3584] [--experts 8]
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_mixtral(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    width: int,
    experts: int,
    vocab: int = 1024,
    heads: int = 8,
    kv_heads: int = 8,
    head_dim: int | None = None,
    layers_per_shard: float = 1.0,
    seed: int = 0,
) -> Path:
    """A bf16 checkpoint with an index; weights are cheap views of one random block."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(1 << 26, generator=generator).mul_(hidden**-0.5).bfloat16()

    def weight(rows: int, cols: int, salt: int) -> torch.Tensor:
        # Distinct per tensor, without drawing billions of random numbers.
        count, start = rows * cols, salt * 7919 % (1 << 20)
        repeats = -(-(count + start) // len(pool))
        source = pool if repeats == 1 else pool.repeat(repeats)
        return source[start : start + count].reshape(rows, cols).clone()

    head_dim = head_dim or hidden // heads
    weight_map: dict[str, str] = {}
    salt = 0
    per_shard = max(1, round(experts * layers_per_shard))
    current = {
        "model.embed_tokens.weight": weight(vocab, hidden, 1) * hidden**0.5,
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": weight(vocab, hidden, 2),
    }
    files = []
    total = layers * experts
    shards = -(-total // per_shard)

    def flush() -> None:
        name = f"model-{len(files) + 1:05d}-of-{shards:05d}.safetensors"
        save_file(current, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(current, name))
        files.append(name)
        current.clear()

    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        norm = torch.ones(hidden, dtype=torch.bfloat16)
        current[f"{prefix}input_layernorm.weight"] = norm
        current[f"{prefix}post_attention_layernorm.weight"] = norm.clone()
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            salt += 1
            current[f"{prefix}self_attn.{name}_proj.weight"] = weight(
                rows * head_dim, hidden, salt
            )
        current[f"{prefix}self_attn.o_proj.weight"] = weight(
            hidden, heads * head_dim, salt + 5
        )
        moe = f"{prefix}block_sparse_moe."
        router = torch.randn(experts, hidden, generator=generator)
        current[f"{moe}gate.weight"] = router.mul_(hidden**-0.5).bfloat16()
        for expert in range(experts):
            salt += 3
            each = f"{moe}experts.{expert}."
            current[f"{each}w1.weight"] = weight(width, hidden, salt)
            current[f"{each}w2.weight"] = weight(hidden, width, salt + 1)
            current[f"{each}w3.weight"] = weight(width, hidden, salt + 2)
            if (layer * experts + expert + 1) % per_shard == 0:
                flush()
    if current:
        flush()
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return folder


def tensor_bytes(folder: Path) -> int:
    """Bytes of all weight files in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    """Write one that can be served; the defaults take 1.5 GB."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, default="examples/demo-mixtral")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--width", type=int, default=3584)
    parser.add_argument("--experts", type=int, default=8)
    options = vars(parser.parse_args())
    folder, tokenizer = options.pop("folder"), Path(options.pop("tokenizer"))
    write_mixtral(folder, vocab=1536, **options)
    for path in tokenizer.glob("*token*.json"):
        shutil.copy(path, folder)


if __name__ == "__main__":
    main()
