"""Trainings that cannot be carried out."""

from .case import SMALL, Case, deleted, holding
from .cases_quantized import quantized

TEXT = f"--calibration text.txt {SMALL} --heldout 2 --steps 1 --json"
ROUTER = f"recover uneven new --method router --source ckpt {TEXT}"
LORA = f"recover out new --method lora {TEXT}"
FULL = f"recover out new --method full {TEXT}"


CASES = [
    Case("recover: no such method", LORA.replace("lora", "dpo"), ("'dpo'", "router")),
    Case(
        "recover: no original",
        ROUTER.replace("--source ckpt", ""),
        ("--source", "before the cut"),
    ),
    Case("recover: an original for lora", f"{LORA} --source ckpt", ("--source",)),
    Case(
        "recover: not pruned",
        ROUTER.replace("uneven", "ckpt"),
        ("moe_prune", "nothing to recover"),
    ),
    Case(
        "recover: another original",
        ROUTER.replace("--source ckpt", "--source out"),
        ("out: is not the checkpoint that uneven was cut from", "another model"),
    ),
    Case("recover: no text", LORA.replace("text.txt", "no.txt"), ("no.txt", "no such")),
    Case(
        "recover: no text named",
        LORA.replace("--calibration text.txt", ""),
        ("--calibration",),
    ),
    Case(
        "recover: text too short to keep some apart",
        f"{LORA} --heldout 100000",
        ("apart to judge on", "longer text"),
    ),
    Case("recover: no steps", f"{LORA} --steps 0", ("--steps is 0",)),
    Case("recover: empty batches", f"{FULL} --batch-size 0", ("--batch-size is 0",)),
    Case("recover: rank 0", f"{LORA} --rank 0", ("--rank is 0",)),
    Case("recover: warm-up of 2", f"{LORA} --warmup 2", ("--warmup is 2", "0 to 1")),
    Case("recover: rate 0", f"{FULL} --learning-rate 0", ("--learning-rate is 0",)),
    Case("recover: rate nan", f"{FULL} --learning-rate nan", ("--learning-rate",)),
    Case("recover: junk target", f"{LORA} --targets mlp", ("'mlp'", "attention")),
    Case("recover: adapters on norms", f"{LORA} --targets norms", ("'norms'", "dense")),
    Case(
        "recover: nothing to train",
        f"{LORA} --targets dense",
        ("has no dense to train",),
        leaves=("new.partial/*",),
    ),
    Case("recover: targets of router", f"{ROUTER} --targets attention", ("--targets",)),
    Case("recover: no such device", f"{LORA} --device tpu", ("'tpu'", "cpu")),
    Case("recover: onto itself", LORA.replace(" new ", " out "), ("is the input",)),
    Case(
        "recover: onto the original",
        ROUTER.replace(" new ", " ckpt ") + " --overwrite",
        ("ckpt", "is the input"),
    ),
    Case(
        "recover: output in the way", LORA.replace(" new ", " uneven "), ("not empty",)
    ),
    Case(
        "recover: quantized",
        LORA.replace("recover out", "recover quantized"),
        ("quantized", "--method router"),
        quantized(lambda folder: None),
    ),
    Case(
        "recover: no table",
        ROUTER,
        ("expert_remap.json",),
        deleted("uneven/expert_remap.json"),
    ),
    Case(
        "recover: provenance is no JSON",
        FULL,
        ("provenance.json", "not valid JSON"),
        holding("out/provenance.json", "{"),
    ),
]
