"""Recoveries that are killed, and inputs that are odd."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import Trainer

from tests.recovering import MIXTRAL, ask, go, make
from vllm_moe_prune.progress import Progress


@pytest.mark.parametrize(
    ("method", "taught"),
    [
        ("router", False),
        pytest.param("router", True, marks=pytest.mark.slow),
        pytest.param("lora", True, marks=pytest.mark.slow),
        pytest.param("full", False, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_continues_to_the_same_bytes(
    method: str, taught: bool, tmp_path: Path
) -> None:
    original, pruned = make(tmp_path, MIXTRAL)
    by_layer = method == "router" and not taught
    source = original if by_layer or taught else None
    asked = ask(pruned, method, taught=taught, steps=4, learning_rate=1e-3)
    go(tmp_path, pruned, asked, source, "whole")
    steps = 0

    def stop(progress: Progress) -> None:
        nonlocal steps
        steps += progress.counted == "steps"
        # In the second layer, or before the second of the saves that each step makes.
        if steps == (6 if by_layer else 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, pruned, asked, source, "out", report=stop)
    assert not (tmp_path / "out").exists()
    seen: list[Progress] = []
    go(tmp_path, pruned, asked, source, "out", resume=True, report=seen.append)
    if not by_layer:
        done = [one.bytes_done for one in seen if one.counted == "steps"]
        assert done == [1, 2, 3, 4]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert sorted(path.name for path in whole.iterdir()) == sorted(
        path.name for path in out.iterdir()
    )
    for path in whole.iterdir():
        if path.name != "run.json":
            assert path.read_bytes() == (out / path.name).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_killed_while_it_saves_continues_from_the_save_before(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, pruned = make(tmp_path, MIXTRAL)
    asked = ask(pruned, method, steps=4, learning_rate=1e-3)
    go(tmp_path, pruned, asked, None, "whole")
    save = Trainer._save_optimizer_and_scheduler

    def killed(self: Trainer, folder: str) -> None:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        save(self, folder)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", killed)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, pruned, asked, None, "out")
    monkeypatch.undo()
    seen: list[Progress] = []
    go(tmp_path, pruned, asked, None, "out", resume=True, report=seen.append)
    assert [one.bytes_done for one in seen if one.counted == "steps"] == [2, 3, 4]
    whole, out = tmp_path / "whole", tmp_path / "out"
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_experts_that_give_nothing_are_no_division_by_zero(tmp_path: Path) -> None:
    def give_nothing(original: Path) -> None:
        for path in original.glob("*.safetensors"):
            tensors = load_file(path)
            for name, tensor in tensors.items():
                if name.endswith(".w2.weight"):
                    tensor.zero_()
            save_file(tensors, path, metadata={"format": "pt"})

    original, pruned = make(tmp_path, MIXTRAL, change=give_nothing)
    record = go(tmp_path, pruned, ask(pruned, "router"), original)
    assert {one["before"] for one in record["layers"]} == {0.0}


def test_a_model_card_is_taken_over_whatever_it_is(tmp_path: Path) -> None:
    original, pruned = make(tmp_path, MIXTRAL)
    asked = ask(pruned, "router", steps=2)
    (pruned / "README.md").write_bytes(b"caf\xe9\n")
    go(tmp_path, pruned, asked, original, "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert card.startswith("caf\ufffd\n")
    (tmp_path / "secret").write_text("secret")
    (pruned / "README.md").unlink()
    (pruned / "README.md").symlink_to(tmp_path / "secret")
    go(tmp_path, pruned, asked, original, "again")
    assert not (tmp_path / "again" / "README.md").exists()
