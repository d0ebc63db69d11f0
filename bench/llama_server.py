"""The same random Mixtral through `vllm serve` with this package and under llama.cpp.

    pip install --target PEERS llama-cpp-python gguf diskcache
    PYTHONPATH=PEERS python bench/llama_server.py --keep-in FOLDER [--quick]
        [--json FILE] [--rows int4 int4-quarter-gone Q4_0] [--concurrency 1 4 16]

Two layers of Mixtral-8x7B's width (4096 x 14336, 8 experts, top-2; 5.9 GB in bf16) in
4 bits and groups of 32, which both sides read from the same dense weights: by this
package everything but router and embedding in int4, once with all and once with six of
eight experts, in llama.cpp everything but router and norms in Q4_0. One after the
other: 64 tokens of prompt, 32 new ones, 1, 4 and 16 streams at a time; medians over
``--rounds``. llama.cpp's own server is not in llama-cpp-python, and the one that is
there answers one request at a time. So its library is driven here as llama-server
does it, a sequence for each stream and one `llama_decode` a step for all of them, but
without HTTP: its figures are a little better than a server's. What is built stays in
the folder for the next run.
"""

import argparse
import ctypes
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import serve_decode
from serve_decode import NEW, PROMPT
from server import VLLM
from synthetic import write_mixtral

from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_tensor
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.predict import model_facts, with_prediction
from vllm_moe_prune.decide.build_plan import make_plan
from vllm_moe_prune.judge.server import free_port, resident, running
from vllm_moe_prune.plugin.launch import serve_command
from vllm_moe_prune.plugin.machine import settings
from vllm_moe_prune.recipes.schema import parse_recipe

SCOPE = ["experts", "attention", "head"]
ROWS = ("int4", "int4-quarter-gone", "Q4_0")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
"""Ours and llama.cpp's."""
VLLM_FLAGS = ("--max-model-len", "256", "--skip-tokenizer-init", "--max-num-seqs", "16")


def main() -> None:
    """Build what is missing, run each side, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep-in", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:  # a process of its own: what it holds can be measured
        print(json.dumps(run_llama(options.peer, options.concurrency, options.rounds)))
        return
    sizes = (1024, 3584) if options.quick else (4096, 14336)
    models = build(options.keep_in / f"mixtral-{sizes[0]}", *sizes)
    found = {}
    for row in options.rows:
        if row == "Q4_0":
            found[row] = peer(models[row], options.concurrency, options.rounds)
        else:
            found[row] = ours(models[row], options.concurrency, options.rounds)
        print(json.dumps({row: found[row]}), flush=True)
    show(found, options.concurrency)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def build(folder: Path, hidden: int, width: int) -> dict[str, Path]:
    """The dense model and what each side reads; made once."""
    dense = folder / "dense"
    if not (dense / "config.json").is_file():
        write_mixtral(
            *(dense,),
            **{"layers": 2, "hidden": hidden, "width": width, "experts": 8},
            **{"heads": hidden // 128, "kv_heads": 8, "layers_per_shard": 0.5},
        )
    source = open_checkpoint(dense)
    made = {name: folder / name for name in ROWS}
    for name in ROWS[:2]:
        if made[name].is_dir():
            continue
        stage = {"method": "rtn", "group_size": 32, "scope": SCOPE}
        experts = {"method": "none"}
        if name != "int4":
            experts = {"method": "score", "criterion": "random", "drop": 0.25}
        recipe = {"quantize": stage, "experts": experts, "slim": {"method": "none"}}
        plan = make_plan(
            None, parse_recipe(recipe, name), model_facts(source), tool_version="bench"
        )
        execute_plan(source, with_prediction(source, plan), made[name])
    if not made["Q4_0"].is_file():
        write_gguf(source, made["Q4_0"])
    return made


def write_gguf(source: Checkpoint, path: Path) -> None:
    """The dense weights in Q4_0, rows of queries and keys as llama.cpp rotates them."""
    import gguf

    kind, plain = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F32
    config = source.config
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    vocab = config["vocab_size"]
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_block_count(config["num_hidden_layers"])
    out.add_context_length(4096)
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_rope_dimension_count(config["head_dim"])
    out.add_rope_freq_base(config["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_expert_count(8)
    out.add_expert_used_count(2)
    out.add_vocab_size(vocab)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{at:02X}>" for at in range(256))]
    words += [f"word{at}" for at in range(len(words), vocab)]
    out.add_tokenizer_model("llama")
    out.add_token_list(words)
    out.add_token_scores([0.0] * vocab)
    out.add_token_types([2, 3, 3, *[6] * 256, *[1] * (vocab - 259)])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)

    def read(name: str) -> np.ndarray:
        return read_tensor(source.tensors[f"{name}.weight"]).float().numpy()

    def add(name: str, values: np.ndarray, *, exact: bool = False) -> None:
        as_type = plain if exact else kind
        stored = values if exact else gguf.quants.quantize(values, as_type)
        out.add_tensor(f"{name}.weight", stored, raw_dtype=as_type)

    add("token_embd", read("model.embed_tokens"))
    add("output", read("lm_head"))
    add("output_norm", read("model.norm"), exact=True)
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{layer}.", f"blk.{layer}."
        add(f"{theirs}attn_norm", read(f"{ours}input_layernorm"), exact=True)
        add(f"{theirs}ffn_norm", read(f"{ours}post_attention_layernorm"), exact=True)
        for name, other in NAMES.items():
            values = read(ours + name)
            if other in ("attn_q", "attn_k"):
                count = heads if other == "attn_q" else kv_heads
                halves = values.reshape(count, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
            add(theirs + other, values)
        moe = f"{ours}block_sparse_moe."
        add(f"{theirs}ffn_gate_inp", read(f"{moe}gate"), exact=True)
        for name, other in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            experts = [
                gguf.quants.quantize(read(f"{moe}experts.{expert}.{name}"), kind)
                for expert in range(8)
            ]
            at = f"{theirs}ffn_{other}_exps.weight"
            out.add_tensor(at, np.stack(experts), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def ours(folder: Path, concurrency: list[int], rounds: int) -> dict[str, object]:
    """Through the server, started as `vllm-moe-prune serve` starts it."""
    import asyncio

    port = free_port()
    variables, said = settings(VLLM_FLAGS)
    flags = (*VLLM_FLAGS, "--port", str(port))
    command = serve_command(str(folder), extra=flags, environment=variables)
    started = time.monotonic()
    with running(command, port, None, **VLLM) as (url, server):
        found: dict[str, object] = {"start_s": round(time.monotonic() - started, 1)}
        found["threads"] = said
        asyncio.run(serve_decode.load(url, folder, max(concurrency)))  # warms up
        for parallel in concurrency:
            each = [
                asyncio.run(serve_decode.load(url, folder, parallel))
                for _ in range(rounds)
            ]
            found[str(parallel)] = medians(each)
        found["resident_gb"] = round(resident(server.pid) / 1e9, 2)
    return found


def peer(path: Path, concurrency: list[int], rounds: int) -> dict[str, object]:
    """llama.cpp in a process of its own."""
    words = [sys.executable, __file__, "--keep-in", ".", "--peer", str(path)]
    words += ["--rounds", str(rounds), "--concurrency", *map(str, concurrency)]
    ran = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, object] = json.loads(ran.stdout.splitlines()[-1])
    return found


def run_llama(path: Path, concurrency: list[int], rounds: int) -> dict[str, object]:
    """Streams as sequences of one context, all decoded together in every step."""
    import llama_cpp as llama

    started = time.monotonic()
    # Kept: the library calls it as long as it lives.
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model_params = llama.llama_model_default_params()
    model = llama.llama_model_load_from_file(str(path).encode(), model_params)
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 16 * 256, 2048, 512
    params.n_seq_max, params.n_threads, params.n_threads_batch = 16, 2, 2
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(2048, 0, 1)
    memory = llama.llama_get_memory(context)

    def decode(tokens: Iterable[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = 0
        for at, (token, place, stream, wanted) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.logits[at] = token, place, wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, stream
            batch.n_tokens = at + 1
        if llama.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")

    def likeliest(at: int) -> int:
        vocab = 1024
        logits = llama.llama_get_logits_ith(context, at)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * vocab))
        return int(np.frombuffer(pointer.contents, np.float32).argmax())

    def once(parallel: int) -> dict[str, float]:
        llama.llama_memory_clear(memory, True)
        start = time.monotonic()
        prompts = [
            [random.Random(seed).randrange(3, 1000) for _ in range(PROMPT)]
            for seed in range(parallel)
        ]
        decode(
            (token, place, stream, place == PROMPT - 1)
            for stream, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        )
        last = [likeliest((stream + 1) * PROMPT - 1) for stream in range(parallel)]
        first = time.monotonic() - start
        for step in range(NEW - 1):
            decode((last[n], PROMPT + step, n, True) for n in range(parallel))
            last = [likeliest(stream) for stream in range(parallel)]
        rate = parallel * (NEW - 1) / (time.monotonic() - start - first)
        total = parallel * NEW / (time.monotonic() - start)
        return {"ttft_s": first, "decode_tokens_s": rate, "total_tokens_s": total}

    once(1)
    found: dict[str, object] = {"start_s": round(time.monotonic() - started, 1)}
    for parallel in concurrency:
        found[str(parallel)] = medians([once(parallel) for _ in range(rounds)])
    status = Path("/proc/self/status").read_text("utf-8")
    kib = int(status.partition("VmRSS:")[2].split()[0])
    found["resident_gb"] = round(kib * 1024 / 1e9, 2)
    return found


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {
        key: round(statistics.median(one[key] for one in found), 3) for key in found[0]
    }


def show(found: dict[str, dict[str, object]], concurrency: list[int]) -> None:
    """One line per model; ratios are over llama.cpp's."""
    base = found.get("Q4_0", {})
    for row, figures in found.items():
        cells = []
        for parallel in map(str, concurrency):
            one, other = figures[parallel], base.get(parallel)
            assert isinstance(one, dict)
            text = f"{parallel}: {one['decode_tokens_s']:.1f}/s {one['ttft_s']:.2f} s"
            if isinstance(other, dict) and row != "Q4_0":
                text += f" ({one['decode_tokens_s'] / other['decode_tokens_s']:.2f}x)"
            cells.append(text)
        held = f"{figures['resident_gb']} GB, start {figures['start_s']} s"
        print(f"{row:<18} {held:<24} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
