"""Files that are replaced in one step, and folders that go in one."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_moe_prune.errors import OutputError
from vllm_moe_prune.files import atomic
from vllm_moe_prune.files.atomic import remove_folder, write_file


def test_a_file_is_made_and_replaced_from_pieces(tmp_path: Path) -> None:
    for data in (b"one", b"another"):
        write_file(tmp_path / "file", iter([data, memoryview(data), b""]))
        assert (tmp_path / "file").read_bytes() == data * 2
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"before")
    (tmp_path / "link").symlink_to("target")
    write_file(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"after"


def test_a_link_in_the_way_of_the_temporary_file_is_not_followed(
    tmp_path: Path,
) -> None:
    (tmp_path / "precious").write_bytes(b"theirs")
    (tmp_path / ".file.tmp").symlink_to("precious")
    with pytest.raises(OSError, match="symbolic links"):
        write_file(tmp_path / "file", b"ours")
    assert (tmp_path / "precious").read_bytes() == b"theirs"


def test_an_earlier_file_survives_what_goes_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"before")

    def failing() -> Iterator[bytes]:
        yield b"half"
        raise OSError(5, "as if the disk had gone")

    with pytest.raises(OSError, match="as if"):
        write_file(tmp_path / "file", failing())
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "folder"])
def test_only_regular_files_are_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "device":
        if os.geteuid():
            pytest.skip("only root can make a device")
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.mkdir()
    before = path.stat()
    with pytest.raises(OutputError, match=f"is a {kind}; give the name of a file"):
        write_file(path, b"ours")
    assert path.stat() == before


def test_a_folder_goes_at_once_whatever_an_earlier_kill_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("work", ".work.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    remove_folder(tmp_path / "work")
    assert not list(tmp_path.iterdir())

    (tmp_path / "work").mkdir()
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda path: None)
    remove_folder(tmp_path / "work")
    assert not (tmp_path / "work").exists()
    monkeypatch.undo()
    remove_folder(tmp_path / "work")
    assert not list(tmp_path.iterdir())
