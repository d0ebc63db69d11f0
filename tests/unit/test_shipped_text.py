"""The text that calibrates where none was named."""

import json
from pathlib import Path

import pytest
import torch

from tests.bad_inputs.case import run_cli
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.data import load_heldout, load_tokens
from vllm_moe_prune.calibrate.shipped import FILES, SHIPPED, fitting, shipped_texts
from vllm_moe_prune.checkpoint.claims import warn_once
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.recipes.calibration import Calibration

FOLDER = Path(shipped_texts()[0].text).parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    return open_checkpoint(tiny_checkpoint(folder, layers=1, max_positions=512))


def test_every_file_has_its_origin_and_licence_beside_it() -> None:
    readme = (FOLDER / "README.md").read_text("utf-8")
    assert "Apache-2.0" in readme
    for path in FOLDER.iterdir():
        assert path.name == "README.md" or f"| `{path.name}` |" in readme
    used = [FOLDER / name for name in FILES.values()]
    assert 200_000 < sum(path.stat().st_size for path in used) < 1_000_000


def test_without_a_text_all_of_the_shipped_one_is_used(checkpoint: Checkpoint) -> None:
    asked = Calibration(samples=4000, sequence_length=128, heldout=20)
    tokens, heldout = load_tokens(checkpoint, asked), load_heldout(checkpoint, asked)
    assert tokens.names == heldout.names == tuple(FILES)
    assert len(heldout.ids_ST) == 20
    for part, apart in zip(tokens.parts, heldout.parts, strict=True):
        # All that is not kept apart, and nothing twice.
        assert part.samples == min(800, part.windows - apart.samples)
        assert part.source == SHIPPED
    one = {tuple(row) for row in tokens.ids_ST.tolist()}
    assert not one & {tuple(row) for row in heldout.ids_ST.tolist()}
    assert tokens.describe()["source"] == SHIPPED


@pytest.mark.parametrize("samples", [1, 3, 5])
def test_few_windows_are_of_as_many_sources(
    checkpoint: Checkpoint, samples: int
) -> None:
    tokens = load_tokens(checkpoint, Calibration(samples=samples, sequence_length=64))
    assert tokens.names == tuple(FILES)[:samples]
    assert torch.bincount(tokens.source_S).tolist() == [1] * samples


@pytest.mark.parametrize("windows", range(2, 40))
def test_windows_are_shared_between_both_uses(windows: int) -> None:
    for samples, heldout in ((1, 1), (26, 4), (1000, 1000)):
        used, apart = fitting(windows, samples, heldout)
        assert 1 <= used <= samples
        assert 1 <= apart <= min(heldout, max(1, windows // 5))
        assert used + apart <= windows


def test_a_run_without_a_text_says_so_everywhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "ckpt", layers=1, experts=4, hidden=32, width=48)
    flags = "--experts score --criterion frequency --drop 0.25 --slim none"
    warn_once.cache_clear()
    done = run_cli(
        f"run ckpt out --recipe expert-drop {flags} --samples 5 --sequence-length 16 "
        "--json",
        monkeypatch,
        capsys,
    )
    assert done.status == 0, done.stderr
    said = [one for one in caplog.messages if one.startswith("no --calibration")]
    assert len(said) == 1
    assert "\n" not in said[0]
    assert f"| source | {SHIPPED} |" in Path("out/README.md").read_text()
    decided = json.loads(Path("out/plan.json").read_text())
    assert decided["measurement"]["calibration"]["source"] == SHIPPED
    assert [*decided["measurement"]["coverage"]] == [*FILES]
