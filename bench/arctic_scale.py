"""STUN's router-only cut at the size of Snowflake Arctic, extrapolated to 35 layers.

    python bench/arctic_scale.py [--experts 128] [--layers 1] [--json FILE]

Writes a synthetic checkpoint with Arctic's exact shapes per layer (7168 x 4864 experts,
a 7168 x 7168 residual MLP, bf16), measures router rows and expert distances, plans 20 %
of the experts away, cuts, and beside it reads the input and copies the output plainly.
A layer of all 128 experts is 27 GB in and 22 GB out, twice: with less than 60 GB free
fewer experts are written, and the table says so. Everything is deleted at the end.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from cut_io import GIB, drop_caches, read_through, sync
from safetensors.torch import save_file
from synthetic import tensor_bytes

HIDDEN, WIDTH, EXPERTS, LAYERS, TOP_K = 7168, 4864, 128, 35, 2
HEADS, KV_HEADS = 56, 8
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 2
# Attention and residual MLP.
DENSE_BYTES = (5 * HIDDEN + 2 * HIDDEN // HEADS * KV_HEADS) * HIDDEN * 2
FREE_BYTES = 60 * 10**9
PUBLISHED = "two hours on one H100 for Arctic at 40 % sparsity (STUN, abstract)"
SHARD_BYTES = 5_000_000_000
RUN = """
import sys, time
from pathlib import Path
from vllm_moe_prune import pipeline
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.recipes.schema import Recipe
recipe = Recipe.model_validate({
    "experts": {"drop": 0.2, "coactivation_weight": 0.0, "reconstruct": "never",
                "budget": "per-layer"},
    "slim": {"method": "none"},
})
checkpoint = open_checkpoint(sys.argv[1])
options = pipeline.RunOptions()
times = [time.monotonic()]
stats = pipeline.measure(checkpoint, recipe, None, options)
times.append(time.monotonic())
plan = pipeline.plan(checkpoint, recipe, stats)
times.append(time.monotonic())
pipeline.cut(checkpoint, plan, Path(sys.argv[2]), options)
times.append(time.monotonic())
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(*(b - a for a, b in zip(times, times[1:])), peak)
"""


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, help="per layer; fewer than 128 is said")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--keep-in", type=Path, help="work in this folder")
    options = parser.parse_args()
    # An interrupted bench must not leave 50 GB behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(dir=options.keep_in) as temporary:
        work = Path(temporary)
        experts = options.experts or affordable(work, options.layers)
        source = write_arctic(work / "in", options.layers, experts)
        figures = measure(source, work)
        figures |= {"experts": experts, "layers": options.layers}
    show(figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def affordable(work: Path, layers: int) -> int:
    """All experts, or as many as input, output and copy leave room for."""
    free = shutil.disk_usage(work).free
    if free >= max(FREE_BYTES, 3 * layers * EXPERTS * EXPERT_BYTES):
        return EXPERTS
    return max(8, int(free * 0.6) // (3 * layers * EXPERT_BYTES) // 8 * 8)


def write_arctic(folder: Path, layers: int, experts: int) -> Path:
    """Real files of random weights, one expert in memory at a time and 5 GB a shard."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 26, generator=generator).mul_(HIDDEN**-0.5).bfloat16()
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    count = 0

    def weight(rows: int, cols: int) -> torch.Tensor:
        # Another stretch of one random block: distinct for every matrix, and cheap.
        nonlocal count
        count += 1
        start = count * 7919 % (len(pool) - rows * cols)
        return pool[start : start + rows * cols].reshape(rows, cols).clone()

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for name in ("input", "post_attention", "residual"):
            shard[f"{at}{name}_layernorm.weight"] = norm.clone()
        keys = HIDDEN // HEADS * KV_HEADS
        for name, rows in (("q", HIDDEN), ("k", keys), ("v", keys), ("o", HIDDEN)):
            shard[f"{at}self_attn.{name}_proj.weight"] = weight(rows, HIDDEN)
        for name in ("w1", "w2", "w3"):
            shard[f"{at}residual_mlp.{name}.weight"] = weight(HIDDEN, HIDDEN)
        router = torch.randn(experts, HIDDEN, generator=generator)
        moe = f"{at}block_sparse_moe."
        shard[f"{moe}gate.weight"] = router.mul_(HIDDEN**-0.5).bfloat16()
        for expert in range(experts):
            for name, shape in (
                ("w1", (WIDTH, HIDDEN)),
                ("w2", (HIDDEN, WIDTH)),
                ("w3", (WIDTH, HIDDEN)),
            ):
                shard[f"{moe}experts.{expert}.{name}.weight"] = weight(*shape)
            if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES // 5:
                flush()
    shard["model.embed_tokens.weight"] = weight(1024, HIDDEN)
    shard["lm_head.weight"] = weight(1024, HIDDEN)
    shard["model.norm.weight"] = norm
    flush()
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, "utf-8")
    config = {
        "architectures": ["ArcticForCausalLM"],
        "model_type": "arctic",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": experts,
        "num_experts_per_tok": TOP_K,
        "moe_layer_frequency": 1,
        "parallel_attn_mlp_res": True,
        "use_residual": True,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    return folder


def measure(source: Path, work: Path) -> dict[str, float]:
    """The run, then reading the input and copying the output, caches cold."""
    out, copy = work / "out", work / "copy"
    drop_caches(source)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(source), str(out)],
        stdout=subprocess.PIPE,
        check=True,
    )
    measure_s, plan_s, cut_s, peak = map(float, done.stdout.split())
    drop_caches(source)
    start = time.monotonic()
    for path in source.glob("*.safetensors"):
        read_through(path)
    read_s = time.monotonic() - start
    input_bytes = tensor_bytes(source)
    # Room for the copy: nothing reads the input again.
    shutil.rmtree(source)
    drop_caches(out)
    copy.mkdir()
    start = time.monotonic()
    for path in out.glob("*.safetensors"):
        shutil.copyfile(path, copy / path.name)
        sync(copy / path.name)
    return {
        "measure_s": measure_s,
        "plan_s": plan_s,
        "cut_s": cut_s,
        "read_s": read_s,
        "copy_s": time.monotonic() - start,
        "input_bytes": input_bytes,
        "output_bytes": tensor_bytes(out),
        "peak_rss_bytes": peak,
    }


def show(figures: dict[str, float]) -> None:
    """Print the table, and what it means for the whole model."""
    experts, layers = int(figures["experts"]), int(figures["layers"])
    size, out = figures["input_bytes"], figures["output_bytes"]
    print(
        f"{layers} layer(s) of Arctic's shapes with {experts} of {EXPERTS} experts: "
        f"{size / GIB:.2f} GiB -> {out / GIB:.2f} GiB"
    )
    rows = (
        ("measure: router rows, expert distances", figures["measure_s"]),
        ("plan", figures["plan_s"]),
        ("cut", figures["cut_s"]),
        ("plain: read all the input", figures["read_s"]),
        ("plain: copy the output", figures["copy_s"]),
    )
    for name, seconds in rows:
        print(f"{name:42} {seconds:8.1f} s")
    plain = figures["read_s"] + figures["copy_s"]
    run = figures["measure_s"] + figures["plan_s"] + figures["cut_s"]
    print(f"{'cut / plain copying':42} {figures['cut_s'] / plain:8.2f}")
    print(f"{'measure + plan + cut / plain copying':42} {run / plain:8.2f}")
    print(f"{'peak RSS':42} {figures['peak_rss_bytes'] / GIB:8.2f} GiB; GPU: none used")
    whole = LAYERS * (EXPERTS * EXPERT_BYTES + DENSE_BYTES)
    factor = whole / size
    print(
        f"extrapolated by bytes to {LAYERS} layers ({whole / GIB:.0f} GiB): "
        f"{run * factor / 3600:.2f} h, of which plain copying "
        f"{plain * factor / 3600:.2f} h. Published: {PUBLISHED}."
    )


if __name__ == "__main__":
    main()
