"""Every byte that statistics are of is compared when a plan made from them is cut."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bad_inputs.case import run_cli
from tests.families import LAYOUTS
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.calibrate.accumulate import measure
from vllm_moe_prune.calibrate.stats_file import load_stats, save_stats
from vllm_moe_prune.checkpoint.layer_hashes import (
    EMBEDDING,
    WeightHashes,
    check_layer,
    layer_hashes,
)
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError, PlanError


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def hashes(folder: Path) -> WeightHashes:
    checkpoint = open_checkpoint(folder)
    indices = [None, *range(len(checkpoint.layers))]
    return {
        EMBEDDING if index is None else str(index): tuple(
            layer_hashes(checkpoint, index).values()
        )
        for index in indices
    }


@pytest.mark.parametrize("layout", ["mlp.packed", *LAYOUTS])
def test_a_bit_of_any_tensor_or_expert_changes_one_hash(
    tmp_path: Path, layout: str
) -> None:
    kind = {"layout": layout} if layout not in LAYOUTS else {"model_type": layout}
    folder = tiny_checkpoint(tmp_path / "m", layers=2, tokenizer=False, **kind)
    checkpoint = open_checkpoint(folder)
    before = hashes(folder)
    for name in sorted(checkpoint.stored_names):
        info = checkpoint.stored(name)
        packed = len(info.shape) == 3
        for expert in range(info.shape[0] if packed else 1):
            at = info.offset + expert * info.row_bytes + 5
            flip(info.file, at)
            after = hashes(folder)
            flip(info.file, at)
            changed = [
                (key, place)
                for key, found in after.items()
                for place, one in enumerate(found)
                if one != before[key][place]
            ]
            layer = checkpoint.arch.layer_of(name)
            if layer is None and name != checkpoint.arch.embedding:
                assert not changed  # nothing that measuring reads
                continue
            inner = name.partition(".experts.")[2].partition(".")[0]
            place = 1 + (expert if packed else int(inner)) if packed or inner else 0
            assert changed == [(EMBEDDING if layer is None else str(layer), place)], (
                name
            )


def test_other_shards_and_a_layer_without_zeros_have_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = tiny_checkpoint(tmp_path / "one", shards=1, tokenizer=False)
    three = tiny_checkpoint(tmp_path / "three", shards=3, tokenizer=False)
    assert hashes(one) == hashes(three)
    command = f"convert {one} {tmp_path / 'c'} --layout bitmask"
    assert run_cli(command, monkeypatch, capsys).status == 0
    assert hashes(tmp_path / "c") == hashes(one)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More than 64 MiB, so that its fingerprint is of samples."""
    folder = tmp_path_factory.mktemp("large") / "model"
    return tiny_checkpoint(folder, layers=2, hidden=512, width=1536, heads=8)


def test_a_cut_refuses_weights_that_were_not_measured(
    large: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tiny_text(tmp_path, 20_000)
    stats, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    recipe = ["--recipe", "expert-drop"]
    asked = ["--calibration", str(text), "--samples", "2", "--sequence-length", "32"]
    for arguments in (
        ["measure", str(large), *recipe, *asked, "-o", str(stats)],
        ["plan", str(large), *recipe, "--stats", str(stats), "-o", str(plan)],
    ):
        assert run_cli(" ".join(arguments), monkeypatch, capsys).status == 0
    checkpoint = open_checkpoint(large)
    kept = load_plan(plan).layers[1].keep
    removed = next(one for one in range(8) if one not in kept)
    prefix = "model.layers.1."
    expert = prefix + "block_sparse_moe.experts.{}.w2.weight"
    out = tmp_path / "out"
    for name, said in (
        (expert.format(kept[0]), f"layer 1: expert {kept[0]} is not what"),
        (
            prefix + "self_attn.q_proj.weight",
            "layer 1: a weight outside its experts is not what",
        ),
        ("model.embed_tokens.weight", "embedding is not what"),
        (expert.format(removed), None),
    ):
        info = checkpoint.tensors[name]
        # Behind the first block of 4 KiB, and long before the next.
        flip(info.file, info.offset + 4097)
        assert open_checkpoint(large).fingerprint == checkpoint.fingerprint
        ran = run_cli(
            f"cut {large} --plan {plan} -o {out} --overwrite", monkeypatch, capsys
        )
        assert ran.status == (2 if said else 0), ran.stderr
        assert said is None or said in " ".join(ran.stderr.split())
        assert out.exists() == (said is None)
        flip(info.file, info.offset + 4097)


def test_hashes_are_kept_with_statistics_and_parts_of_two_states_do_not_add(
    tmp_path: Path,
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "m", tokenizer=False))
    stats = measure(checkpoint)
    read = hashes(tmp_path / "m")
    # Weights alone were asked for.
    assert stats.weight_hashes == {key: read[key] for key in read if key != EMBEDDING}
    save_stats(stats, tmp_path / "s.safetensors")
    assert load_stats(tmp_path / "s.safetensors").weight_hashes == stats.weight_hashes
    other = replace(stats, weight_hashes={**stats.weight_hashes, "0": ("0" * 16,)})
    with pytest.raises(PlanError, match="layer 0 is not the same"):
        stats + other
    save_stats(replace(stats, weight_hashes={"x": ()}), tmp_path / "bad.safetensors")
    with pytest.raises(PlanError, match="damaged statistics file"):
        load_stats(tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="layer 0: expert 0 is not"):
        check_layer(checkpoint, {"0": stats.weight_hashes["0"][:1]}, 0, [0])
    # Routers alone are read for this: they are in the fingerprint whole.
    assert measure(checkpoint, weights=False).weight_hashes == {}
