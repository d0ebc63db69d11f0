"""The report as one HTML page that loads nothing from outside and runs no script.

Jinja escapes every text, whatever the checkpoint had to say about itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..calibrate.stats import Array
from ..decide.quantize import said_of
from ..files.atomic import REPEAT, write_file, writing
from ..progress import gib
from . import deciding, svg
from .read import LayerNumbers, Numbers
from .sources import sources_text

OPEN_LAYERS = 8
"""Layers whose maps are unfolded when the page opens."""
MOST_NUMBERS = 12
"""Hidden states whose similarities are also shown as a table."""
ACTIONS = {
    "drop-moe": "MoE sublayer and its norm removed",
    "drop-moe-keep-norm": "MoE removed, its norm stays",
    "drop-block": "whole block removed",
}
Segment = tuple[str, float]


def write_page(numbers: Numbers, path: Path) -> None:
    """Write the page, complete or not at all."""
    with writing(path, REPEAT):
        write_file(path, page(numbers).encode())


def page(numbers: Numbers) -> str:
    """The page's text."""
    files = resources.files(__package__)
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.from_string((files / "page.html").read_text("utf-8"))
    drawn: dict[str, Any] = {
        "sensitivity": deciding.sensitivity(numbers),
        "coverage": deciding.coverage(numbers),
        "refits": deciding.refits(numbers),
        "alike": _alike(numbers),
        "routing": _routing(numbers),
        "kurtosis": _kurtosis(numbers),
        "sublayers": _sublayers(numbers),
        "blocks": _blocks(numbers),
    }
    return template.render(
        n=numbers,
        # Our own file, to go in as it is.
        css=Markup((files / "page.css").read_text("utf-8")),
        tiles=_tiles(numbers),
        sections=_sections(drawn),
        parameters=_parameters(numbers),
        stored=_stored(numbers),
        bar=_bar,
        number=_number,
        actions=ACTIONS,
        unseen=_unseen(numbers),
        open_layers=OPEN_LAYERS,
        facts=_facts(numbers),
        recipe=_recipe(numbers),
        **drawn,
    )


def _sections(drawn: dict[str, Any]) -> list[tuple[str, str]]:
    every = [
        ("size", "Size", True),
        ("layers", "Layers", True),
        ("sensitivity", "Sensitivity", drawn["sensitivity"]),
        ("coverage", "Coverage", drawn["coverage"]),
        ("refits", "Refit", drawn["refits"]),
        ("alike", "Experts alike", drawn["alike"]),
        *((chart["id"], chart["title"], True) for chart in drawn["routing"]),
        ("kurtosis", "Kurtosis", drawn["kurtosis"]),
        ("sublayers", "Sublayers", drawn["sublayers"]),
        ("blocks", "Blocks", drawn["blocks"]),
        ("made", "How it was made", True),
    ]
    return [(name, title) for name, title, there in every if there]


@dataclass(frozen=True)
class _Tile:
    name: str
    value: str
    more: str


def _tiles(numbers: Numbers) -> list[_Tile]:
    before = sum(layer.experts for layer in numbers.layers)
    after = sum(len(layer.keep) for layer in numbers.layers)
    kept = [str(len(layer.keep)) for layer in numbers.moe_layers if layer.keep]
    original = numbers.bytes_before
    size = gib(numbers.bytes_after)
    start, _, end = _values(numbers.kurtosis)
    tiles = [
        _Tile(
            "Tensors on disk",
            size,
            f"from {gib(original)}, {_change(numbers.bytes_after / original)}"
            if original
            else "size of the original not recorded",
        ),
        _Tile(
            "Experts",
            f"{after} of {before}",
            f"{min(map(int, kept))} to {max(map(int, kept))} per layer"
            if kept
            else "none left",
        ),
        _Tile(
            "Sparsity of experts",
            f"{numbers.expert_sparsity:.1%}",
            f"{numbers.total_sparsity:.1%} of all parameters",
        ),
    ]
    if end is not None:
        more = "after" if start is None else f"from {start:.3g} before"
        tiles.append(_Tile("Kurtosis of their weights", f"{end:.3g}", more))
    return tiles


def _change(ratio: float) -> str:
    return f"{ratio - 1:+.1%}".replace("-", "−")


def _parameters(numbers: Numbers) -> list[Segment]:
    whole = max(1, numbers.parameters_before)
    zeros = numbers.zeros / whole
    left = numbers.parameters_after / whole
    return [("kept", left - zeros), ("zeroed", zeros), ("gone", 1 - left)]


def _stored(numbers: Numbers) -> list[Segment]:
    if not numbers.bytes_before:
        return []
    left = numbers.bytes_after / numbers.bytes_before
    return [("kept", left), ("gone", 1 - left)]


def _bar(segments: Sequence[Segment]) -> Markup:
    return Markup("").join(
        Markup('<i class="{}" style="--w:{:.3f}%"></i>').format(kind, 100 * share)
        for kind, share in segments
        if share > 0
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _unseen(numbers: Numbers) -> str:
    return "; ".join(
        f"layer {layer.layer}: {', '.join(map(str, layer.unseen))}"
        for layer in numbers.layers
        if layer.unseen
    )


def _alike(numbers: Numbers) -> dict[str, Any] | None:
    layers = [layer for layer in numbers.layers if layer.distance_EE is not None]
    if not layers:
        return None
    scale = distance_scale(layers)
    stage = numbers.plan.recipe.experts
    threshold = numbers.plan.threshold if stage.method == "stun" else None
    # One scale for all layers: merges and the threshold compare across them.
    heights = svg.scale_of(
        [merge.height for layer in layers for merge in layer.merges] or [0.0],
        *([] if threshold is None else [threshold]),
    )
    return {
        "scale": scale,
        "threshold": threshold,
        "about": _about_distance(numbers),
        "layers": [
            {
                "numbers": layer,
                "map": svg.cluster_map(layer, scale),
                "tree": svg.merge_tree(layer, heights, threshold),
                "leaves": svg.leaves(layer),
                "clusters": _clusters(layer),
            }
            for layer in layers
        ],
    }


def distance_scale(layers: Sequence[LayerNumbers]) -> svg.Scale:
    """From the 2nd to the 98th percentile: a few pairs do not set the scale."""
    found = np.concatenate(
        [
            svg.off_diagonal(layer.distance_EE)
            for layer in layers
            if layer.distance_EE is not None
        ]
    )
    # No pairs: one expert per layer, or none that are finite.
    low, high = np.percentile(found, (2, 98)) if len(found) else (0.0, 0.0)
    return svg.Scale(float(low), float(high))


def _about_distance(numbers: Numbers) -> str:
    stage = numbers.plan.recipe.experts
    if stage.cluster_by == "outputs":
        return "Distance between the experts' outputs on the same tokens."
    parts = [
        f"{weight:g} × {name}"
        # As in STUN's Eq. 7: experts chosen together are nearer.
        for weight, name in (
            (stage.router_weight, "distance of router rows"),
            (-stage.coactivation_weight, "co-activation over its mean"),
        )
        if weight
    ]
    return f"Distance: {' '.join(parts).replace(' -', ' − ')}."


def _clusters(layer: LayerNumbers) -> list[tuple[str, str]]:
    return [
        (str(kept), ", ".join(str(each) for each in cluster if each != kept))
        # clusters[i] are the experts that keep[i] stands for; method score has none.
        for kept, cluster in zip(layer.keep, layer.clusters or (), strict=False)
        if len(cluster) > 1
    ]


def _routing(numbers: Numbers) -> list[dict[str, Any]]:
    charts: list[tuple[str, str, str, str, Callable[[LayerNumbers], Array | None]]] = [
        (
            "scores",
            "Routing scores",
            "Mean over the calibration tokens of each expert's full softmax score, in "
            "the original. One dot is one expert.",
            "mean score",
            lambda layer: layer.routing_score_E,
        ),
        (
            "frequency",
            "How often experts are chosen",
            "Share of the calibration tokens that chose each expert, in the original. "
            "One dot is one expert.",
            "of the tokens",
            lambda layer: layer.frequency_E,
        ),
    ]
    drawn = []
    for name, title, about, unit, values_of in charts:
        rows = [
            (layer, values_E)
            for layer in numbers.layers
            if (values_E := values_of(layer)) is not None
        ]
        if not rows:
            continue
        # From zero, so that twice as far along is twice the share.
        scale = svg.scale_of([float(x) for _, found in rows for x in found], 0.0)
        drawn.append(
            {
                "id": name,
                "title": title,
                "about": about,
                "scale": scale,
                "rows": [
                    (
                        layer.layer,
                        svg.strip(layer, found, scale, float(found.mean()), unit),
                    )
                    for layer, found in rows
                ],
            }
        )
    return drawn


def _values(found: Any) -> tuple[float | None, float | None, float | None]:
    return found.before, found.trimmed, found.slimmed


def _kurtosis(numbers: Numbers) -> dict[str, Any] | None:
    rows = [(layer.layer, _values(layer.kurtosis)) for layer in numbers.moe_layers]
    known = [value for _, values in rows for value in values if value is not None]
    if not known:
        return None
    scale = svg.scale_of(known)
    return {
        "scale": scale,
        "all": _values(numbers.kurtosis),
        "rows": [
            (
                layer,
                values,
                svg.three_marks(values, scale, f"Kurtosis of layer {layer}"),
            )
            for layer, values in rows
        ],
    }


def _sublayers(numbers: Numbers) -> dict[str, Any] | None:
    rows = [
        (layer, layer.moe_cosine)
        for layer in numbers.layers
        if layer.moe_cosine is not None
    ]
    if not rows:
        return None
    scale = svg.scale_of([value for _, value in rows])
    return {
        "scale": scale,
        "rows": [
            (
                layer.layer,
                value,
                svg.one_mark(
                    value,
                    scale,
                    f"Layer {layer.layer}: {value:.4f}",
                    "kept" if layer.action == "keep" else "gone",
                ),
            )
            for layer, value in rows
        ],
    }


def _blocks(numbers: Numbers) -> dict[str, Any] | None:
    cosine_HH = numbers.block_cosine_HH
    if cosine_HH is None:
        return None
    scale = svg.scale_of(svg.off_diagonal(cosine_HH).tolist())
    dropped = [
        str(layer.layer) for layer in numbers.layers if layer.action == "drop-block"
    ]
    return {
        "scale": scale,
        "dropped": ", ".join(dropped),
        "map": svg.heat_map(
            cosine_HH.copy(),
            scale,
            near_is_low=False,
            label=f"Similarity of {len(cosine_HH)} hidden states",
        ),
        "table": cosine_HH.tolist() if len(cosine_HH) <= MOST_NUMBERS else None,
    }


def _facts(numbers: Numbers) -> list[tuple[str, str]]:
    plan, calibration = numbers.plan, numbers.calibration or {}
    passes = ", ".join(
        f"{count} to {name}" for name, count in numbers.forward_passes.items()
    )
    facts = [
        ("Source", f"{numbers.name} ({plan.model.revision or 'local'})"),
        ("Family", plan.model.model_type),
        ("Fingerprint", plan.model.fingerprint),
        ("Routing", plan.routing_text),
        ("Slimming", f"{plan.slim}, {plan.pattern}"),
        ("Forward passes", passes),
    ]
    if plan.is_quantized:
        how = f"{plan.quantize.method}, {said_of(plan.quantize)}"
        facts.append(("Quantized", how))
    if plan.threshold is not None:
        facts.append(("Threshold", f"{plan.threshold:.6g}"))
    if plan.recipe.experts.protect != "none":
        facts.append(("Super-experts, kept", plan.super_text))
    facts += [
        (f"Calibration: {name.replace('_', ' ')}", str(value))
        for name, value in calibration.items()
        if name != "sources"
    ]
    facts += sources_text(plan.measurement, calibration)
    if numbers.earlier_cuts:
        facts.append(("Cuts before this one", str(numbers.earlier_cuts)))
    return [*facts, ("Tool", f"vllm-moe-prune {numbers.tool_version}")]


def _recipe(numbers: Numbers) -> str:
    # What differs from the defaults, as a recipe file would have it.
    recipe = numbers.plan.recipe.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
