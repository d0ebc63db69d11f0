"""The report's drawings as PNG files, by matplotlib, for papers and model cards."""

from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import require_extra
from ..files.atomic import REPEAT, write_file, writing
from .deciding import chosen, rise
from .page import distance_scale
from .read import LayerNumbers, Numbers
from .tree import forks, leaf_order, outlines

KEPT, ZEROED, GONE, SLIM, TEXT = "#2a78d6", "#a9cbf3", "#dedcd5", "#d9582a", "#55534d"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b9b7af",
    "axes.labelcolor": TEXT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}


def write_figures(numbers: Numbers, folder: Path) -> list[Path]:
    """Write one PNG for each thing that was measured, and return their paths.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    require_extra("plot", ("matplotlib",), "PNG files (unlike the HTML page)")
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with writing(folder, REPEAT):
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(STYLE):
        for name, size, draw in _figures(numbers):
            figure = Figure(figsize=size)
            # Not pyplot, which keeps every figure alive and may look for a display.
            FigureCanvasAgg(figure)
            draw(figure)
            path = folder / f"{name}.png"
            save_figure(figure, path)
            paths.append(path)
    return paths


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a drawing of matplotlib, whole or not at all, in the format of its name.

    Without metadata the same numbers give the same bytes.
    """
    import matplotlib as mpl

    kind = path.suffix.removeprefix(".").lower()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    # In memory first: write_file then replaces an old file in one step.
    drawn = BytesIO()
    # Without a salt matplotlib gives the elements of an SVG random ids.
    with mpl.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(drawn, format=kind, metadata=metadata, **options)
    with writing(path, REPEAT):
        write_file(path, drawn.getvalue())


_Figure = tuple[str, tuple[float, float], Callable[[Any], None]]


def _figures(numbers: Numbers) -> Iterator[_Figure]:
    layers = max(1, len(numbers.layers))
    # Inches; models with many layers get narrower columns instead of wider figures.
    wide = min(14.0, 3.0 + 0.35 * layers)
    yield "size", (6.0, 1.8), lambda figure: _size(figure, numbers)
    yield "survivors", (wide, 4.5), lambda figure: _survivors(figure, numbers)
    if any(layer.sensitivity_P2 is not None for layer in numbers.layers):
        yield "sensitivity", (6.5, 3.6), lambda figure: _sensitivity(figure, numbers)
    for layer in numbers.layers:
        if layer.distance_EE is not None:
            yield (
                f"experts-layer-{layer.layer:03d}",
                (4.8, 6.2),
                partial(_experts, layer=layer, numbers=numbers),
            )
    for name, field, title in (
        ("routing-scores", "routing_score_E", "Mean routing score of each expert"),
        ("routing-frequency", "frequency_E", "Share of tokens that chose each expert"),
    ):
        if any(getattr(layer, field) is not None for layer in numbers.layers):
            draw = partial(_routing, numbers=numbers, field=field, title=title)
            yield name, (wide, 3.2), draw
    known = [
        layer
        for layer in numbers.moe_layers
        if (layer.kurtosis.before or layer.kurtosis.slimmed) is not None
    ]
    if known:
        yield "kurtosis", (wide, 3.2), lambda figure: _kurtosis(figure, known)
    if any(layer.moe_cosine is not None for layer in numbers.layers):
        yield "sublayers", (wide, 2.6), lambda figure: _sublayers(figure, numbers)
    if numbers.block_cosine_HH is not None:
        yield "blocks", (4.8, 4.2), lambda figure: _blocks(figure, numbers)


def _size(figure: Any, numbers: Numbers) -> None:
    axes = figure.subplots()
    whole = numbers.parameters_before
    zeros, after = numbers.zeros, numbers.parameters_after
    rows = {"before": (whole, 0, 0), "after": (after - zeros, zeros, whole - after)}
    # barh stacks nothing by itself: each part starts where the last one ended.
    for row, parts in rows.items():
        left = 0.0
        for part, color in zip(parts, (KEPT, ZEROED, GONE), strict=True):
            axes.barh(row, part, left=left, color=color, height=0.6)
            left += part
    axes.invert_yaxis()
    axes.set_title("Parameters: not zero, zeroed, removed")


def _survivors(figure: Any, numbers: Numbers) -> None:
    above, below = figure.subplots(2, sharex=True)
    at = [layer.layer for layer in numbers.layers]
    kept = np.array([len(layer.keep) for layer in numbers.layers])
    gone = np.array([layer.experts for layer in numbers.layers]) - kept
    above.bar(at, kept, color=KEPT, label="kept")
    above.bar(at, gone, bottom=kept, color=GONE, label="removed")
    above.set_title("Experts")
    removed = np.array([layer.removed for layer in numbers.layers])
    zeroed = np.array([layer.zeroed for layer in numbers.layers])
    below.bar(at, removed, color=GONE, label="removed")
    below.bar(at, zeroed, bottom=removed, color=ZEROED, label="zeroed")
    below.set_title("Sparsity of the layer's expert parameters")
    below.set_ylim(0, 1)
    for axes in (above, below):
        _by_layer(axes)
    above.set_xlabel("")


def _sensitivity(figure: Any, numbers: Numbers) -> None:
    axes = figure.subplots()
    for layer in numbers.moe_layers:
        points_P2 = rise(layer)
        if points_P2 is None:
            continue
        (line,) = axes.plot(*points_P2.T, linewidth=1.2, label=f"layer {layer.layer}")
        removed, loss = chosen(layer)
        if loss is not None:
            axes.plot(removed, loss, "o", color=line.get_color(), markersize=5)
    axes.set_title("Rise of the loss, one layer alone; dots: what the plan takes")
    axes.set_xlabel("experts removed")
    axes.set_ylabel("nats per token")
    # More names than that would fill the figure.
    if len(numbers.moe_layers) <= 16:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)


def _experts(figure: Any, layer: LayerNumbers, numbers: Numbers) -> None:
    assert layer.distance_EE is not None
    tree, cells = figure.subplots(2, sharex=True, height_ratios=(1, 3))
    order = list(leaf_order(layer.merges, layer.experts))
    lowest = min((merge.height for merge in layer.merges), default=0.0)
    highest = max((merge.height for merge in layer.merges), default=1.0)
    # Distances of Eq. 7 can be negative: leaves stand below the lowest merge, not at 0.
    floor = lowest - 0.08 * (highest - lowest)
    for fork in forks(layer.merges, order, layer.clusters):
        ends = [floor if at is None else at for at in (fork.left_base, fork.right_base)]
        tree.plot(
            [fork.left, fork.left, fork.right, fork.right],
            [ends[0], fork.height, fork.height, ends[1]],
            color=SLIM if fork.within else "#8d8b84",
            linewidth=1.2,
        )
    stun = numbers.plan.recipe.experts.method == "stun"
    if stun and numbers.plan.threshold is not None:
        tree.axhline(numbers.plan.threshold, color="black", linestyle="--", lw=0.8)
    tree.set_title(
        f"Layer {layer.layer}: {layer.experts} experts, {len(layer.keep)} stay"
    )
    tree.tick_params(bottom=False, labelbottom=False)
    tree.spines["bottom"].set_visible(False)
    scale = distance_scale(numbers.layers)
    distance_EE = layer.distance_EE[np.ix_(order, order)]
    # np.ix_ made a copy. NaN leaves cells blank.
    np.fill_diagonal(distance_EE, np.nan)
    image = cells.imshow(
        distance_EE, cmap="Blues_r", vmin=scale.low, vmax=scale.high, aspect="auto"
    )
    clusters = [cluster for cluster in layer.clusters or () if len(cluster) > 1]
    for x, y, width, height in outlines(order, clusters):
        # imshow centers its cells on whole numbers.
        corner = (x - 0.5, y - 0.5)
        cells.add_patch(_rectangle(corner, width, height))
    # More numbers than that would overlap.
    if layer.experts <= 32:
        cells.set_xticks(range(layer.experts), order)
        cells.set_yticks(range(layer.experts), order)
    figure.colorbar(image, ax=cells, location="bottom", label="distance", shrink=0.7)


def _rectangle(corner: tuple[float, float], width: int, height: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, fill=False, edgecolor=SLIM, linewidth=1.6)


def _routing(figure: Any, numbers: Numbers, field: str, title: str) -> None:
    axes = figure.subplots()
    marks = (("kept", KEPT, KEPT), ("removed", "none", TEXT))
    points: dict[str, list[tuple[int, float]]] = {"kept": [], "removed": []}
    for layer in numbers.layers:
        kept = set(layer.keep)
        value_E = getattr(layer, field)
        for expert, value in enumerate([] if value_E is None else value_E.tolist()):
            points["kept" if expert in kept else "removed"].append((layer.layer, value))
    for name, face, edge in marks:
        if points[name]:
            at, values = zip(*points[name], strict=True)
            axes.scatter(at, values, s=18, facecolors=face, edgecolors=edge, label=name)
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    _by_layer(axes)


def _by_layer(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _kurtosis(figure: Any, layers: list[LayerNumbers]) -> None:
    axes = figure.subplots()
    stages = (("before", "none", 40), ("trimmed", KEPT, 18), ("slimmed", SLIM, 18))
    for stage, face, size in stages:
        values = [getattr(layer.kurtosis, stage) for layer in layers]
        axes.scatter(
            [layer.layer for layer in layers],
            # NaN: the point is left out, its layer keeps its place.
            [np.nan if value is None else value for value in values],
            s=size,
            facecolors=face,
            edgecolors="#55534d" if face == "none" else face,
            label=stage,
        )
    axes.set_title("Kurtosis of the experts' weights that are not zero")
    _by_layer(axes)


def _sublayers(figure: Any, numbers: Numbers) -> None:
    axes = figure.subplots()
    found = [layer for layer in numbers.layers if layer.moe_cosine is not None]
    axes.bar(
        [layer.layer for layer in found],
        [layer.moe_cosine for layer in found],
        color=[KEPT if layer.action == "keep" else GONE for layer in found],
    )
    axes.set_title("Cosine before and after each MoE sublayer")
    _by_layer(axes)


def _blocks(figure: Any, numbers: Numbers) -> None:
    axes = figure.subplots()
    image = axes.imshow(numbers.block_cosine_HH, cmap="Blues")
    axes.set_title("Cosine between hidden states")
    figure.colorbar(image, ax=axes)
