"""Several named sources of calibration text, each with a weight."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bad_inputs.case import run_cli
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.calibrate.data import load_heldout, load_tokens
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.errors import CalibrationError, RecipeError
from vllm_moe_prune.recipes.calibration import (
    Calibration,
    NamedText,
    parse_text,
    parse_texts,
    with_texts,
)
from vllm_moe_prune.recipes.flags import with_overrides
from vllm_moe_prune.recipes.loading import load_recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    return open_checkpoint(tiny_checkpoint(folder, layers=1, max_positions=256))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three texts that share no word."""
    folder = tmp_path_factory.mktemp("texts")
    words = {"code": "def x", "chat": "hello ", "maths": "1 + 2 "}
    for name, word in words.items():
        (folder / f"{name}.txt").write_text(word * 4000)
    return {name: str(folder / f"{name}.txt") for name in words}


def asking(source: Any, **options: Any) -> Calibration:
    return Calibration(
        **{"source": source, "samples": 8, "sequence_length": 32, "heldout": 4}
        | options
    )


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("text.txt", NamedText("", "text.txt")),
        ("code=a=b.txt", NamedText("code", "a=b.txt")),
        ("chat:0.5=hub:own/er:test", NamedText("chat", "hub:own/er:test", 0.5)),
        ("./a=b.txt", NamedText("", "./a=b.txt")),
        ("hub:owner/name", NamedText("", "hub:owner/name")),
        ("hub:owner/na=me", NamedText("", "hub:owner/na=me")),
        ("two words=x", NamedText("", "two words=x")),
    ],
)
def test_a_source_is_spelled_name_weight_text(
    spelled: str, expected: NamedText
) -> None:
    assert parse_text(spelled) == expected


@pytest.mark.parametrize("weight", ["", "x", "0", "-1", "nan", "inf", "1e7"])
def test_a_weight_is_a_positive_number(weight: str) -> None:
    with pytest.raises(RecipeError, match="is no weight; write NAME:WEIGHT=FILE"):
        parse_text(f"code:{weight}=a.txt")


def test_of_several_each_has_a_name_of_its_own() -> None:
    assert parse_texts(["a.txt"], "--calibration") == "a.txt"
    with pytest.raises(RecipeError, match=r"b.txt: of several sources each needs"):
        parse_texts(["code=a.txt", "b.txt"], "--calibration")
    with pytest.raises(RecipeError, match=r"code is there twice"):
        parse_texts(["code=a.txt", "code=b.txt"], "--calibration")
    recipe = with_overrides(
        load_recipe("stun40-paper"), {"calibration": ["code:2=a.txt", "chat=b.txt"]}
    )
    assert recipe.calibration.texts == (
        NamedText("code", "a.txt", 2.0),
        NamedText("chat", "b.txt", 1.0),
    )


def test_windows_carry_their_source_and_are_mixed(
    checkpoint: Checkpoint, texts: dict[str, str]
) -> None:
    source = {
        "code": {"text": texts["code"], "weight": 2.0},
        "chat": {"text": texts["chat"]},
        "maths": {"text": texts["maths"]},
    }
    tokens = load_tokens(checkpoint, asking(source))
    assert tokens.names == ("code", "chat", "maths")
    assert tokens.source_S.dtype == torch.int64
    assert tokens.source_S.tolist() == [0, 1, 2, 0, 0, 1, 2, 0]
    for at, name in enumerate(tokens.names):
        own = {
            tuple(row)
            for seed in range(9)
            for row in load_tokens(
                checkpoint, asking(texts[name], samples=8, seed=seed)
            ).ids_ST.tolist()
        }
        rows = tokens.ids_ST[tokens.source_S == at].tolist()
        assert all(tuple(row) in own for row in rows)
    told = tokens.describe()["sources"]
    assert [(one["name"], one["source"], one["samples"]) for one in told] == [
        ("code", "code.txt", 4),
        ("chat", "chat.txt", 2),
        ("maths", "maths.txt", 2),
    ]


def test_one_source_gives_the_same_windows_with_and_without_a_name(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = str(tiny_text(tmp_path, 20_000))
    plain = load_tokens(checkpoint, asking(path))
    named = load_tokens(checkpoint, asking({"only": {"text": path}}))
    assert torch.equal(plain.ids_ST, named.ids_ST)
    assert plain.source_S.tolist() == named.source_S.tolist() == [0] * 8
    assert (plain.names, named.names) == ((), ("only",))


def test_held_out_windows_are_of_every_source_and_calibrate_nothing(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        source[f"s{seed}"] = {"text": str(tiny_text(folder, 20_000 + seed))}
    asked = asking(source)
    tokens, heldout = load_tokens(checkpoint, asked), load_heldout(checkpoint, asked)
    assert heldout.source_S.tolist() == [0, 1, 0, 1]
    one = {tuple(row) for row in tokens.ids_ST.tolist()}
    assert not one & {tuple(row) for row in heldout.ids_ST.tolist()}
    own = asked.model_copy(update={"heldout_source": source["s0"]["text"]})
    assert load_heldout(checkpoint, own).names == ()


def test_the_partition_is_part_of_the_hash(
    checkpoint: Checkpoint, texts: dict[str, str]
) -> None:
    both = {name: {"text": texts["code"]} for name in ("a", "b")}
    swapped = {name: {"text": texts["code"]} for name in ("b", "a")}
    one, two = (load_tokens(checkpoint, asking(source)) for source in (both, swapped))
    assert torch.equal(one.ids_ST, two.ids_ST)
    assert one.sha256 != two.sha256


@pytest.mark.parametrize("weight", [1e-3, 1.0, 1e3])
def test_every_source_gets_a_window(
    checkpoint: Checkpoint, texts: dict[str, str], weight: float
) -> None:
    source = {
        "code": {"text": texts["code"], "weight": weight},
        "chat": {"text": texts["chat"]},
    }
    tokens = load_tokens(checkpoint, asking(source, samples=7))
    counts = torch.bincount(tokens.source_S).tolist()
    share = 7 * weight / (weight + 1)
    assert sum(counts) == 7
    assert abs(counts[0] - min(6, max(1, share))) < 1


def test_too_few_windows_or_too_little_text_is_told_of_the_source(
    checkpoint: Checkpoint, texts: dict[str, str], tmp_path: Path
) -> None:
    source = {name: {"text": text} for name, text in texts.items()}
    with pytest.raises(CalibrationError, match="--samples 2: is less than one window"):
        load_tokens(checkpoint, asking(source, samples=2))
    short = tmp_path / "short.txt"
    short.write_text("few words")
    source["code"] = {"text": str(short)}
    with pytest.raises(CalibrationError, match=r"short.txt: gives 0 windows"):
        load_tokens(checkpoint, asking(source))


def test_texts_are_renamed_whatever_their_form() -> None:
    sources = parse_texts(["code:3=/home/me/a.txt", "chat=hub:o/n"], "--calibration")
    renamed = with_texts(sources, str.upper)
    assert with_texts("a.txt", str.upper) == "A.TXT"
    assert with_texts(None, str.upper) is None
    assert Calibration(source=renamed).texts == (
        NamedText("code", "/HOME/ME/A.TXT", 3.0),
        NamedText("chat", "HUB:O/N"),
    )


def test_outputs_do_not_tell_where_texts_lie(
    tmp_path: Path,
    texts: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Plan, recipe and provenance name files without their folders."""
    folder = tiny_checkpoint(tmp_path / "ckpt", layers=1, experts=4)
    given = [f"--calibration {name}={text}" for name, text in texts.items()]
    command = f"run {folder} {tmp_path}/out --recipe {tmp_path}/own.yaml"
    (tmp_path / "own.yaml").write_text(
        "experts: {method: score, criterion: frequency, drop: 0.25}\n"
        "slim: {method: none}\n"
        "calibration: {samples: 3, sequence_length: 16, "
        f"heldout_source: {texts['code']}}}\n"
    )
    assert run_cli(" ".join([command, *given]), monkeypatch, capsys).status == 0
    for name in ("plan.json", "moe_prune.yaml", "provenance.json"):
        content = (tmp_path / "out" / name).read_text()
        assert "maths.txt" in content
        assert str(Path(texts["code"]).parent) not in content
