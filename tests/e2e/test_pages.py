"""The three pages in a real browser, from a real gateway."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser import DESKTOP, PHONE, assert_accessible, chromium, page_at
from tests.gateway import start_gateway, start_stub
from tests.server import Process, running

pytestmark = pytest.mark.slow
THEMES = [(DESKTOP, False), (DESKTOP, True), (PHONE, False), (PHONE, True)]
KEPT = {0: [0, 1, 3], 1: [0, 2, 3]}


def load(tokens: list[list[int]], enabled: bool = True) -> dict[str, Any]:
    """What the endpoint plugin tells of the load: four experts, three of them left."""
    layers = [
        {"layer": at, "source_layer": at, "experts": counts, "source_experts": KEPT[at]}
        for at, counts in enumerate(tokens)
    ]
    return {"enabled": enabled, "since": 1.7e9, "top_k": 2, "layers": layers}


REMAP = {"layers": [{"original_layer": at, "experts_before": 4} for at in KEPT]}
REPORT = """<!doctype html><html lang="en"><title>Report</title>
<style>h1 { color: rgb(1, 2, 3) }</style><h1>Pruned well</h1>
<a href="#far">jump</a><script>document.title = "ran"</script></html>"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stub hands out as its plugin's data."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "remap.json").write_text(json.dumps(REMAP))
    (folder / "report.html").write_text(REPORT)
    return folder


@pytest.fixture(scope="module")
def gateway(
    tmp_path_factory: pytest.TempPathFactory, plugin: Path, browser: Browser
) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("pages")
    plain, pruned = start_stub(folder, "plain"), start_stub(folder, "m", plugin=plugin)
    with running(plain, pruned):
        addresses = {"full": plain.url, "pruned": pruned.url}
        server = start_gateway(folder, addresses)
        with running(server):
            yield server


@pytest.fixture(autouse=True)
def some_load(plugin: Path) -> None:
    (plugin / "load.json").write_text(json.dumps(load([[60, 0, 20], [10, 10, 10]])))


def tile(page: Page, name: str) -> str:
    """The large text of a tile."""
    text = page.locator("#tiles div", has_text=name).locator(".big").inner_text()
    return str(text)


@pytest.mark.parametrize(("size", "dark"), THEMES)
def test_experts_shows_the_load(
    browser: Browser, gateway: Process, plugin: Path, size: tuple[int, int], dark: bool
) -> None:
    with page_at(browser, f"{gateway.url}/?backend=pruned", size, dark) as page:
        expect(page.locator("#tiles")).to_contain_text("6 of 8")
        assert tile(page, "Tokens routed") == "40"
        assert tile(page, "Busiest") == "2.3× even"
        assert tile(page, "Idle") == "1"
        rows = page.locator("#rows tr")
        expect(rows).to_have_count(2)
        expect(rows.nth(0)).to_contain_text("3 of 4")
        expect(rows.nth(0)).to_contain_text("75.0 %")
        expect(rows.nth(1)).to_contain_text("100 %")
        assert_accessible(page)
        # New numbers come by themselves, until they are paused.
        (plugin / "load.json").write_text(json.dumps(load([[60, 5, 20], [9, 9, 9]])))
        idle = page.locator("#tiles div", has_text="Idle").locator(".big")
        expect(idle).to_have_text("0")


def test_every_cell_can_be_read_with_the_keyboard(
    browser: Browser, gateway: Process
) -> None:
    with page_at(browser, f"{gateway.url}/?backend=pruned") as page:
        heat, said = page.locator("#map"), page.get_by_role("status").last
        expect(page.locator("#rows tr")).to_have_count(2)
        heat.focus()
        page.keyboard.press("ArrowRight")
        expect(said).to_have_text(
            "Layer 0, expert 0: 60 tokens, 75.0 % of its layer, 2.3× an even share"
        )
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(said).to_have_text("Layer 0, expert 2: removed")
        page.keyboard.press("ArrowRight")
        expect(said).to_contain_text("Layer 0, expert 3 (served as 2): 20 tokens")
        page.keyboard.press("ArrowDown")
        expect(said).to_contain_text("Layer 1, expert 3 (served as 2): 10 tokens")
        for _ in range(9):
            page.keyboard.press("ArrowRight")
        expect(said).to_contain_text("Layer 1, expert 3")
        page.get_by_label("as served").check()
        heat.focus()
        page.keyboard.press("ArrowDown")
        expect(said).to_contain_text("Layer 0, expert 0: 60 tokens")


def test_the_colors_are_those_of_the_numbers(
    browser: Browser, gateway: Process
) -> None:
    pixels = """() => {
        const canvas = document.querySelector("canvas"), copy = new OffscreenCanvas(
            canvas.width, canvas.height), pen = copy.getContext("2d", {
            willReadFrequently: true});
        pen.drawImage(canvas, 0, 0);
        const [w, h] = [canvas.width / 4, canvas.height / 2];
        return [0, 1, 2, 3].map((x) => [...pen.getImageData(
            Math.round((x + 0.3) * w), Math.round(0.3 * h), 1, 1).data]);
    }"""
    with page_at(browser, f"{gateway.url}/?backend=pruned") as page:
        expect(page.locator("#rows tr")).to_have_count(2)
        busy, idle, removed, some = page.evaluate(pixels)
        assert idle[3] == removed[3] == 0, "nothing is painted there"
        assert sum(busy[:3]) < sum(some[:3]), "busier is darker on a light page"
        page.emulate_media(color_scheme="dark")
        page.wait_for_timeout(200)
        busy, _, _, some = page.evaluate(pixels)
        assert sum(busy[:3]) > sum(some[:3]), "and lighter on a dark one"


def test_experts_says_what_is_missing(
    browser: Browser, gateway: Process, plugin: Path
) -> None:
    with page_at(browser, f"{gateway.url}/?backend=full", faults=True) as page:
        notice = page.locator("#notice")
        expect(notice).to_contain_text("No routing load")
        expect(notice).to_contain_text("vllm-moe-prune serve CHECKPOINT --watch")
        assert_accessible(page)
        (plugin / "load.json").write_text(json.dumps(load([], enabled=False)))
        page.get_by_label("Backend").select_option("pruned")
        expect(notice).to_contain_text("The load is not being counted")
        expect(page.locator("#content")).to_be_hidden()
        assert_accessible(page)


@pytest.mark.parametrize(("size", "dark"), THEMES)
def test_report_is_framed_and_runs_no_scripts(
    browser: Browser, gateway: Process, size: tuple[int, int], dark: bool
) -> None:
    url = f"{gateway.url}/report.html?backend=pruned"
    with page_at(browser, url, size, dark) as page:
        heading = page.frame_locator("#report").locator("h1")
        expect(heading).to_have_text("Pruned well")
        expect(heading).to_have_css("color", "rgb(1, 2, 3)")
        frame = page.frames[1]
        assert frame.title() == "Report"
        frame.get_by_text("jump").click()
        expect(heading).to_have_text("Pruned well")
        expect(page.get_by_role("link", name="Report")).to_have_attribute(
            "aria-current", "page"
        )


def test_a_model_without_a_report(browser: Browser, gateway: Process) -> None:
    url = f"{gateway.url}/report.html?backend=full"
    with page_at(browser, url, faults=True) as page:
        expect(page.locator("#notice")).to_contain_text("No report")
        expect(page.locator("#report")).to_be_hidden()
        assert_accessible(page)
        page.get_by_role("link", name="Experts").click()
        expect(page).to_have_url(f"{gateway.url}/?backend=full")


@pytest.mark.parametrize(("size", "dark"), THEMES)
def test_compare_streams_both_answers(
    browser: Browser, gateway: Process, size: tuple[int, int], dark: bool
) -> None:
    with page_at(browser, f"{gateway.url}/compare.html", size, dark) as page:
        answers = page.locator(".answer")
        expect(answers.nth(0)).to_have_text("The answer will be here.")
        assert_accessible(page)
        expect(page.get_by_label("First", exact=True)).to_contain_text("full: plain")
        page.get_by_label("Prompt").fill("Hello")
        page.get_by_label("Prompt").press("Control+Enter")
        for side in range(2):
            expect(answers.nth(side)).to_have_text("word word word")
        expect(page.locator("#verdict")).to_have_text(
            "Too short to compare their speeds. Both answers are the same."
        )
        for side in range(2):
            facts = page.locator(".speed").nth(side)
            expect(facts).to_contain_text(re.compile(r"first token\s*[\d.]+ m?s"))
            expect(facts).to_contain_text(re.compile(r"tokens\s*5$"))
        assert_accessible(page)


def test_compare_tells_which_one_is_faster(browser: Browser, gateway: Process) -> None:
    def slower(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        gap_s = 0.02 if body["model"] == "m" else 0.08
        body["stub"] = {"events": 20, "gap_s": gap_s}
        route.continue_(post_data=json.dumps(body))

    with page_at(browser, f"{gateway.url}/compare.html") as page:
        page.route("**/v1/chat/completions", slower)
        expect(page.locator("#model-1")).to_contain_text("pruned: m")
        page.get_by_role("button", name="Send to both").click()
        verdict = re.compile(r"The second writes [\d.]+× as many tokens per second\.")
        expect(page.locator("#verdict")).to_contain_text(verdict, timeout=15_000)
        speeds = page.locator(".speed div:nth-child(2) dd").all_inner_texts()
        # Four tokens after the first, in the time of twenty events.
        assert 4 / (20 * 0.08) * 0.3 < float(speeds[0]) < 4 / (19 * 0.08) * 1.2
        assert float(speeds[0]) < float(speeds[1])


def test_compare_can_be_stopped_and_tells_of_failures(
    browser: Browser, tmp_path: Path
) -> None:
    first, second = start_stub(tmp_path, "a"), start_stub(tmp_path, "b")
    with running(first, second):
        addresses = {"a": first.url, "b": second.url}
        front = start_gateway(tmp_path, addresses, api_keys="secret")
        with (
            running(front),
            page_at(browser, f"{front.url}/compare.html", faults=True) as page,
        ):
            expect(page.locator("#notice")).to_contain_text("A key of this gateway")
            page.get_by_label("API key").fill("secret")
            assert_accessible(page)
            page.get_by_role("button", name="Use it").click()
            expect(page.locator("#model-0")).to_contain_text("a")
            expect(page.locator("#key-form")).to_be_hidden()
            page.route("**/v1/chat/completions", never_ending)
            page.get_by_label("one after the other").check()
            page.get_by_role("button", name="Send to both").click()
            expect(page.locator(".answer").nth(0)).to_contain_text("word word word")
            page.get_by_role("button", name="Stop").click()
            expect(page.locator(".answer").nth(0)).to_contain_text("Stopped.")
            expect(page.locator("#verdict")).to_contain_text("Nothing to compare")
            page.get_by_label("one after the other").uncheck()
            page.get_by_role("button", name="Send to both").click()
            expect(page.locator(".answer").nth(1)).to_contain_text("word word word")
            second.kill()
            expect(page.locator(".answer").nth(1)).to_contain_text(
                "Backend 'b' ended the connection"
            )
            page.get_by_role("button", name="Stop").click()
            assert_accessible(page)


def never_ending(route: Route) -> None:
    """Sends a request on as one for a stream that does not end."""
    body = json.loads(route.request.post_data or "")
    body["stub"] = {"events": 10**6, "gap_s": 0.05}
    route.continue_(post_data=json.dumps(body))


def test_no_page_is_lost_without_its_server(
    browser: Browser, tmp_path: Path, plugin: Path
) -> None:
    backend = start_stub(tmp_path, "m", plugin=plugin)
    with running(backend):
        front = start_gateway(tmp_path, {"only": backend.url})
        with running(front), page_at(browser, front.url, faults=True) as page:
            expect(page.locator("#rows tr")).to_have_count(2)
            front.kill()
            expect(page.locator("#notice")).to_contain_text("Is the server running?")
            expect(page.locator("#rows tr")).to_have_count(2)
            assert_accessible(page)


def test_in_vllms_own_server_pages_lie_beside_their_data(
    browser: Browser, tmp_path: Path, plugin: Path
) -> None:
    own = start_stub(tmp_path, "own", plugin=plugin)
    other = start_stub(tmp_path, "other")
    start = f"{own.url}/plugins/moe-prune/"
    with running(own, other), page_at(browser, start, also=other.url) as page:
        expect(page.locator("#tiles")).to_contain_text("6 of 8")
        expect(page.get_by_label("Backend")).to_be_hidden()
        page.get_by_role("link", name="Report").click()
        report = page.frame_locator("#report").locator("h1")
        expect(report).to_have_text("Pruned well")
        page.get_by_role("link", name="Compare").click()
        expect(page.locator("#notice")).to_contain_text("This server has one model.")
        expect(page.get_by_label("First", exact=True)).to_have_value(
            json.dumps([f"{own.url}/v1/", "own"], separators=(",", ":"))
        )
        second = page.locator(".side").nth(1)
        second.get_by_label("Address").fill("nonsense")
        assert_accessible(page)
        page.locator("#prompt").fill("Hello")
        page.get_by_role("button", name="Send to both").click()
        expect(page.locator(".answer").nth(1)).to_contain_text("Type the address")
        second.get_by_label("Address").fill(f"{other.url}/v1")
        page.get_by_role("button", name="Send to both").click()
        for side in range(2):
            expect(page.locator(".answer").nth(side)).to_have_text("word word word")
        expect(page.locator("#verdict")).to_contain_text("Both answers are the same.")


def test_another_server_has_to_allow_the_page(
    browser: Browser, gateway: Process, tmp_path: Path
) -> None:
    """vLLM allows no page by default, and neither does a gateway."""
    backend = start_stub(tmp_path, "m")
    with running(backend):
        closed = start_gateway(tmp_path, {"a": backend.url})
        opened = start_gateway(
            tmp_path, {"a": backend.url}, allowed_origins=gateway.url
        )
        url = f"{gateway.url}/compare.html"
        with (
            running(closed, opened),
            page_at(browser, url, faults=True, also="http://127.0.0.1") as page,
        ):
            first, second = page.locator(".side").nth(0), page.locator(".side").nth(1)
            for side, server in ((first, closed), (second, opened)):
                side.locator("select").select_option("other")
                side.get_by_label("Address").fill(server.url)
            page.get_by_role("button", name="Send to both").click()
            expect(first.locator(".answer")).to_contain_text(
                f"--allowed-origins '[\"{gateway.url}\"]'"
            )
            expect(second.locator(".answer")).to_have_text("word word word")
