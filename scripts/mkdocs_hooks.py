"""Hooks of the documentation site: files from outside docs/, and links that leave it.

README.md, CONTRIBUTING.md and other pages below belong to the repository and are pages
of the site too. A link to a file that is no page becomes the file's path as text; one
to a file that does not exist is a warning, which ends ``mkdocs build --strict``.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# Page of the site -> file of the repository.
OUTSIDE = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing/index.md": "CONTRIBUTING.md",
    "contributing/release.md": "RELEASE.md",
    "contributing/patches.md": "patches/README.md",
    "start/demo-models.md": "examples/README.md",
}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
ATTRIBUTE = re.compile(r'(?<=\b)(src|srcset)="([^"]+)"')
log = logging.getLogger("mkdocs.hooks.links")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/, and the list of decisions."""
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    decisions = "contributing/adr/index.md"
    files.append(File.generated(config, decisions, content=list_of_decisions()))
    return files


def list_of_decisions() -> str:
    """A page that links every decision, by its title."""
    paths = sorted((DOCS / "contributing" / "adr").glob("*.md"))
    lines = [
        f"- [{path.read_text('utf-8').splitlines()[0].lstrip('# ')}]({path.name})"
        for path in paths
    ]
    return "# Decisions\n\nWhat was decided, why, and at what cost.\n\n" + "\n".join(
        lines
    )


def on_page_markdown(text: str, page: Page, **_: Any) -> str:
    """Links and pictures as seen from the site."""
    uri = page.file.src_uri
    origin = ROOT / OUTSIDE[uri] if uri in OUTSIDE else DOCS / uri

    def link(found: re.Match[str]) -> str:
        label, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = (origin.parent / target).resolve()
        if not path.exists():
            if uri not in OUTSIDE:
                return found[0]  # mkdocs says so itself
            log.warning("%s links to %s, which does not exist", uri, target)
        place = place_of(path)
        if place is None:
            shown = path.relative_to(ROOT).as_posix()
            return f"`{shown}`" if shown in label else f"{label} (`{shown}`)"
        return f"[{label}]({relative(place, uri)}{anchor})"

    def attribute(found: re.Match[str]) -> str:
        place = place_of((origin.parent / found[2]).resolve())
        if place is None:
            log.warning("%s shows %s, which is not in docs/", uri, found[2])
            return found[0]
        # Raw HTML is not rewritten by mkdocs: as seen from the folder of the page.
        return f'{found[1]}="{relative(place, page.url + "index.html")}"'

    return ATTRIBUTE.sub(attribute, LINK.sub(link, text))


def place_of(path: Path) -> str | None:
    """Where a file of the repository is on the site, None if it is not."""
    inside = {str(ROOT / path): page for page, path in OUTSIDE.items()}
    if str(path) in inside:
        return inside[str(path)]
    if path.is_relative_to(DOCS) and path.is_file():
        return path.relative_to(DOCS).as_posix()
    return None


def relative(target: str, page: str) -> str:
    """One path of the site as seen from another."""
    return Path(os.path.relpath(target, Path(page).parent)).as_posix()
