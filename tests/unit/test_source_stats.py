"""Statistics kept for each source of the text."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.killing import Killed, at_layer
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate import accumulate, routed
from vllm_moe_prune.calibrate.accumulate import measure
from vllm_moe_prune.calibrate.boundary import BoundaryStore
from vllm_moe_prune.calibrate.data import Part, Tokens, sha256_of
from vllm_moe_prune.calibrate.stats import PER_SOURCE, LayerStats, Stats
from vllm_moe_prune.calibrate.stats_file import MODEL_ARRAYS, load_stats, save_stats
from vllm_moe_prune.checkpoint.index import read_header
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import PlanError

NAMES = ("code", "chat", "maths")
COUNTS = (3, 1, 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    return open_checkpoint(
        tiny_checkpoint(folder, layers=3, experts=4, dtype="float32", tokenizer=False)
    )


def some_tokens() -> Tokens:
    ids = torch.randint(4, 500, (6, 11), generator=torch.Generator().manual_seed(1))
    parts = tuple(
        Part(name=name, source=f"{name}.txt", samples=count, windows=9)
        for name, count in zip(NAMES, COUNTS, strict=True)
    )
    return Tokens(ids_ST=ids, source="random", sha256=sha256_of(ids), parts=parts)


@pytest.fixture(scope="module")
def stats(checkpoint: Checkpoint) -> Stats:
    return measure(checkpoint, tokens=some_tokens(), fields=routed.FIELDS)


def close(one: Any, two: Any) -> None:
    for item in fields(LayerStats):
        mine, yours = getattr(one, item.name), getattr(two, item.name)
        assert (mine is None) == (yours is None), item.name
        if mine is not None:
            np.testing.assert_allclose(mine, yours, 1e-4, 1e-5, err_msg=item.name)


@pytest.mark.parametrize("at", range(3))
def test_each_source_has_the_statistics_of_its_own_windows(
    checkpoint: Checkpoint, stats: Stats, at: int
) -> None:
    """The reference: a measurement of nothing but those windows."""
    tokens = some_tokens()
    ids = tokens.ids_ST[tokens.source_S == at]
    assert len(ids) == COUNTS[at]
    own = Tokens(ids_ST=ids, source="own", sha256=sha256_of(ids))
    # Those of outputs are of all sources together.
    asked = routed.FIELDS - routed.OUTPUT_SUMS
    alone = measure(checkpoint, router=False, weights=False, tokens=own, fields=asked)
    found = stats.sources[NAMES[at]]
    for index, layer in alone.layers.items():
        close(found.layers[index], layer)
    for name in MODEL_ARRAYS:
        one, two = getattr(found, name), getattr(alone, name)
        np.testing.assert_allclose(one, two, rtol=1e-4)


def test_the_sources_make_up_what_is_measured_without_names(
    checkpoint: Checkpoint, stats: Stats
) -> None:
    plain = measure(
        checkpoint, tokens=replace(some_tokens(), parts=()), fields=routed.FIELDS
    )
    assert plain.sources == {}
    for index, layer in plain.layers.items():
        close(stats.layers[index], layer)
        np.testing.assert_array_equal(
            stats.layers[index].coactivation_EE, layer.coactivation_EE
        )
    np.testing.assert_array_equal(stats.block_cosine_HH, plain.block_cosine_HH)


def equal(one: Stats, two: Stats) -> None:
    pairs = [(one.layers, two.layers)]
    assert [*one.sources] == [*two.sources]
    pairs += [(one.sources[at].layers, two.sources[at].layers) for at in one.sources]
    for mine, yours in pairs:
        assert mine.keys() == yours.keys()
        for index, layer in mine.items():
            for item in fields(LayerStats):
                np.testing.assert_array_equal(
                    getattr(layer, item.name), getattr(yours[index], item.name)
                )


def test_a_file_gives_back_what_was_measured_to_the_bit(
    stats: Stats, tmp_path: Path
) -> None:
    save_stats(stats, tmp_path / "stats")
    equal(load_stats(tmp_path / "stats"), stats)
    again = load_stats(tmp_path / "stats")
    save_stats(again, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "stats").read_bytes()


def test_parts_measured_elsewhere_add_up(checkpoint: Checkpoint, stats: Stats) -> None:
    twice = stats + stats
    for name, source in stats.sources.items():
        for index, layer in source.layers.items():
            both = twice.sources[name].layers[index]
            np.testing.assert_array_equal(both.routed_E, 2 * layer.routed_E)
            np.testing.assert_array_equal(both.activation_max_E, layer.activation_max_E)
    with pytest.raises(PlanError, match="both name their sources"):
        stats + replace(stats, sources={})


def test_a_killed_measurement_continues_with_every_source(
    checkpoint: Checkpoint,
    stats: Stats,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        accumulate,
        "BoundaryStore",
        lambda folder, key: BoundaryStore(folder, key, overhead=float("inf")),
    )

    options: dict[str, Any] = {
        "tokens": some_tokens(),
        "fields": routed.FIELDS - routed.BLOCKS,
        "work": tmp_path / "work",
    }
    with pytest.raises(Killed):
        measure(checkpoint, report=at_layer(2), **options)
    equal(measure(checkpoint, **options), stats)


def rewritten(path: Path, change: Any) -> None:
    tensors, metadata = load_file(path), dict(read_header(path).metadata)
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def test_a_file_of_the_earlier_version_is_read(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    plain = measure(checkpoint, tokens=replace(some_tokens(), parts=()))
    path = tmp_path / "stats"
    save_stats(plain, path)

    def earlier(tensors: Any, metadata: dict[str, str]) -> None:
        del metadata["sources"]
        metadata["moe_prune_stats"] = "1"

    rewritten(path, earlier)
    equal(load_stats(path), plain)


def test_damaged_sources_are_refused(stats: Stats, tmp_path: Path) -> None:
    def renamed(old: str, new: str) -> Any:
        return lambda tensors, _: tensors.update({new: tensors.pop(old)})

    def told(**metadata: str) -> Any:
        return lambda _, known: known.update(metadata)

    count = "sources.code.layers.0.routed_E"
    changes = {
        "is not of every source": lambda tensors, _: tensors.pop(count),
        "'other'": renamed(count, "sources.other.layers.0.routed_E"),
        "routed_E is not of every source": renamed(count, "layers.0.routed_E"),
        "router_norm is of no source": renamed(
            "layers.0.router_norm", "sources.code.layers.0.router_norm"
        ),
        "contains -1": lambda tensors, _: tensors[count].fill(-1),
        "'a.b' is no source": told(sources='["a.b"]'),
        "or is there twice": told(sources='["code", "code"]'),
        "no short list": told(sources='{"code": 1}'),
        "routed_E has shape [3], but": lambda tensors, _: tensors.update(
            {count: np.zeros(3)}
        ),
    }
    for says, change in changes.items():
        path = tmp_path / "stats"
        save_stats(stats, path)
        rewritten(path, change)
        with pytest.raises(PlanError, match="damaged statistics file") as raised:
            load_stats(path)
        assert says in str(raised.value)


def test_every_quantity_of_a_pass_is_kept_for_each_source(stats: Stats) -> None:
    measured = {
        item.name
        for item in fields(LayerStats)
        if getattr(stats.layers[0], item.name) is not None
    }
    data_free = {name for name in measured if name.startswith(("router_", "weight_"))}
    assert measured - data_free == PER_SOURCE | routed.OUTPUT_SUMS
