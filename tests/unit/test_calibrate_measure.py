"""What measure counts, against naive recounts; its forward passes, resume, memory."""

import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import MixtralForCausalLM

from tests.killing import Killed, at_layer
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.archs import find_arch
from vllm_moe_prune.calibrate import boundary, distances
from vllm_moe_prune.calibrate.accumulate import measure
from vllm_moe_prune.calibrate.boundary import BoundaryStore
from vllm_moe_prune.calibrate.data import Tokens, sha256_of
from vllm_moe_prune.calibrate.stats import LayerStats, Stats
from vllm_moe_prune.calibrate.stats_file import load_stats, save_stats
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_expert, read_router
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import CheckpointError, OutputError, PlanError
from vllm_moe_prune.progress import Progress

LAYOUTS = [layout.name for layout in find_arch("mixtral", "test").layouts]


def some_tokens(samples: int = 4, length: int = 48, seed: int = 1) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    ids_ST = torch.randint(3, 512, (samples, length), generator=generator)
    return Tokens(ids_ST=ids_ST, source="random", sha256=sha256_of(ids_ST))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    return open_checkpoint(tiny_checkpoint(folder, dtype="float32", tokenizer=False))


def same(one: Stats, two: Stats) -> bool:
    assert one.layers.keys() == two.layers.keys()
    for index, layer in one.layers.items():
        for item in fields(LayerStats):
            mine, yours = (
                getattr(side, item.name) for side in (layer, two.layers[index])
            )
            assert (mine is None) == (yours is None), item.name
            if mine is not None:
                np.testing.assert_array_equal(mine, yours, err_msg=item.name)
    return (one.forward_passes, one.calibration, one.fingerprint) == (
        two.forward_passes,
        two.calibration,
        two.fingerprint,
    )


@torch.no_grad()
def recount(checkpoint: Checkpoint, tokens: Tokens, top_k: int) -> list[np.ndarray]:
    """Co-activation from the router logits of transformers, token by token."""
    model = MixtralForCausalLM.from_pretrained(
        checkpoint.folder, dtype="float32", experts_implementation="eager"
    )
    output = model.eval()(tokens.ids_ST, output_router_logits=True)
    counts = []
    for logits_NE in output.router_logits:
        pairs = np.zeros((logits_NE.shape[1],) * 2)
        for token in logits_NE.topk(top_k).indices.tolist():
            for one in token:
                for two in token:
                    pairs[one, two] += 1
        counts.append(pairs)
    return counts


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_coactivation_equals_a_recount_from_the_logits_of_transformers(
    tmp_path: Path, top_k: int
) -> None:
    folder = tiny_checkpoint(
        tmp_path, dtype="float32", layers=3, top_k=top_k, tokenizer=False
    )
    checkpoint, tokens = open_checkpoint(folder), some_tokens()
    stats = measure(checkpoint, weights=False, tokens=tokens)
    for index, pairs_EE in enumerate(recount(checkpoint, tokens, top_k)):
        layer = stats.layers[index]
        assert layer.tokens == tokens.ids_ST.numel()
        np.testing.assert_array_equal(layer.routed_E, pairs_EE.diagonal())
        np.fill_diagonal(pairs_EE, 0)
        np.testing.assert_array_equal(layer.coactivation_EE, pairs_EE)
        assert layer.routed_E is not None
        assert layer.routed_E.sum() == top_k * tokens.ids_ST.numel()


def naive_sqdist(rows: list[torch.Tensor]) -> np.ndarray:
    flat = torch.stack([row.flatten() for row in rows]).double()
    return (flat[:, None] - flat[None]).square().sum(-1).numpy()


def concatenated(checkpoint: Checkpoint, layer: int) -> list[torch.Tensor]:
    view = checkpoint.layers[layer]
    return [
        torch.cat(
            [matrix.flatten() for matrix in read_expert(checkpoint, view, number)]
        )
        for number in range(view.num_experts)
    ]


def nonzero(weights: torch.Tensor) -> torch.Tensor:
    return weights[weights != 0].double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_distances_equal_the_definition(
    tmp_path: Path, layout: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several chunks of each matrix, the last one shorter.
    monkeypatch.setattr(distances, "CHUNK_BYTES", 4 * 4096 * 4)
    folder = tiny_checkpoint(
        tmp_path, layout=layout, dtype=dtype, layers=2, experts=4, tokenizer=False
    )
    checkpoint = open_checkpoint(folder)
    stats = measure(checkpoint)
    for index, layer in stats.layers.items():
        weights_EE = naive_sqdist(concatenated(checkpoint, index))
        assert layer.weight_sqdist_EE is not None
        assert layer.router_sqdist_EE is not None
        np.testing.assert_allclose(layer.weight_sqdist_EE, weights_EE, rtol=1e-5)
        router_ED = read_router(checkpoint, checkpoint.layers[index])
        np.testing.assert_allclose(
            layer.router_sqdist_EE, naive_sqdist(list(router_ED)), rtol=1e-12
        )
        assert layer.router_norm == pytest.approx(float(router_ED.double().norm()))
        powers_E5 = [
            [float((weights**power).sum()) for power in range(5)]
            for weights in map(nonzero, concatenated(checkpoint, index))
        ]
        assert layer.weight_powers_E5 is not None
        np.testing.assert_allclose(layer.weight_powers_E5, powers_E5, rtol=1e-9)
        for matrix in (layer.weight_sqdist_EE, layer.router_sqdist_EE):
            np.testing.assert_array_equal(matrix, matrix.T)
            assert (matrix.diagonal() == 0).all()
            assert (matrix >= 0).all()


def test_resembling_experts_are_near(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, clusters=4, layers=1, tokenizer=False)
    layer = measure(open_checkpoint(folder)).layers[0]
    for sqdist_EE in (layer.router_sqdist_EE, layer.weight_sqdist_EE):
        assert sqdist_EE is not None
        np.fill_diagonal(sqdist_EE, np.inf)
        expected = [(expert + 4) % 8 for expert in range(8)]
        assert sqdist_EE.argmin(axis=1).tolist() == expected


@pytest.mark.parametrize("experts", [4, 8, 32])
def test_forward_passes_do_not_depend_on_the_number_of_experts(
    tmp_path: Path, experts: int
) -> None:
    folder = tiny_checkpoint(
        tmp_path, experts=experts, layers=3, width=32, tokenizer=False
    )
    checkpoint = open_checkpoint(folder)
    assert measure(checkpoint).forward_passes == 0
    tokens = some_tokens()
    stats = measure(checkpoint, tokens=tokens)
    assert stats.forward_passes == 1
    assert stats.calibration == tokens.describe()


def test_only_what_is_asked_for_is_measured(checkpoint: Checkpoint) -> None:
    layer = measure(checkpoint, weights=False).layers[0]
    assert layer.router_norm is not None
    assert layer.weight_sqdist_EE is None
    assert layer.coactivation_EE is None
    layer = measure(checkpoint, router=False, weights=False).layers[0]
    assert layer == LayerStats()


def test_repeating_gives_the_same_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokens = some_tokens()
    for name in ("one", "two"):
        save_stats(measure(checkpoint, tokens=tokens), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert same(load_stats(tmp_path / "one"), measure(checkpoint, tokens=tokens))


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"moe_prune_stats": "0"}],
)
def test_a_file_that_is_not_of_this_format_is_refused(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    save_file({"x": np.zeros(1)}, tmp_path / "stats", metadata=metadata)
    with pytest.raises(PlanError, match="not a statistics file of format 2"):
        load_stats(tmp_path / "stats")


@pytest.fixture
def save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not skip boundaries that come soon after the last."""
    monkeypatch.setattr(boundary, "MAX_OVERHEAD", float("inf"))


@pytest.mark.usefixtures("save_always")
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_killed_measure_continues_with_the_same_result(
    checkpoint: Checkpoint, tmp_path: Path, after: int
) -> None:
    tokens, work = some_tokens(), tmp_path / "work"
    undisturbed = measure(checkpoint, tokens=tokens)
    with pytest.raises(Killed):
        measure(checkpoint, tokens=tokens, work=work, report=at_layer(after))
    # Only the newest boundary is kept.
    assert sorted(path.name for path in work.iterdir()) == [
        f"hidden-{after:05d}.safetensors",
        f"stats-{after:05d}.safetensors",
    ]
    layers: list[int] = []
    resumed = measure(
        checkpoint,
        tokens=tokens,
        work=work,
        report=lambda progress: layers.append(progress.layer),
    )
    assert layers == list(range(after + 1, 5))
    assert same(resumed, undisturbed)
    assert not list(work.iterdir())


@pytest.mark.usefixtures("save_always")
def test_a_killed_measure_without_data_continues(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        measure(checkpoint, work=tmp_path / "work", report=at_layer(2))
    resumed = measure(checkpoint, work=tmp_path / "work")
    assert same(resumed, measure(checkpoint))


@pytest.mark.usefixtures("save_always")
def test_the_work_of_another_run_is_refused(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    with pytest.raises(Killed):
        measure(checkpoint, tokens=some_tokens(), work=work, report=at_layer(2))
    with pytest.raises(OutputError, match="belongs to a run of another"):
        measure(checkpoint, tokens=some_tokens(seed=2), work=work)
    # The same bytes, as far as a fingerprint tells, but written since.
    touched = open_checkpoint(shutil.copytree(checkpoint.folder, tmp_path / "copy"))
    assert touched.fingerprint == checkpoint.fingerprint
    with pytest.raises(OutputError, match="changed or copied since"):
        measure(touched, tokens=some_tokens(), work=work)


def test_progress_ends_at_the_total(checkpoint: Checkpoint) -> None:
    seen: list[Progress] = []
    measure(checkpoint, report=seen.append)
    assert [progress.layer for progress in seen] == [1, 2, 3, 4]
    assert {progress.stage for progress in seen} == {"measure"}
    assert seen[-1].bytes_done == seen[-1].bytes_total
    assert seen[0].bytes_done == seen[0].bytes_total / 4


@pytest.mark.parametrize("layout", ["block_sparse_moe.w1w2w3", "mlp.packed"])
def test_damaged_weights_are_found_and_named(tmp_path: Path, layout: str) -> None:
    folder = tiny_checkpoint(
        tmp_path, layout=layout, shards=1, dtype="float32", layers=2, tokenizer=False
    )
    checkpoint = open_checkpoint(folder)
    rule = checkpoint.layout.experts[-1]
    info = checkpoint.tensors[rule.name(1, 5)]
    at = info.offset if rule.per_expert else info.offset + 5 * info.row_bytes
    with info.file.open("r+b") as file:
        file.seek(at + 40)
        file.write(b"\x00\x00\xc0\x7f")  # NaN
    with pytest.raises(CheckpointError, match=r"layer 1: NaN .* of experts \[5\]"):
        measure(checkpoint)


def test_a_redirecting_checkpoint_is_refused(checkpoint: Checkpoint) -> None:
    layers = [replace(layer, redirect=tuple(range(8))) for layer in checkpoint.layers]
    redirecting = replace(checkpoint, layers=tuple(layers))
    with pytest.raises(CheckpointError, match="cut the original instead"):
        measure(redirecting)


def test_boundaries_load_the_newest_that_is_not_too_new(tmp_path: Path) -> None:
    store = BoundaryStore(tmp_path / "work", "key", overhead=float("inf"))
    assert store.load((2, 3, 4)) is None
    hidden = {layer: torch.randn(2, 3, 4).bfloat16() for layer in (1, 2, 4)}
    for layer, hidden_STD in hidden.items():
        store.save(layer, hidden_STD)
    for limit, expected in ((None, 4), (3, 2), (2, 2), (1, 1)):
        found = store.load((2, 3, 4), limit)
        assert found is not None
        assert found[0] == expected
        assert torch.equal(found[1], hidden[expected])
    assert store.load((2, 3, 4), 0) is None
    store.keep_from(3)
    assert store.load((2, 3, 4), 1) is None
    assert store.load((2, 3, 4), 3) is not None
    store.keep_from(0)
    assert store.load((2, 3, 4), 3) is not None
    store.clear()
    assert not list(store.folder.iterdir())
    store.clear()


def test_saving_takes_a_bounded_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 101.0, 105.0, 112.0, 113.0])
    monkeypatch.setattr(boundary.time, "monotonic", lambda: next(clock))
    store = BoundaryStore(tmp_path, "key", overhead=0.1)
    for layer in (1, 2, 3):
        store.save(layer, torch.ones(1, 2, 2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["hidden-00001.safetensors", "hidden-00003.safetensors"]


@pytest.mark.parametrize("size", [0, 20, 120])
def test_a_damaged_boundary_is_refused(tmp_path: Path, size: int) -> None:
    store = BoundaryStore(tmp_path, "key")
    store.save(3, torch.ones(1, 2, 200))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(OutputError, match="damaged"):
        store.load((1, 2, 200))


@pytest.mark.parametrize(
    ("hidden_STD", "says"),
    [
        (torch.ones(2, 2, 4), r"have shape \[2, 2, 4\], those of this run \[1, 2, 4\]"),
        (torch.ones(1, 3, 4), "have shape"),
        (torch.ones(1, 2), "have shape"),
        (torch.full((1, 2, 4), float("nan")), "not finite"),
        (torch.full((1, 2, 4), float("inf")).bfloat16(), "not finite"),
        (torch.ones(1, 2, 4).int(), "no hidden states"),
    ],
)
def test_hidden_states_of_something_else_are_refused(
    tmp_path: Path, hidden_STD: torch.Tensor, says: str
) -> None:
    store = BoundaryStore(tmp_path, "key")
    store.save(3, hidden_STD)
    with pytest.raises(OutputError, match=says):
        store.load((1, 2, 4))


def test_a_full_disk_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BoundaryStore, "_write", full)
    with pytest.raises(OutputError, match="layer 2: No space left on device"):
        BoundaryStore(tmp_path, "key").save(2, torch.ones(1, 2, 2))


PEAK = """
import sys
from pathlib import Path
from tests.unit.test_calibrate_measure import some_tokens
from vllm_moe_prune.calibrate.accumulate import measure
from vllm_moe_prune.checkpoint.source import open_checkpoint
measure(open_checkpoint(Path(sys.argv[1])), tokens=some_tokens())
# Not getrusage: its maximum is that of the parent process at first.
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    peaks_kib = {}
    for layers in (2, 12):
        folder = tiny_checkpoint(
            tmp_path / str(layers),
            layers=layers,
            experts=2,
            hidden=256,
            width=8192,
            tokenizer=False,
        )
        command = [sys.executable, "-c", PEAK, str(folder)]
        root = Path(__file__).parents[2]
        output = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=root
        )
        peaks_kib[layers] = int(output.stdout)
    layer_kib = 2 * 3 * 256 * 8192 * 2 // 1024
    # Ten more layers weigh ten times that; what the allocator wastes is less than two.
    assert peaks_kib[12] - peaks_kib[2] < 2 * layer_kib
