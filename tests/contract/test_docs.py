"""Documents name files that exist. `mkdocs build --strict` checks the site itself."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#\s]+)|(?:src|srcset)=\"([^\"]+)\"")
NAMED = re.compile(r"\bdocs/[\w./-]+\.(?:md|json|svg|png)\b")


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [
        ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()
    ]


def test_links_lead_to_files() -> None:
    pages = tracked("*.md")
    assert ROOT / "README.md" in pages
    wrong = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for found in LINK.finditer(page.read_text("utf-8"))
        if "://" not in (target := found[1] or found[2])
        and "{" not in target
        and not (page.parent / target).exists()
    ]
    assert not wrong, "\n".join(wrong)


def test_pages_named_in_code_exist() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in tracked("*.py", "*.toml", "*.yaml", "Makefile", "scripts/*")
        for name in NAMED.findall(path.read_text("utf-8"))
        if not (ROOT / name).exists()
    ]
    assert not wrong, "\n".join(wrong)


def test_the_first_screen_stays_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 150
