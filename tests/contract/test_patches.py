"""The diffs against vLLM apply to the sources they name, compile and are catalogued."""

import os
import re
from pathlib import Path

import pytest

from tests.patched import FOLDER, PATCHES, VERSION, apply, touched, undefined_names
from tests.patched import unpack as unpack_pristine

CATALOGUE = FOLDER / "README.md"
PARTS = ("Why.", "How.", "Upstream.", "Remove when")
SOURCES = [
    Path(path)
    for path in os.environ.get("VLLM_SOURCES", "").split(os.pathsep)
    if path and (Path(path) / f"vllm-{VERSION}.dist-info").is_dir()
]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_patch_applies_to_the_pinned_sources_and_compiles(
    patch: Path, tmp_path: Path
) -> None:
    folder = unpack_pristine(tmp_path)
    before = {name: (folder / name).read_bytes() for name in touched(patch)}
    apply([patch], folder)
    changed = [folder / name for name in before]
    for path, old in zip(changed, before.values(), strict=True):
        assert path.read_bytes() != old
        compile(path.read_bytes(), str(path), "exec")
    assert not undefined_names(changed)


def test_patches_apply_on_top_of_each_other(tmp_path: Path) -> None:
    assert len(PATCHES) == 4
    apply(PATCHES, unpack_pristine(tmp_path))


@pytest.mark.skipif(not SOURCES, reason=f"no vLLM {VERSION} in VLLM_SOURCES")
def test_pinned_sources_are_those_of_the_wheel(tmp_path: Path) -> None:
    folder = unpack_pristine(tmp_path)
    for name in {name for patch in PATCHES for name in touched(patch)}:
        assert (folder / name).read_bytes() == (SOURCES[0] / name).read_bytes(), name


def test_every_patch_is_catalogued() -> None:
    text = CATALOGUE.read_text("utf-8")
    for patch in PATCHES:
        assert f"`vllm-{VERSION}/{patch.name}`" in text


def test_every_entry_of_the_catalogue_says_all_it_has_to() -> None:
    entries = re.split(r"^### ", CATALOGUE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    assert len(entries) > 10
    silent = [
        f"{entry.splitlines()[0]}: {part}"
        for entry in entries
        for part in PARTS
        if f"**{part}" not in entry
    ]
    assert not silent, "\n".join(silent)
