"""Measuring several sources once, planning several mixes of them."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.bad_inputs.case import run_cli
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.stats_file import load_stats

OPTIONS = "--samples 4 --sequence-length 16 --json"
RECIPE = """
experts: {method: score, criterion: total-output, drop: 0.4, budget: sensitivity,
          min_experts: 1, protect: super}
slim: {method: none}
calibration: {heldout: 4}
"""


def test_one_pass_serves_every_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint(tmp_path / "ckpt", layers=2, experts=5, hidden=32, width=48)
    Path("own.yaml").write_text(RECIPE)
    texts = ""
    for name, words in {"code": "def x = ", "chat": "hello, old friend. "}.items():
        Path(f"{name}.txt").write_text(words * 600)
        texts += f" --calibration {name}={name}.txt"

    def ran(command: str) -> dict[str, object]:
        done = run_cli(command, monkeypatch, capsys)
        assert done.status == 0, done.stderr
        return dict(json.loads(done.stdout))

    ran(f"measure ckpt -o stats --recipe own.yaml {OPTIONS}{texts}")
    stats = load_stats(Path("stats"))
    assert [*stats.sources] == ["code", "chat"]
    for index, layer in stats.layers.items():
        parts = [source.layers[index] for source in stats.sources.values()]
        curves = [part.sensitivity_P2 for part in parts]
        # Two held-out windows each, of as many tokens: the whole's loss is their mean.
        np.testing.assert_allclose(np.mean(curves, axis=0), layer.sensitivity_P2)
        assert not np.array_equal(curves[0], curves[1])
    plan = "plan ckpt --stats stats --recipe own.yaml --json"
    alone = ran(f"{plan} -o code.json --blend code=1")
    even = ran(f"{plan} -o even.json --blend maxmin")
    assert alone["blend"] == {"code": 1.0, "chat": 0.0}
    assert min(even["coverage"].values()) >= min(alone["coverage"].values())
    done = run_cli(f"{plan} -o x.json --blend prose=1", monkeypatch, capsys)
    assert (done.status, "no source prose" in done.stderr) == (2, True)
    assert not Path("x.json").exists()

    # What a run keeps are the statistics as measured, fit for yet another mix.
    way = "--recipe own.yaml --blend chat=1 --budget global"
    ran(f"run ckpt out {way} {OPTIONS}{texts}")
    kept = load_stats(next(Path("out").rglob("stats.safetensors")))
    assert [*kept.sources] == ["code", "chat"]
    decided = json.loads(Path("out/plan.json").read_text())
    assert decided["measurement"]["blend"] == {"code": 0.0, "chat": 1.0}
    assert decided["super_experts"].keys() <= {"0", "1"}
    assert set(decided["measurement"]["coverage"]) == {"code", "chat"}
