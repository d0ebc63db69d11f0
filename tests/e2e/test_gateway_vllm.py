"""The gateway, and a browser, before a real vLLM server."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from playwright.sync_api import expect

from tests.browser import chromium, page_at
from tests.gateway import metric, start_gateway, until
from tests.server import Process, running, serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DEMO = Path(__file__).parents[2] / "examples" / "demo-mixtral"
PROMPT = "def read_lines(path):\n"
ASKED: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    """A gateway, and the address of the vLLM server behind it."""
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "demo").symlink_to(DEMO)
    with serving(folder / "demo") as direct:
        # Under two names, so that the gateway has to choose.
        gateway = start_gateway(folder, {"one": direct, "two": direct})
        with running(gateway):
            yield gateway, direct


def test_answers_are_those_of_vllm(servers: tuple[Process, str]) -> None:
    gateway, direct = servers
    texts = []
    for url in (direct, f"{gateway.url}/v1"):
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        plain = client.completions.create(prompt=PROMPT, **ASKED)
        pieces = client.completions.create(
            prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **ASKED
        )
        streamed = [piece.choices[0].text for piece in pieces if piece.choices]
        assert len(streamed) > 5
        assert "".join(streamed) == plain.choices[0].text
        messages: Any = [{"role": "user", "content": "What is 17 + 25?"}]
        chat = client.chat.completions.create(messages=messages, **ASKED)
        texts.append((plain.choices[0].text, chat.choices[0].message.content))
    assert texts[0] == texts[1]
    assert texts[0][0].strip()
    tokens = [
        metric(gateway, "moe_prune_tokens_total", backend=name, kind="completion")
        for name in ("one", "two")
    ]
    assert sum(tokens) > 2 * ASKED["max_tokens"]


def test_models_and_errors_are_those_of_vllm(servers: tuple[Process, str]) -> None:
    gateway, direct = servers
    (model, _) = httpx.get(f"{gateway.url}/v1/models").json()["data"]
    assert model["id"] == "demo"
    assert model["max_model_len"] > 0
    wrong = ASKED | {"prompt": PROMPT, "max_tokens": -1}
    answers = [
        httpx.post(f"{url}/completions", json=wrong)
        for url in (direct, f"{gateway.url}/v1")
    ]
    assert answers[0].status_code == answers[1].status_code == 400
    assert answers[0].content == answers[1].content


def test_vllm_stops_when_the_client_leaves(servers: tuple[Process, str]) -> None:
    gateway, direct = servers

    def vllm_metric(name: str) -> float:
        text = httpx.get(direct.removesuffix("v1") + "metrics", timeout=60).text
        found = re.search(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)
        assert found
        return float(found[1])

    # How late vLLM answers for its metrics does not matter: tokens that it did not make
    # are evidence at any time. 64 answers at once take minutes, on any machine.
    answers, tokens = 64, 1900
    before = vllm_metric("generation_tokens_total")
    wishes = {"n": answers, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    request = ASKED | {"prompt": PROMPT, "temperature": 1} | wishes
    with httpx.stream(
        "POST", f"{gateway.url}/v1/completions", json=request, timeout=60
    ) as answer:
        assert answer.status_code == 200
        next(answer.iter_bytes())
    code = {"code": "client_gone"}
    until(lambda: metric(gateway, "moe_prune_errors_total", **code) == 1, "counted")
    until(lambda: vllm_metric("num_requests_running") == 0, "none is running")
    made = vllm_metric("generation_tokens_total") - before
    assert 0 < made < answers * tokens


def test_compare_streams_from_vllm(servers: tuple[Process, str]) -> None:
    gateway, _ = servers
    with (
        chromium() as browser,
        page_at(browser, f"{gateway.url}/compare.html") as page,
    ):
        expect(page.locator("#model-1")).to_contain_text("two: demo")
        page.get_by_label("text to go on with").check()
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_label("At most").fill("80")
        page.get_by_role("button", name="Send to both").click()
        verdict = page.locator("#verdict")
        expect(verdict).to_contain_text("Both answers are the same.", timeout=30_000)
        for side in range(2):
            facts = page.locator(".speed").nth(side)
            # A busy machine may hand over all of it at once, which gives no rate.
            expect(facts).to_contain_text(
                re.compile(r"tokens/s\s*([\d.]+|–)\s*tokens\s*80$")
            )
