"""What the gateway and vLLM's own server both serve: the pages, and where data lies."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

PLUGIN_PATH = "/plugins/moe-prune"
"""The address of the data, and in vLLM's server of the pages, of one checkpoint."""
PAGES = Path(__file__).parent / "pages"
INDEX = "index.html"
"""The page that a folder's address shows."""


def page_files(folder: Path = PAGES) -> list[Path]:
    """The pages and what belongs to them, sent as they are."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def sender(path: Path) -> Callable[[], Awaitable[Response]]:
    """A route that sends one file."""

    async def send() -> Response:
        # Revalidated each time by its ETag, so that an update of the package is seen.
        return FileResponse(path, headers={"Cache-Control": "no-cache"})

    return send


def add_pages(router: APIRouter, folder: Path = PAGES) -> None:
    """Add routes for all pages; ``index.html`` is for ``/``."""
    for path in page_files(folder):
        name = "" if path.name == INDEX else path.name
        router.add_api_route(f"/{name}", sender(path), include_in_schema=False)
