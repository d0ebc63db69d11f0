"""Outputs as transactions: what a kill leaves, and what resuming makes of it."""

import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.killing import Killed, at_layer
from tests.reference import LayerCut, folder_bytes, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut import transaction
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError, OutputError
from vllm_moe_prune.progress import Progress, Report, ignore

FEWER, OTHER = {0: LayerCut(keep=(1, 3))}, {0: LayerCut(keep=(0, 2))}
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(
        tmp_path / "model", layers=2, experts=4, hidden=16, width=8, vocab=32
    )


def cut(
    model: Path,
    cuts: dict[int, LayerCut] = FEWER,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = ignore,
) -> int:
    """Returns the bytes of weights that were written."""
    checkpoint = open_checkpoint(model)
    plan = load_plan(write_plan(model.parent / "plan.json", checkpoint, cuts))
    result = execute_plan(
        checkpoint,
        plan,
        model.parent / "out",
        resume=resume,
        overwrite=overwrite,
        report=report,
        max_shard_bytes=4000,
    )
    return result.bytes_written


def killed_between_the_renames(model: Path) -> None:
    """An output is being replaced: the old one is aside, the new one not there yet."""
    rename = Path.rename

    def killed(self: Path, to: Path) -> Path:
        if self.name == "result":
            raise Killed
        return rename(self, to)

    with patch.object(Path, "rename", killed), pytest.raises(Killed):
        cut(model, FEWER, overwrite=True)


def left(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()} - {"model", "plan.json"}


@pytest.fixture
def wanted(model: Path, tmp_path: Path) -> dict[str, bytes]:
    """The bytes of the output, which is not there any more."""
    cut(model)
    found = folder_bytes(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    return found


def test_a_complete_output_is_left_alone_by_resuming(
    model: Path, tmp_path: Path
) -> None:
    cut(model)
    before = folder_bytes(tmp_path / "out")
    assert cut(model, resume=True) == 0
    assert cut(model, resume=True, overwrite=True) == 0
    assert folder_bytes(tmp_path / "out") == before
    assert left(tmp_path) == {"out"}


def test_resuming_another_run_than_the_one_that_is_complete_is_refused(
    model: Path, tmp_path: Path
) -> None:
    cut(model, OTHER)
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(OutputError, match="not empty, and was not made by this"):
        cut(model, resume=True)
    assert folder_bytes(tmp_path / "out") == before
    assert left(tmp_path) == {"out"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_killed_between_the_renames_resumes(
    model: Path, tmp_path: Path, wanted: dict[str, bytes], overwrite: bool
) -> None:
    cut(model, OTHER)
    killed_between_the_renames(model)
    assert left(tmp_path) == {"out.partial"}
    cut(model, resume=True, overwrite=overwrite)
    assert folder_bytes(tmp_path / "out") == wanted
    assert left(tmp_path) == {"out"}


def test_starting_again_between_the_renames_puts_the_earlier_output_back_first(
    model: Path, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    cut(model, OTHER)
    earlier = folder_bytes(tmp_path / "out")
    killed_between_the_renames(model)
    with pytest.raises(Killed):
        cut(model, FEWER, overwrite=True, report=at_layer(1))
    assert folder_bytes(tmp_path / "out") == earlier
    cut(model, FEWER, overwrite=True)
    assert folder_bytes(tmp_path / "out") == wanted
    assert left(tmp_path) == {"out"}


def test_files_that_appear_before_the_last_rename_are_not_replaced(
    model: Path, tmp_path: Path
) -> None:
    killed_between_the_renames(model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("theirs")
    (tmp_path / "out" / "run.json").write_text('{"keys": ["theirs"]}')
    with pytest.raises(OutputError, match="files are there that were not"):
        cut(model, resume=True)
    assert (tmp_path / "out" / "config.json").read_text() == "theirs"


def changed_byte(path: Path) -> None:
    """Flip a bit far behind the header and set the time back."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_source_that_changed_since_the_kill_is_refused(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        cut(model, report=at_layer(1))
    changed_byte(model / SHARD)
    with pytest.raises(OutputError, match="another plan, input"):
        cut(model, resume=True)


def test_a_source_that_was_copied_since_the_kill_starts_again(
    model: Path,
    tmp_path: Path,
    wanted: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only sampled bytes of large models are compared: nothing finished is trusted."""
    everything = cut(model)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(Killed):
        cut(model, report=at_layer(2))
    assert any(tmp_path.glob("out.partial/result/*.safetensors"))
    model.rename(tmp_path / "before")
    shutil.copytree(tmp_path / "before", model)
    shutil.rmtree(tmp_path / "before")
    assert cut(model, resume=True) == everything
    assert folder_bytes(tmp_path / "out") == wanted
    assert "changed or copied since this run began" in caplog.text


def test_a_source_that_changes_while_it_is_read_publishes_nothing(
    model: Path, tmp_path: Path
) -> None:
    def change(progress: Progress) -> None:
        if progress.layer == 1:
            changed_byte(model / SHARD)

    with pytest.raises(CheckpointError, match=f"{SHARD}: was changed while"):
        cut(model, report=change)
    assert left(tmp_path) == {"out.partial"}


def test_what_the_disk_refuses_at_the_end_can_be_resumed(
    model: Path, tmp_path: Path, wanted: dict[str, bytes]
) -> None:
    cut(model, OTHER)
    with (
        patch.object(transaction.shutil, "rmtree", side_effect=OSError(5, "EIO")),
        pytest.raises(OutputError, match=r"out\.partial: cannot be written.*--resume"),
    ):
        cut(model, overwrite=True)
    cut(model, resume=True)
    assert folder_bytes(tmp_path / "out") == wanted
    assert left(tmp_path) == {"out"}
