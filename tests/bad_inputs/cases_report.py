"""Outputs that cannot be reported on, and places where a report must not go."""

import os
from typing import Any

from .case import Case, deleted, holding, in_json, with_keys, without_key

REPORT = "report out --json"
PROVENANCE = "out/provenance.json"
STATS = "out/moe_prune/stats.safetensors"


def first_layer(**values: Any) -> Any:
    """Other counts of layer 0 in the provenance."""
    return in_json(
        PROVENANCE, lambda data: data["sparsity_achieved"]["layers"][0].update(values)
    )


CASES = [
    Case(
        "report: of an original",
        "report ckpt --json",
        ("ckpt: config.json has no moe_prune block", "not an output"),
    ),
    Case("report: of nothing", "report nowhere --json", ("nowhere",)),
    Case(
        "report: into the output",
        f"{REPORT} --html out/page.html",
        ("out/page.html: is inside",),
    ),
    Case(
        "report: into a pipe",
        f"{REPORT} --html pipe",
        ("pipe: is a FIFO",),
        lambda folder: os.mkfifo(folder / "pipe"),
    ),
    Case("report: over a folder", f"{REPORT} --html ckpt", ("ckpt: is a folder",)),
    Case(
        "report: pictures into the output",
        f"{REPORT} --png out/pictures",
        ("out/pictures: is inside",),
    ),
    Case(
        "report: pictures over a file",
        f"{REPORT} --png text.txt",
        ("text.txt: is a file",),
    ),
    Case(
        "report: no such statistics",
        f"{REPORT} --stats none.safetensors",
        ("none.safetensors: no such statistics file",),
    ),
    Case(
        "report: damaged statistics in the output",
        REPORT,
        ("moe_prune/stats.safetensors: damaged statistics file",),
        holding(STATS, b"\xff" * 99),
    ),
    Case(
        "report: no plan",
        REPORT,
        ("plan.json: no such plan",),
        deleted("out/plan.json"),
    ),
    Case(
        "report: no provenance",
        REPORT,
        ("provenance.json: missing",),
        deleted(PROVENANCE),
    ),
    Case(
        "report: provenance without counts",
        REPORT,
        ("provenance.json: sparsity_achieved: Field required",),
        without_key(PROVENANCE, "sparsity_achieved"),
    ),
    Case(
        "report: provenance that is no JSON",
        REPORT,
        ("provenance.json: not valid JSON",),
        holding(PROVENANCE, '{"tool_version": NaN'),
    ),
    Case(
        "report: powers of weights cut short",
        REPORT,
        ("provenance.json: weight_powers.0.trimmed",),
        with_keys(
            PROVENANCE,
            weight_powers=[{"layer": 0, "trimmed": [1.0], "slimmed": [1.0] * 5}],
        ),
    ),
    *(
        Case(
            f"report: {name}",
            REPORT,
            (f"provenance.json: {says}",),
            in_json(PROVENANCE, lambda data, change=change: change(data)),
        )
        for name, says, change in (
            (
                "more zeros than parameters",
                "sparsity_achieved: more zeros than parameters",
                lambda data: data["sparsity_achieved"].update(zeros=10**12),
            ),
            (
                "sparsity of 2",
                "sparsity_achieved.of_experts",
                lambda data: data["sparsity_achieved"].update(of_experts=2.0),
            ),
            (
                "fewer passes than none",
                "forward_passes.cut",
                lambda data: data["forward_passes"].update(cut=-1),
            ),
            (
                "a negative sum of squares",
                "weight_powers.0.slimmed.2",
                lambda data: data.update(
                    weight_powers=[
                        {"layer": 0, "trimmed": [1.0] * 5, "slimmed": [1, 1, -1, 1, 1]}
                    ]
                ),
            ),
        )
    ),
    Case(
        "report: implausibly many experts",
        REPORT,
        ("provenance.json: sparsity_achieved.layers.0.experts_before",),
        first_layer(experts_before=10**15),
    ),
    Case(
        "report: a plan of other experts",
        REPORT,
        ("layer 0: says 4 experts, but the checkpoint has 5",),
        first_layer(experts_before=5),
    ),
    Case(
        "report: counts of another cut",
        REPORT,
        ("layer 0 keeps 3 experts, provenance.json says 2",),
        first_layer(experts_after=2),
    ),
    Case(
        "report: counts of fewer layers",
        REPORT,
        ("lists layers [0, 1]", "layers 0 to 0"),
        in_json(PROVENANCE, lambda data: data["sparsity_achieved"]["layers"].pop()),
    ),
]
