"""A real headless Chromium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]
DESKTOP, PHONE = (1280, 900), (390, 844)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, headless=True, args=FLAGS
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_at(
    browser: Browser,
    url: str,
    size: tuple[int, int] = DESKTOP,
    dark: bool = False,
    faults: bool = False,
    also: str = "data:",
) -> Iterator[Page]:
    """A page that is open. What goes wrong in it, and what it asks elsewhere, fails.

    Args:
        browser: Where to open it.
        url: Its address.
        size: Of the window.
        dark: The theme.
        faults: Whether the server is meant to refuse something.
        also: Another server that may be asked.
    """
    origin = "/".join(url.split("/")[:3])
    complaints: list[str] = []
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("console", lambda message: complaints.extend(complaint(message, faults)))
    page.on(
        "request", lambda request: complaints.extend(elsewhere(request, origin, also))
    )
    page.goto(url)
    yield page
    context.close()
    assert not complaints, complaints


def complaint(message: ConsoleMessage, faults: bool) -> Iterator[str]:
    """What the browser itself finds wrong."""
    expected = "Blocked script execution in 'blob:" in message.text or (
        faults
        and ("Failed to load resource" in message.text or "CORS policy" in message.text)
    )
    if message.type in {"error", "warning"} and not expected:
        yield f"console: {message.text}"


def elsewhere(request: Request, *allowed: str) -> Iterator[str]:
    """A request that goes to another server."""
    if not request.url.startswith((*allowed, "data:", "blob:")):
        yield f"asked elsewhere: {request.url}"


def assert_accessible(page: Page) -> None:
    """axe finds nothing, nor does the page scroll sideways."""
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wide <= 0, f"{wide} pixels too wide"
