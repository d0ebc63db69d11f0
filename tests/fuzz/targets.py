"""What the tool reads, and the commands that read it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.command import run_command
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate import boundary
from vllm_moe_prune.calibrate.data import load_tokens
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.progress import Progress
from vllm_moe_prune.recipes.schema import Calibration

SMALL = "--samples 2 --sequence-length 32"
STATS = "--stats stats.safetensors"
TEXT = f"--calibration text.txt {SMALL}"
PAPER = "--recipe stun40-paper"
PLAN = f"plan ckpt {STATS} {TEXT} {PAPER} -o made.json"
CUT = "cut ckpt --plan plan.json -o made --calibration text.txt --json"
RESUME = CUT.replace("-o made", "-o part --resume --shard-size 60KB")
MEASURE = f"measure ckpt {SMALL} {PAPER} -o made.safetensors --json --calibration"
JUDGE = "eval ckpt --text text.txt --sequence-length 32 --max-tokens 64 --json"
GATEWAY = "gateway --backend a=http://x --api-key-file keys --dry-run"
SHARD = "model-00002-of-00003.safetensors"
WORK = "part.partial/work"
RECIPE = """\
name: mine
experts:
  method: stun
  drop: 0.25
  protected: {0: [1]}
slim: {method: magnitude, sparsity: 0.25, exclude: [w3]}
calibration: {samples: 2, sequence_length: 32}
"""
CARD = """\
---
license: apache-2.0
language: [en, de]
tags:
- moe
---

# A model
"""


def nothing(folder: Path) -> None:
    """The file alone is enough."""


def rehashed(folder: Path) -> None:
    """Let config.json name the hash of the remap table that is there."""
    table = folder / "out/expert_remap.json"
    if table.is_symlink() or not table.is_file() or table.stat().st_size > 1 << 28:
        return
    config = json.loads((folder / "out/config.json").read_bytes())
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    config["moe_prune"]["remap_sha256"] = digest
    (folder / "out/config.json").write_text(json.dumps(config))


def unhashed(folder: Path) -> None:
    """Leave out the hashes of tensors, which would end every look at them."""
    for path in folder.glob("*/tensor_hashes.json"):
        path.unlink()


@dataclass(frozen=True)
class Target:
    """A file, how it is spoilt, and the commands that then read it."""

    file: str
    how: str
    """A key of ``spoil.SPOILERS``."""
    commands: tuple[str, ...]
    share: int = 6
    """Of the cases; commands that run a model take long, and get less."""
    mend: Callable[[Path], None] = nothing
    """What is put right again behind the spoilt file, for it to be looked at."""


def looks(folder: str) -> tuple[str, ...]:
    return f"inspect {folder} --json", f"serve {folder} --dry-run"


TARGETS = (
    Target("ckpt/config.json", "json", (*looks("ckpt"), PLAN)),
    Target("deep/config.json", "json", looks("deep")),
    Target("arctic/config.json", "json", looks("arctic")),
    Target("int4/config.json", "json", looks("int4")),
    Target("mask/config.json", "json", (*looks("mask"), "verify mask --json")),
    Target("ckpt/model.safetensors.index.json", "json", ("inspect ckpt --json",)),
    Target(
        f"ckpt/{SHARD}",
        "safetensors",
        ("inspect ckpt --json", "verify out --source ckpt --json"),
    ),
    Target(
        "mask/model.safetensors",
        "safetensors",
        ("verify mask --json", "inspect mask --json"),
        mend=unhashed,
    ),
    Target(
        "int4/model.safetensors",
        "safetensors",
        ("verify int4 --json", "verify int4 --source wide --json"),
        mend=unhashed,
    ),
    Target("out/tensor_hashes.json", "json", ("verify out --json",)),
    Target(
        "out/config.json",
        "json",
        ("verify out --json", "report out --json", *looks("out")),
    ),
    Target(
        "out/expert_remap.json",
        "json",
        ("verify out --source ckpt --json", "serve out --dry-run", "report out --json"),
        mend=rehashed,
    ),
    Target("out/provenance.json", "json", ("report out --json", "verify out --json")),
    Target(
        "out/plan.json",
        "json",
        ("report out --json", "verify out --source ckpt --json"),
    ),
    Target("out/moe_prune/stats.safetensors", "safetensors", ("report out --json",)),
    Target("out/run.json", "json", ("verify out --json", "report out --json"), share=1),
    Target("plan.json", "json", ("serve ckpt --plan plan.json --dry-run",)),
    Target("stats.safetensors", "safetensors", (PLAN, f"report out --json {STATS}")),
    Target("recipe.yaml", "yaml", (f"{PLAN} --recipe recipe.yaml",)),
    Target("recipe.yaml", "text", (f"{PLAN} --recipe recipe.yaml",), share=1),
    Target("keys", "text", (GATEWAY,)),
    Target(
        "speeds.json", "json", ("compare ckpt out --speed-from speeds.json --json",)
    ),
    Target("saved.json", "json", (f"{JUDGE} --against saved.json",), share=1),
    Target("plan.json", "json", (CUT,), share=1),
    Target("ckpt/README.md", "card", (CUT,), share=1),
    Target("part.partial/journal.jsonl", "lines", (RESUME,), share=1),
    Target(f"{WORK}/hidden-00001.safetensors", "safetensors", (RESUME,), share=1),
    Target("text.txt", "text", (f"{MEASURE} text.txt",), share=1),
    Target("text.jsonl", "lines", (f"{MEASURE} text.jsonl",), share=1),
    Target("ckpt/tokenizer.json", "json", (f"{MEASURE} text.txt",), share=1),
    Target("ckpt/tokenizer_config.json", "json", (f"{MEASURE} text.jsonl",), share=1),
)


def make_good(folder: Path) -> None:
    """Everything as it should be, in the current folder, which is ``folder``."""
    sizes = {"layers": 2, "hidden": 32, "width": 48}
    tiny_checkpoint(folder / "ckpt", experts=4, **sizes)
    tiny_checkpoint(folder / "deep", model_type="deepseek_v3", fp8=(16, 16), **sizes)
    tiny_checkpoint(folder / "arctic", model_type="arctic", **sizes)
    tiny_checkpoint(folder / "wide", experts=4, layers=2, hidden=64, width=64)
    (folder / "ckpt/README.md").write_text(CARD)
    text = tiny_text(folder, 8000).read_text("utf-8")
    records = [json.dumps({"text": text[at : at + 500]}) for at in range(0, 8000, 500)]
    records.append(json.dumps({"messages": [{"role": "user", "content": text[:500]}]}))
    (folder / "text.jsonl").write_text("\n".join(records) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "keys").write_text("secret-one\nsecret-two\n")
    spread = {"median": 2.0, "low": 1.0, "high": 3.0}
    timed = [{"context": 128, "prefill": spread, "decode": spread}]
    rows = [
        {"model": one, "contexts": timed, "peak_bytes": 9} for one in ("ckpt", "out")
    ]
    (folder / "speeds.json").write_text(json.dumps({"rows": rows}))
    for command in (
        f"run ckpt out {STATS} {TEXT} {PAPER} --keep 3 --budget per-layer --total 0.4",
        f"plan ckpt {STATS} {TEXT} {PAPER} -o plan.json --keep 3 --total 0.4",
        f"run wide int4 --recipe turbo {TEXT}",
        "convert out mask --storage bitmask",
    ):
        ran = run_command(command)
        assert ran.status == 0, (command, ran)
    (folder / "saved.json").write_text(run_command(JUDGE).stdout)
    _leave_unfinished(folder)


class _Stopped(Exception):
    """The cut that ended after its first layer."""


def _leave_unfinished(folder: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "cut" and progress.layer == 1:
            raise _Stopped

    checkpoint = open_checkpoint(folder / "ckpt")
    plan = load_plan(folder / "plan.json")
    asked = Calibration(source="text.txt", samples=2, sequence_length=32)
    options = pipeline.RunOptions(device="cpu", max_shard_bytes=60_000, report=stop)
    kept, boundary.MAX_OVERHEAD = boundary.MAX_OVERHEAD, float("inf")
    try:
        tokens = load_tokens(checkpoint, asked)
        pipeline.cut(checkpoint, plan, folder / "part", options, tokens)
    except _Stopped:
        pass
    finally:
        boundary.MAX_OVERHEAD = kept
    assert (folder / WORK / "hidden-00001.safetensors").is_file()
