"""Every command that writes, on a tiny model: what is run, and how it is resumed."""

import json
from dataclasses import dataclass
from pathlib import Path

from tests.reference import LayerCut, write_plan
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.checkpoint.source import open_checkpoint

LAYERS, EXPERTS, CHARACTERS = 2, 4, 6_000
SHARDS = "--shard-size 60KB"
TEXT = "--calibration ../inputs/text.txt --samples 4 --sequence-length 32 --json"
MODEL, PRUNED = "../inputs/model", "../inputs/pruned"
WIDE = "../inputs/wide"
"""Of channels enough to lose some."""
CUTS = {
    0: LayerCut(
        keep=(1, 2, 3), clusters=((0, 1), (2,), (3,)), reconstruct=True, sparsity=0.5
    ),
    1: LayerCut(keep=(0, 2), sparsity=0.25),
}
TRAINING = "--steps 2 --batch-size 2 --heldout 2"


@dataclass(frozen=True)
class Case:
    """One command; it runs in a folder beside ``inputs``."""

    name: str
    command: str
    output: str = "out"
    """What it makes, in its folder."""
    resume: str = "--resume"
    earlier: bool = False
    """Whether an earlier output of that name is there, to be replaced."""
    slow: bool = False

    def called(self, name: str) -> bool:
        """Whether a name means this case: its own, or a part if it is no case's own."""
        return name == self.name if name in NAMES else name in self.name

    @property
    def arguments(self) -> list[str]:
        return self.command.split()

    @property
    def resuming(self) -> list[str]:
        return [*self.arguments, *self.resume.split()]


def cut(plan: str, flags: str = "") -> str:
    return f"cut {MODEL} --plan ../inputs/{plan}.json -o out {SHARDS} {flags} --json"


def run(recipe: str, flags: str = "", model: str = MODEL) -> str:
    return f"run {model} out --recipe ../inputs/{recipe}.yaml {SHARDS} {flags} --json"


def recover(method: str, flags: str = "") -> str:
    return f"recover {PRUNED} out --method {method} {TRAINING} {TEXT} {flags}"


CASES = [
    Case(
        "measure",
        f"measure {MODEL} -o stats.safetensors {TEXT} --recipe stun40-paper",
        "stats.safetensors",
        "",
    ),
    Case(
        "measure, sensitivity",
        f"measure {MODEL} -o stats.safetensors --recipe ../inputs/sensitive.yaml "
        f"{TEXT}",
        "stats.safetensors",
        "",
    ),
    Case(
        "plan",
        f"plan {MODEL} --stats ../inputs/stats.safetensors -o plan.json "
        "--recipe stun40-paper --json",
        "plan.json",
        "",
    ),
    Case(
        "plan --sweep",
        f"plan {MODEL} --stats ../inputs/stats.safetensors -o plans "
        "--recipe stun40-paper --sweep total=0.2:0.4:0.1 --json",
        "plans",
        "",
    ),
    Case(
        "tune",
        f"tune {MODEL} -o plan.json --recipe ../inputs/tuned.yaml --plot front.svg "
        "--json",
        "plan.json",
        "",
        slow=True,
    ),
    Case("cut, copies", cut("none")),
    Case("cut, wanda", cut("wanda")),
    Case("cut, int4", cut("int4"), slow=True),
    Case("cut, bitmask", cut("wanda", "--storage bitmask")),
    Case("cut --overwrite", cut("wanda", "--overwrite"), earlier=True),
    Case(
        "cut --overwrite, bitmask",
        cut("wanda", "--storage bitmask --overwrite"),
        earlier=True,
    ),
    Case("run", run("stun")),
    Case("run --stats", run("stun", "--stats stats.safetensors")),
    Case("run, bitmask", run("stun", "--storage bitmask")),
    Case("run, tuned", run("tuned"), slow=True),
    Case("run, zeros first", run("zeros-first")),
    Case("run, quantized", run("quantized"), slow=True),
    Case("run, narrowed", run("narrowed", model=WIDE), slow=True),
    Case("run --overwrite", run("stun", "--overwrite"), earlier=True),
    Case(
        "convert to bitmask", f"convert {PRUNED} out --storage bitmask {SHARDS} --json"
    ),
    Case(
        "convert to dense",
        f"convert ../inputs/bitmask out --storage dense {SHARDS} --json",
    ),
    Case(
        "convert --overwrite",
        f"convert {PRUNED} out --storage bitmask {SHARDS} --overwrite --json",
        earlier=True,
    ),
    Case("recover, router", recover("router", f"--source {MODEL}")),
    Case("recover, lora", recover("lora", "--rank 2"), slow=True),
    Case("recover, full", recover("full"), slow=True),
    Case("recover, teacher", recover("router", f"--teacher {MODEL}"), slow=True),
    Case(
        "recover --overwrite",
        recover("router", f"--source {MODEL} --overwrite"),
        earlier=True,
    ),
    Case(
        "report",
        f"report {PRUNED} --html page.html --png pictures --json",
        "page.html",
        "",
    ),
]
NAMES = {case.name for case in CASES}

MADE = (
    f"measure {MODEL} -o ../inputs/stats.safetensors {TEXT} --recipe stun40-paper",
    f"cut {MODEL} --plan ../inputs/wanda.json -o ../inputs/pruned --json",
    f"convert {PRUNED} ../inputs/bitmask --storage bitmask --json",
)
"""What other cases read."""


def make_inputs(folder: Path) -> None:
    """The model, the text and what people write by hand."""
    folder.mkdir()
    tiny_checkpoint(
        folder / "model",
        layers=LAYERS,
        experts=EXPERTS,
        hidden=32,
        width=32,
        vocab=300,
    )
    tiny_checkpoint(
        folder / "wide", layers=2, experts=2, hidden=32, width=64, vocab=300
    )
    tiny_text(folder, characters=CHARACTERS)
    checkpoint = open_checkpoint(folder / "model")
    calibration = {"source": "../inputs/text.txt", "samples": 4, "sequence_length": 32}
    for name, quantize in {
        "none": None,
        "wanda": None,
        "int4": {"method": "rtn", "weights": "int4", "group_size": 32},
    }.items():
        write_plan(
            folder / f"{name}.json",
            checkpoint,
            CUTS,
            slim="wanda" if name == "wanda" else "none",
            quantize=quantize,
            recipe={"calibration": calibration},
        )
    said = f"calibration: {json.dumps(calibration | {'heldout': 2})}\n"
    (folder / "stun.yaml").write_text(
        "name: stun\ntotal_sparsity: 0.4\nexperts: {drop: 0.3}\n" + said
    )
    (folder / "sensitive.yaml").write_text(
        "name: sensitive\ntotal_sparsity: 0.4\n"
        "experts: {drop: 0.3, budget: sensitivity}\n" + said
    )
    (folder / "zeros-first.yaml").write_text(
        "name: zeros-first\ntotal_sparsity: 0.4\norder: unstructured-first\n"
        "experts: {drop: 0.3}\n" + said
    )
    (folder / "narrowed.yaml").write_text(
        "name: narrowed\nexperts: {method: none}\nslim: {method: none}\n"
        "narrow: {share: 0.5}\n" + said
    )
    (folder / "quantized.yaml").write_text(
        "name: quantized\nexperts: {drop: 0.3}\nslim: {method: none}\n"
        "quantize: {method: rtn, weights: int4, group_size: 32}\n" + said
    )
    (folder / "tuned.yaml").write_text(
        "name: tuned\ntotal_sparsity: 0.4\ntune: {experts: [reap, stun], "
        "budgets: [global], shares: [0.5, 1], layers: [0.5], slims: [wanda], "
        "owl: false, finalists: 1}\n" + said
    )
