"""The diffs in ``patches/``, and vLLM sources with them applied."""

import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "patches"
VERSION = "0.33.0"
PATCHES = sorted((FOLDER / f"vllm-{VERSION}").glob("*.patch"))
PRISTINE = FOLDER / f"vllm-{VERSION}" / "sources.tar.xz"
"""The files that the diffs touch, as they are in vLLM's wheel, and its licence."""


def touched(patch: Path) -> list[str]:
    """Files that a diff changes, relative to the folder that holds ``vllm/``."""
    lines = patch.read_text("utf-8").splitlines()
    return [line.removeprefix("+++ b/") for line in lines if line.startswith("+++ b/")]


def unpack(folder: Path) -> Path:
    """The pristine sources, in a folder."""
    with tarfile.open(PRISTINE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def apply(patches: Iterable[Path], folder: Path) -> None:
    """Apply diffs to the sources in a folder, as a contributor would.

    Raises:
        subprocess.CalledProcessError: One does not apply.
    """
    for patch in patches:
        subprocess.run(
            ["git", "apply", "--verbose", str(patch)], cwd=folder, check=True
        )


def overlay(folder: Path, installed: Path, patches: Iterable[Path]) -> Path:
    """A ``vllm`` package that is the installed one, but for the patched files.

    Args:
        folder: To put it in; goes on PYTHONPATH.
        installed: The folder that holds the installed ``vllm/``.
        patches: Diffs to apply.
    """
    patches = list(patches)
    files = {Path(name) for patch in patches for name in touched(patch)}
    real = {parent for file in files for parent in file.parents} - {Path()}
    for parent in sorted(real):
        (folder / parent).mkdir(parents=True, exist_ok=True)
        for entry in (installed / parent).iterdir():
            name = parent / entry.name
            if name in files:
                (folder / name).write_bytes(entry.read_bytes())
            elif name not in real and entry.name != "__pycache__":
                (folder / name).symlink_to(entry)
    apply(patches, folder)
    return folder


def undefined_names(files: Iterable[Path]) -> str:
    """What ruff says of syntax errors, undefined names and imports without use."""
    rules = ["--isolated", "--select", "E9,F", "--target-version", "py310"]
    command = [sys.executable, "-m", "ruff", "check", *rules, *map(str, files)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout if found.returncode else ""
