"""Documents name files that exist. `mkdocs build --strict` checks the site itself."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from vllm_moe_prune.cli import app

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)#\s]+)|(?:src|srcset)=\"([^\"]+)\"")
NAMED = re.compile(r"\bdocs/[\w./-]+\.(?:md|json|svg|png)\b")
COMMAND = re.compile(r"^ *(vllm-moe-prune [a-z][^\n]*)", re.MULTILINE)


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


def test_commands_in_pages_have_these_names_and_options() -> None:
    group: Any = typer.main.get_command(app)
    seen, wrong = 0, []
    for path in tracked("*.md", "examples/*.sh"):
        text = path.read_text("utf-8").replace("\\\n", " ")
        for line in COMMAND.findall(text):
            # The flags in the string of --vllm-flags are vLLM's.
            line = re.sub(r"--vllm-flags (['\"]).*?\1", "--vllm-flags X", line)
            name, *words = shlex.split(line, comments=True)[1:]
            command = group.commands.get(name)
            seen += 1
            if command is None:
                wrong.append(f"{path.relative_to(ROOT)}: no command {name}")
                continue
            known = {option for item in command.params for option in item.opts}
            given = {word for word in words if re.match(r"--?[a-z]", word)}
            if name != "serve" and given - known:  # serve hands other flags to vLLM
                wrong.append(
                    f"{path.relative_to(ROOT)}: {name} {sorted(given - known)}"
                )
    assert seen > 50
    assert not wrong, "\n".join(wrong)


def test_the_first_screen_stays_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 150
