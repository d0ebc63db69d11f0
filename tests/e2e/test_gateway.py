"""The gateway passes requests on to real HTTP servers and changes nothing."""

import gzip
import hashlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import NotFoundError, OpenAI

from tests.gateway import CHAT, chat, metric, start_gateway, start_stub, streamed, until
from tests.server import Process, running

PROVENANCE = {
    "source_bytes": 1000,
    "sparsity_achieved": {
        "of_experts": 0.4,
        "of_all_parameters": 0.3,
        "parameters_before": 500,
        "parameters_after": 400,
    },
}
LOAD = {"enabled": True, "since": 1.0, "top_k": 2, "layers": []}


@pytest.fixture(scope="module")
def servers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Process, Process, Process]]:
    """A gateway, an original and a pruned backend."""
    folder = tmp_path_factory.mktemp("gateway")
    plugin = folder / "plugin"
    plugin.mkdir()
    (plugin / "provenance.json").write_text(json.dumps(PROVENANCE))
    (plugin / "load.json").write_text(json.dumps(LOAD))
    (plugin / "report.html").write_text("<!doctype html><title>Report</title>")
    original = start_stub(folder, "full")
    pruned = start_stub(folder, "pruned", plugin=plugin)
    with running(original, pruned):
        addresses = {"one": original.url, "two": pruned.url + "/v1/"}
        gateway = start_gateway(folder, addresses)
        with running(gateway):
            yield gateway, original, pruned


@pytest.fixture
def gateway(servers: tuple[Process, Process, Process]) -> Process:
    return servers[0]


@pytest.fixture
def client(gateway: Process) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def last_seen(server: Process) -> dict[str, Any]:
    """The newest request a stub got."""
    entry: dict[str, Any] = httpx.get(f"{server.url}/stub/seen").json()[-1]
    return entry


@pytest.mark.parametrize("model", ["full", "pruned"])
def test_the_openai_client_reaches_the_model_it_names(
    client: OpenAI, model: str
) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    answer = client.chat.completions.create(model=model, messages=messages)
    assert (answer.model, answer.choices[0].message.content) == (model, "Hello!")
    stream = client.chat.completions.create(model=model, messages=messages, stream=True)
    pieces = [piece.choices[0].delta.content for piece in stream]
    assert pieces == ["word ", "word ", "word ", ""]


def test_models_of_all_backends_are_listed_as_these_list_them(client: OpenAI) -> None:
    listed = list(client.models.list())
    assert [model.id for model in listed] == ["full", "pruned"]
    assert {model.owned_by for model in listed} == {"stub"}
    assert client.models.retrieve("pruned").id == "pruned"
    with pytest.raises(NotFoundError, match=r"there are: full, pruned"):
        client.models.retrieve("other/name")


def test_an_unknown_model_is_an_error_the_client_understands(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as caught:
        client.chat.completions.create(model="nix", messages=[])
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


@pytest.mark.parametrize("stream", [False, True])
def test_every_byte_is_that_of_the_backend(
    servers: tuple[Process, Process, Process], stream: bool
) -> None:
    gateway, original, _ = servers
    request = chat("full", stream=stream, stub={"events": 200, "size": 50})
    direct = httpx.post(original.url + CHAT, json=request)
    passed = httpx.post(gateway.url + CHAT, json=request)
    assert len(direct.content) > 200
    assert passed.content == direct.content
    assert passed.status_code == direct.status_code == 200
    kinds = [answer.headers["content-type"] for answer in (direct, passed)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/octet-stream", bytes(range(256)) * 300),
        ("application/json", b'{"model": "full", \xff not JSON'),
        ("text/plain; charset=utf-16", b""),
    ],
    ids=["binary", "broken", "empty"],
)
def test_a_named_backend_gets_what_was_sent_unread(
    servers: tuple[Process, Process, Process], kind: str, body: bytes
) -> None:
    gateway, original, _ = servers
    path = "/v1/some%2Fthing/%C3%A9"
    answer = httpx.post(
        f"{gateway.url}/backends/one{path}?a=%20b&a=c%2Bd",
        content=body,
        headers={"content-type": kind, "x-mine": "grün".encode(), "user-agent": "odd"},
    )
    got = last_seen(original)
    assert (got["path"], got["query"]) == (path, "a=%20b&a=c%2Bd")
    assert got["sha256"] == hashlib.sha256(body).hexdigest()
    sent = dict(got["headers"])
    assert (sent["x-mine"], sent["user-agent"]) == ("grün", "odd")
    assert sent["host"] == original.url.removeprefix("http://")
    assert answer.status_code == 201
    assert answer.content == body
    assert answer.headers.get_list("x-stub") == ["a", "b"]


def test_compressed_bodies_stay_compressed(gateway: Process) -> None:
    packed = gzip.compress(b"x" * 5000)
    url = f"{gateway.url}/backends/one/v1/echo"
    headers = {"content-type": "application/gzip", "content-encoding": "gzip"}
    assert httpx.post(url, content=packed, headers=headers).content == packed


def test_headers_go_through_byte_by_byte(
    servers: tuple[Process, Process, Process],
) -> None:
    gateway, original, _ = servers
    odd = [("x-a", "ü €".encode()), ("x-a", b"again"), ("x-b", b"a,  b")]
    httpx.post(f"{gateway.url}/backends/one/v1/echo", headers=odd)
    expected = [(name, value.decode()) for name, value in odd]
    sent = [(n, v) for n, v in last_seen(original)["headers"] if n.startswith("x-")]
    assert sent == expected


def test_headers_of_one_connection_go_no_further(
    servers: tuple[Process, Process, Process],
) -> None:
    gateway, original, _ = servers
    headers = {"connection": "x-secret", "x-secret": "1", "te": "trailers", "x-on": "2"}
    httpx.post(f"{gateway.url}/backends/one/v1/echo", headers=headers)
    sent = dict(last_seen(original)["headers"])
    assert sent["x-on"] == "2"
    assert not {"x-secret", "te"} & sent.keys()


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/../metrics", "/v1/%2e%2e/metrics", "/v1/a/..%2f..%2fmetrics"),
        *("/backends/one/metrics", "/backends/one%2fv1/metrics", "/backends/one"),
        *("/backends/one/v1/../health", "/backends/one/plugins/moe-prune/../x"),
        *("/backends/none/v1/models", "/backends//v1/models", "/nothing"),
    ],
)
def test_no_path_leads_out_of_what_is_passed_on(gateway: Process, path: str) -> None:
    # httpx would tidy the path up.
    request = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as raw:
        raw.sendall(request.encode())
        head, _, body = b"".join(iter(lambda: raw.recv(65536), b"")).partition(
            b"\r\n\r\n"
        )
    assert head.startswith(b"HTTP/1.1 404 ")
    assert json.loads(body)["error"]["code"] in {"not_found", "backend_not_found"}


def test_what_could_not_be_passed_on_as_it_is_gets_refused(gateway: Process) -> None:
    sent = [
        ("invalid_http", b"GET /backends/one/v1/\xff HTTP/1.1\r\n"),
        ("invalid_http", b"GET /backends/one/v1/x?\xff HTTP/1.1\r\n"),
        ("invalid_http", b"GET /backends/one/v1/x HTTP/1.1\r\nx-a: \xff\r\n"),
    ]
    for code, line in sent:
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as raw:
            raw.sendall(line + b"host: localhost\r\nconnection: close\r\n\r\n")
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 400 "), answer
        assert f'"code": "{code}"'.encode() in answer


def test_what_the_plugin_tells_is_reached_by_the_backends_name(
    gateway: Process,
) -> None:
    base = f"{gateway.url}/backends/two/plugins/moe-prune"
    assert httpx.get(f"{base}/load").json() == LOAD
    assert "Report" in httpx.get(f"{base}/report").text
    missing = httpx.get(f"{gateway.url}/backends/one/plugins/moe-prune/load")
    assert missing.status_code == 404


def test_several_backends_need_a_model(gateway: Process) -> None:
    for request in ({"json": {"messages": []}}, {"files": {"file": b"x"}}, {}):
        answer = httpx.post(f"{gateway.url}/v1/audio/transcriptions", **request)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "model_required"


def test_metrics_tell_what_happened(gateway: Process, client: OpenAI) -> None:
    chats = {"backend": "two", "path": "chat/completions", "status": "200"}
    before = metric(gateway, "moe_prune_requests_total", **chats)
    tokens = metric(gateway, "moe_prune_tokens_total", backend="two", kind="completion")
    first = "moe_prune_time_to_first_token_seconds_count"
    firsts = metric(gateway, first, backend="two")
    httpx.post(gateway.url + CHAT, json=chat("pruned"))
    httpx.post(gateway.url + CHAT, json=streamed("pruned", first_s=0.1))
    assert metric(gateway, "moe_prune_requests_total", **chats) == before + 2
    now = metric(gateway, "moe_prune_tokens_total", backend="two", kind="completion")
    assert now == tokens + 10
    assert metric(gateway, first, backend="two") == firsts + 1
    long = "moe_prune_request_seconds_sum"
    assert metric(gateway, long, backend="two") > 0.1
    code = {"backend": "", "code": "model_not_found"}
    errors = metric(gateway, "moe_prune_errors_total", **code)
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="nix", messages=[])
    assert metric(gateway, "moe_prune_errors_total", **code) == errors + 1
    assert metric(gateway, "moe_prune_backend_up", backend="two") == 1
    assert metric(gateway, "moe_prune_requests_in_flight", backend="two") == 0


def test_a_client_that_has_read_the_last_event_may_leave(gateway: Process) -> None:
    told = {"backend": "one", "kind": "completion"}
    gone = {"backend": "one", "code": "client_gone"}
    tokens = metric(gateway, "moe_prune_tokens_total", **told)
    errors = metric(gateway, "moe_prune_errors_total", **gone)
    request = streamed("full", tail_s=60)
    with httpx.stream("POST", gateway.url + CHAT, json=request) as answer:
        lines = answer.iter_lines()
        assert "data: [DONE]" in lines
    in_flight = "moe_prune_requests_in_flight"
    until(lambda: metric(gateway, in_flight, backend="one") == 0, "none in flight")
    assert metric(gateway, "moe_prune_tokens_total", **told) == tokens + 5
    assert metric(gateway, "moe_prune_errors_total", **gone) == errors


def test_metrics_show_what_pruning_did(gateway: Process) -> None:
    size = "moe_prune_model_parameters"
    assert metric(gateway, size, backend="two", state="before") == 500
    assert metric(gateway, size, backend="two", state="after") == 400
    assert metric(gateway, "moe_prune_model_source_bytes", backend="two") == 1000
    sparsity = "moe_prune_model_sparsity_ratio"
    assert metric(gateway, sparsity, backend="two", of="experts") == 0.4
    assert metric(gateway, sparsity, backend="two", of="all") == 0.3
    text = httpx.get(f"{gateway.url}/metrics").text
    assert 'parameters{backend="one"' not in text


def test_odd_paths_do_not_fill_the_metrics(gateway: Process) -> None:
    for number in range(5):
        httpx.get(f"{gateway.url}/backends/one/v1/odd{number}")
    text = httpx.get(f"{gateway.url}/metrics").text
    assert "odd" not in text
    assert 'path="other"' in text


def test_every_page_is_there_for_everybody(gateway: Process) -> None:
    for name in ("", "index.html", "report.html", "compare.html"):
        answer = httpx.get(f"{gateway.url}/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/html")
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert httpx.post(f"{gateway.url}/compare.html").status_code == 405
