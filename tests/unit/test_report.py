"""The report: its numbers against the weights, its page as a browser takes it."""

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats as scipy_stats

from tests.reference import DROP_MOE, LayerCut, read_json, write_plan
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.calibrate.stats import PER_SOURCE, LayerStats, SourceStats, Stats
from vllm_moe_prune.calibrate.stats_file import load_stats, save_stats
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_expert
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.output import STATS_FILE
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError, PlanError
from vllm_moe_prune.pipeline import RunOptions, convert, run
from vllm_moe_prune.recipes.flags import with_overrides
from vllm_moe_prune.recipes.loading import load_recipe
from vllm_moe_prune.recipes.schema import parse_recipe
from vllm_moe_prune.report.as_data import as_data
from vllm_moe_prune.report.deciding import chosen, removed_of
from vllm_moe_prune.report.figures import write_figures
from vllm_moe_prune.report.page import page
from vllm_moe_prune.report.raster import opacity_png
from vllm_moe_prune.report.read import Numbers, read_numbers

FLAGS = {"samples": 2, "sequence_length": 32, "total": 0.5, "drop": 0.25}
VOID = {"meta", "link", "img", "br", "input", "hr"}
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;{{7*7}}"


class Page(HTMLParser):
    """What a browser would see; complains where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}

    @property
    def ids(self) -> set[str | None]:
        return {attrs["id"] for _, attrs in self.tags if "id" in attrs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and its STUN output."""
    folder = tmp_path_factory.mktemp("report")
    source = tiny_checkpoint(
        folder / "in", layers=2, experts=8, hidden=32, width=48, clusters=4
    )
    flags = FLAGS | {"calibration": str(tiny_text(folder, 8000))}
    recipe = with_overrides(load_recipe("stun40-paper"), flags)
    run(open_checkpoint(source), recipe, folder / "out", RunOptions())
    return folder


@pytest.fixture(scope="module")
def numbers(folder: Path) -> Numbers:
    return read_numbers(folder / "out")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The output, to be spoilt."""
    return Path(shutil.copytree(folder / "out", tmp_path / "out"))


def weights(checkpoint: Checkpoint, layers: dict[int, list[int]]) -> np.ndarray:
    """All weights that are not zero of some experts of some layers."""
    found = torch.cat(
        [
            matrix.flatten().double()
            for layer, experts in layers.items()
            for expert in experts
            for matrix in read_expert(checkpoint, checkpoint.layers[layer], expert)
        ]
    ).numpy()
    return found[found != 0]


def test_kurtosis_is_that_of_the_weights_at_each_stage(
    folder: Path, numbers: Numbers
) -> None:
    source = open_checkpoint(folder / "in")
    output = open_checkpoint(folder / "out")
    kept = {layer.layer: list(layer.keep) for layer in numbers.layers}
    stages = {
        "before": (source, {layer: list(range(8)) for layer in kept}),
        "trimmed": (source, kept),
        "slimmed": (output, {layer: list(range(len(kept[layer]))) for layer in kept}),
    }
    for stage, (checkpoint, experts) in stages.items():
        for layer in numbers.layers:
            own = weights(checkpoint, {layer.layer: experts[layer.layer]})
            expected = scipy_stats.kurtosis(own, fisher=False)
            assert getattr(layer.kurtosis, stage) == pytest.approx(expected, rel=1e-6)
        every = scipy_stats.kurtosis(weights(checkpoint, experts), fisher=False)
        assert getattr(numbers.kurtosis, stage) == pytest.approx(every, rel=1e-6)


def test_numbers_are_those_of_the_weights_and_the_statistics(
    folder: Path, numbers: Numbers
) -> None:
    source = open_checkpoint(folder / "in")
    output = open_checkpoint(folder / "out")
    assert numbers.bytes_before == source.stored_bytes
    assert numbers.bytes_after == output.stored_bytes
    stats = load_stats(folder / "out" / STATS_FILE)
    for layer in numbers.layers:
        view = output.layers[layer.layer]
        assert len(layer.keep) == view.num_experts
        whole = 8 * 3 * 32 * 48
        left = len(weights(output, {layer.layer: list(range(view.num_experts))}))
        assert layer.removed + layer.zeroed == pytest.approx(1 - left / whole, abs=1e-5)
        found = stats.layers[layer.layer]
        assert found.routed_E is not None
        assert found.tokens is not None
        np.testing.assert_allclose(layer.frequency_E, found.routed_E / 64)
        assert float(found.tokens) == 64
        assert layer.clusters is not None
        merged = [len(cluster) for cluster in layer.clusters]
        assert sum(merged) == 8
    assert "Routing scores" in numbers.missing
    assert "Similarity of experts (clusters, merge tree)" not in numbers.missing


def test_the_page_is_whole_and_loads_nothing(numbers: Numbers) -> None:
    shown = Page(page(numbers))
    assert not shown.names & {"script", "iframe", "link", "img", "object", "form"}
    for tag, attrs in shown.tags:
        for name in ("src", "href", "data", "action", "xlink:href"):
            address = attrs.get(name) or ""
            inside = address.startswith(("#", "data:image/png;base64,"))
            assert not address or inside, (tag, address)
        assert not any(name.startswith("on") for name in attrs)
    assert "url(" not in page(numbers)
    policy = [attrs for _, attrs in shown.tags if attrs.get("http-equiv")]
    assert (policy[0]["content"] or "").startswith("default-src 'none'")
    targets = {
        (attrs["href"] or "")[1:] for tag, attrs in shown.tags if tag == "a" and attrs
    }
    assert targets <= shown.ids


def test_every_drawing_has_words_and_every_table_headers(numbers: Numbers) -> None:
    shown = Page(page(numbers))
    html = dict(shown.tags)["html"]
    assert html["lang"] == "en"
    drawings = [attrs for tag, attrs in shown.tags if tag == "svg"]
    outer = [attrs for attrs in drawings if "preserveaspectratio" not in attrs]
    assert len(outer) > 6
    for attrs in outer:
        described = attrs.get("role") == "img" and attrs.get("aria-label")
        assert described or attrs.get("aria-hidden") == "true", attrs
    headers = [attrs for tag, attrs in shown.tags if tag == "th"]
    assert headers
    assert all("scope" in attrs for attrs in headers)
    levels = [int(tag[1]) for tag, _ in shown.tags if tag in {"h1", "h2", "h3"}]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_the_same_output_gives_the_same_page(folder: Path, numbers: Numbers) -> None:
    assert page(read_numbers(folder / "out")) == page(numbers)


def test_hostile_names_are_shown_as_text(copy: Path) -> None:
    plan = read_json(copy / "plan.json")
    plan["model"]["source"] = plan["recipe"]["name"] = HOSTILE
    plan["recipe"]["description"] = plan["model"]["revision"] = HOSTILE
    plan["model"]["model_type"] = HOSTILE
    (copy / "plan.json").write_text(json.dumps(plan), "utf-8")
    provenance = read_json(copy / "provenance.json")
    provenance["tool_version"] = HOSTILE
    provenance["calibration"] = {HOSTILE: HOSTILE}
    provenance["forward_passes"] = {HOSTILE: 1}
    (copy / "provenance.json").write_text(json.dumps(provenance), "utf-8")
    shown = Page(page(read_numbers(copy)))
    assert not shown.names & {"script", "img"}
    assert not any(name.startswith("on") for _, attrs in shown.tags for name in attrs)
    assert "".join(shown.text).count(HOSTILE) >= 6


def test_what_was_not_measured_is_said_and_not_drawn(copy: Path) -> None:
    shutil.rmtree(copy / STATS_FILE.parent)
    provenance = read_json(copy / "provenance.json")
    del provenance["source_bytes"], provenance["weight_powers"]
    (copy / "provenance.json").write_text(json.dumps(provenance), "utf-8")
    numbers = read_numbers(copy)
    assert len(numbers.missing) == 9
    shown = Page(page(numbers))
    assert not shown.ids & {"alike", "scores", "frequency", "kurtosis", "blocks"}
    assert {"size", "layers", "made"} <= shown.ids
    said = "".join(shown.text)
    assert all(name in said for name in numbers.missing)


def test_further_statistics_fill_in_what_the_output_lacks(
    folder: Path, copy: Path, tmp_path: Path
) -> None:
    kept = load_stats(folder / "out" / STATS_FILE)
    more = Stats(fingerprint=kept.fingerprint, layers={}, block_tokens=np.array(4.0))
    object.__setattr__(more, "block_cosine_HH", np.full((3, 3), 2.0))
    save_stats(more, tmp_path / "more.safetensors")
    assert read_numbers(copy).block_cosine_HH is None
    numbers = read_numbers(copy, [tmp_path / "more.safetensors"])
    np.testing.assert_array_equal(numbers.block_cosine_HH, np.full((3, 3), 0.5))
    assert "blocks" in Page(page(numbers)).ids


def test_statistics_of_another_model_are_refused(copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_stats(Stats(fingerprint="0" * 64, layers={}), other)
    with pytest.raises(PlanError, match=r"other\.safetensors: .* of another model"):
        read_numbers(copy, [other])


def test_dropped_blocks_and_sublayers_are_named(tmp_path: Path) -> None:
    source = tiny_checkpoint(
        tmp_path / "in", layers=4, experts=4, hidden=16, width=8, tokenizer=False
    )
    checkpoint = open_checkpoint(source)
    cuts = {
        0: LayerCut(action="drop-block"),
        1: DROP_MOE,
        2: LayerCut(keep=(3, 1)),
    }
    plan = load_plan(write_plan(tmp_path / "plan.json", checkpoint, cuts))
    execute_plan(checkpoint, plan, tmp_path / "out")
    numbers = read_numbers(tmp_path / "out")
    said = "".join(Page(page(numbers)).text)
    assert "whole block removed, 4 experts removed" in said
    assert "MoE sublayer and its norm removed, 4 experts removed" in said
    assert "2 of 4" in said
    assert [layer.removed for layer in numbers.layers] == [1, 1, 0.5, 0]
    data = as_data(numbers)
    assert [layer["kept"] for layer in data["layers"]] == [[], [], [3, 1], [0, 1, 2, 3]]


def test_maps_hold_the_values_as_opacity() -> None:
    share_YX = np.array([[0.0, 0.5, 1.0], [-3.0, np.nan, 9.0]])
    image = Image.open(BytesIO(opacity_png(share_YX))).convert("RGBA")
    assert image.size == (3, 2)
    opacity = np.asarray(image)[:, :, 3].tolist()
    assert opacity == [[0, 128, 255], [0, 0, 255]]


@pytest.mark.slow
def test_pictures_are_drawn_of_what_was_measured(
    numbers: Numbers, tmp_path: Path
) -> None:
    first = write_figures(numbers, tmp_path / "one")
    names = [path.stem for path in first]
    assert names == [
        *("size", "survivors", "experts-layer-000", "experts-layer-001"),
        *("routing-frequency", "kurtosis"),
    ]
    for path, again in zip(
        first, write_figures(numbers, tmp_path / "two"), strict=True
    ):
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.std() > 5, "something is drawn"
        assert path.read_bytes() == again.read_bytes()


def test_a_compressed_output_gives_the_same_report_but_for_its_size(
    folder: Path, numbers: Numbers, tmp_path: Path
) -> None:
    output = open_checkpoint(folder / "out")
    convert(output, tmp_path / "packed", RunOptions(storage="bitmask"))
    packed = read_numbers(tmp_path / "packed")
    assert packed.bytes_after == open_checkpoint(tmp_path / "packed").stored_bytes
    assert packed.bytes_after < numbers.bytes_after
    same = as_data(packed) | {"tensor_bytes": as_data(numbers)["tensor_bytes"]}
    assert same == as_data(numbers)


# What decided


@pytest.fixture(scope="module")
def sensitive(folder: Path) -> Path:
    """An output whose budget was split by measured sensitivity."""
    recipe = parse_recipe(
        {
            "experts": {
                "method": "score",
                "criterion": "reap",
                "drop": 0.25,
                "budget": "sensitivity",
                "refit": "ridge",
            },
            "slim": {"method": "none"},
            "calibration": {"samples": 4, "sequence_length": 32, "heldout": 2},
        },
        "sensitive",
    )
    recipe = with_overrides(recipe, {"calibration": str(tiny_text(folder, 8000))})
    run(open_checkpoint(folder / "in"), recipe, folder / "sensitive", RunOptions())
    return folder / "sensitive"


def test_sensitivity_and_the_split_are_drawn(sensitive: Path, tmp_path: Path) -> None:
    numbers = read_numbers(sensitive)
    stats = load_stats(sensitive / STATS_FILE)
    removed = 0
    for layer in numbers.layers:
        points_P2 = stats.layers[layer.layer].sensitivity_P2
        assert points_P2 is not None
        np.testing.assert_array_equal(layer.sensitivity_P2, points_P2)
        taken, loss = chosen(layer)
        assert taken == removed_of(layer) == 8 - len(layer.keep)
        # Between two points the loss is taken to be linear.
        below, above = (
            points_P2[points_P2[:, 0] <= taken][-1],
            points_P2[points_P2[:, 0] >= taken][0],
        )
        along = (taken - below[0]) / max(1, above[0] - below[0])
        expected = below[1] + along * (above[1] - below[1]) - points_P2[0, 1]
        assert loss == pytest.approx(expected)
        removed += taken
    assert removed == 4
    drawn = Page(page(numbers))
    assert "sensitivity" in drawn.ids
    text = " ".join(drawn.text)
    for layer in numbers.layers:
        assert f"{removed_of(layer)} of 8" in text
    points = [dict(attrs)["points"] for tag, attrs in drawn.tags if tag == "polyline"]
    assert len(points) == len(numbers.layers)
    # One scale: the highest point of all layers is at the top.
    heights = [float(pair.split(",")[1]) for line in points for pair in line.split()]
    assert min(heights) == 4.0
    assert [layer["sensitivity"] for layer in as_data(numbers)["layers"]]
    names = {path.name for path in write_figures(numbers, tmp_path)}
    assert "sensitivity.png" in names


def test_the_gain_of_a_real_refit_is_read(sensitive: Path) -> None:
    numbers = read_numbers(sensitive)
    written = {entry["layer"]: entry for entry in _refits(sensitive)}
    assert written
    for layer in numbers.layers:
        assert (layer.refit is not None) == (layer.layer in written)
        if layer.refit is not None:
            entry = written[layer.layer]
            assert layer.refit.ridge == entry["ridge"]
            assert [one.model_dump() for one in layer.refit.sources] == entry["sources"]
    assert "refits" in Page(page(numbers)).ids
    card = (sensitive / "README.md").read_text("utf-8")
    assert "down projections were refitted on the same text" in card


def _refits(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json(folder / "provenance.json")["refit"]
    return found


def test_sensitivity_by_another_rule_is_not_shown(
    sensitive: Path, folder: Path, tmp_path: Path
) -> None:
    """STUN's plan removed experts by another rule than these curves."""
    numbers = read_numbers(folder / "out", [sensitive / STATS_FILE])
    assert all(layer.sensitivity_P2 is None for layer in numbers.layers)
    assert "Sensitivity of layers" in numbers.missing
    assert "sensitivity" not in Page(page(numbers)).ids


def test_coverage_of_each_source_is_drawn(copy: Path, tmp_path: Path) -> None:
    stats = load_stats(copy / STATS_FILE)
    found = read_numbers(copy)
    assert all(layer.coverage == {} for layer in found.layers)
    assert "coverage" not in Page(page(found)).ids
    keep = list(found.layers[0].keep)
    code_E = np.zeros(8)
    code_E[keep[0]] = 3.0
    gone = next(expert for expert in range(8) if expert not in keep)
    code_E[gone] = 1.0
    parts = {
        index: replace(
            LayerStats(),
            **{name: getattr(layer, name) for name in PER_SOURCE},
        )
        for index, layer in stats.layers.items()
    }
    code = {index: replace(layer, routed_E=code_E) for index, layer in parts.items()}
    sources = {"prose": SourceStats(layers=parts), "code": SourceStats(layers=code)}
    named = tmp_path / "named.safetensors"
    save_stats(replace(stats, sources=sources), named)
    (copy / STATS_FILE).unlink()
    numbers = read_numbers(copy, [named])
    assert numbers.layers[0].coverage["code"] == 0.75
    routed_E = stats.layers[0].routed_E
    assert routed_E is not None
    prose = routed_E[keep].sum() / routed_E.sum()
    assert numbers.layers[0].coverage["prose"] == pytest.approx(prose)
    drawn = Page(page(numbers))
    assert "coverage" in drawn.ids
    assert "75.0%" in " ".join(drawn.text)
    assert as_data(numbers)["layers"][0]["coverage"]["code"] == 0.75


def test_what_refitting_gained_is_drawn(copy: Path) -> None:
    path = copy / "provenance.json"
    history = read_json(path)
    history["refit"] = [
        {
            "layer": 0,
            "ridge": 0.3,
            "sources": [
                {"source": "code", "before": 0.25, "after": 0.125},
                {"source": HOSTILE, "before": 0.5, "after": 0.4375},
            ],
        },
        {"layer": 1, "ridge": None, "sources": []},
    ]
    path.write_text(json.dumps(history), "utf-8")
    numbers = read_numbers(copy)
    assert numbers.layers[0].refit is not None
    assert numbers.layers[0].refit.ridge == 0.3
    drawn = Page(page(numbers))
    assert "refits" in drawn.ids
    assert "script" not in drawn.names
    text = " ".join(drawn.text)
    assert "0.1250" in text
    assert HOSTILE in text
    (row,) = [row for row in as_data(numbers)["layers"] if row["layer"] == 0]
    assert row["refit"]["sources"][0]["after"] == 0.125
    history["refit"][0]["sources"][0]["after"] = -1
    path.write_text(json.dumps(history), "utf-8")
    with pytest.raises(CheckpointError, match=r"refit\.0\.sources\.0\.after"):
        read_numbers(copy)
