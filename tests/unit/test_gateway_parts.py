"""The gateway's parts that need no server."""

import json
import os
import re
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from moe_prune_gateway.api_error import ApiError
from moe_prune_gateway.gateway_error import GatewayError
from moe_prune_gateway.metrics import Metrics
from moe_prune_gateway.proxy import model_of
from moe_prune_gateway.response_body import (
    LONGEST_EVENT,
    EventStream,
    PlainBody,
    token_counts,
)
from moe_prune_gateway.settings import PREFIX, GatewaySettings, load_settings
from tests.bad_inputs.case import run_cli
from vllm_moe_prune import cli
from vllm_moe_prune.cli import gateway

ROOT = Path(__file__).parents[2]
BACKENDS = {"a": "http://one:8000", "b": "http://two"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 4}

pieces = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.sampled_from([b"data: {}\n\n", b"\n", b"\r\n", b"\r", b'"usage":{', b""]),
    ),
    max_size=30,
)


@given(pieces)
def test_a_stream_loses_and_adds_nothing(chunks: list[bytes]) -> None:
    events = EventStream()
    out = [events.feed(chunk) for chunk in chunks]
    for piece in filter(None, out):
        assert piece.endswith((b"\n\n", b"\n\r\n"))
    assert b"".join([*out, events.finish()]) == b"".join(chunks)
    assert events.finish() == b""
    assert isinstance(events.tokens(), dict)


@given(st.lists(st.integers(0, 200), max_size=8))
def test_where_a_stream_is_cut_makes_no_difference(cuts: list[int]) -> None:
    last = json.dumps({"usage": USAGE})
    data = f'data: {{"text": "\\"usage\\":{{"}}\n\ndata: {last}\n\ndata: [DONE]\n\n'
    stream = data.encode()
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    events = EventStream()
    for start, end in pairwise(edges):
        events.feed(stream[start:end])
    assert events.finish() == b""
    assert events.tokens() == {"prompt": 3, "completion": 4}


def test_an_endless_event_is_not_collected() -> None:
    events = EventStream()
    assert events.feed(b"x" * LONGEST_EVENT) == b""
    assert len(events.feed(b"x")) == LONGEST_EVENT + 1


@pytest.mark.slow
def test_an_event_in_single_bytes_costs_no_more_than_its_bytes() -> None:
    # Looking at all of it again for each byte would take a quarter of an hour.
    events = EventStream()
    for _ in range(LONGEST_EVENT):
        assert events.feed(b"x") == b""
    assert len(events.feed(b"\n")) == LONGEST_EVENT + 1


@pytest.mark.parametrize(
    ("usage", "found"),
    [
        (USAGE, {"prompt": 3, "completion": 4}),
        ({"input_tokens": 5, "output_tokens": 6}, {"prompt": 5, "completion": 6}),
        ({"prompt_tokens": 5}, {"prompt": 5}),
        ({"prompt_tokens": -1, "completion_tokens": "4"}, {}),
        ({"prompt_tokens": 10**400, "completion_tokens": True}, {}),
        ({"prompt_tokens": 2**53, "completion_tokens": 2**53 + 1}, {"prompt": 2**53}),
        ({}, {}),
        (None, {}),
    ],
)
def test_token_counts(usage: Any, found: dict[str, int]) -> None:
    assert token_counts(json.dumps({"usage": usage}).encode()) == found


def stream_of(*events: dict[str, Any]) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)


@pytest.mark.parametrize(
    ("stream", "found"),
    [
        (  # /v1/responses
            stream_of(
                {"type": "response.created", "response": {"usage": None}},
                {"response": {"usage": {"input_tokens": 5, "output_tokens": 6}}},
            ),
            {"prompt": 5, "completion": 6},
        ),
        (  # /v1/messages
            stream_of(
                {"message": {"usage": {"input_tokens": 5, "output_tokens": 1}}},
                {"delta": {"text": "Hello"}},
                {"type": "message_delta", "usage": {"output_tokens": 9}},
            ),
            {"prompt": 5, "completion": 9},
        ),
        (  # every event tells the counts so far
            stream_of(*({"usage": {"completion_tokens": n}} for n in range(4))),
            {"completion": 3},
        ),
    ],
)
def test_streams_of_every_api_are_counted(stream: bytes, found: dict[str, int]) -> None:
    for size in (len(stream), 1, 40):
        events = EventStream()
        for start in range(0, len(stream), size):
            events.feed(stream[start : start + size])
        assert events.tokens() == found


@pytest.mark.parametrize(
    "data", [b"", b"[", b"[]", b"\xff", b'"usage"', b'{"usage": {' + b"[" * 200_000]
)
def test_an_answer_without_counts_has_none(data: bytes) -> None:
    assert token_counts(data) == {}
    whole = PlainBody(is_json=True)
    assert whole.feed(data) == data
    assert whole.tokens() == {}


def test_large_answers_are_not_kept() -> None:
    answer = json.dumps({"usage": USAGE}).encode()
    small, large, other = PlainBody(True), PlainBody(True), PlainBody(False)
    for whole in (small, large, other):
        whole.feed(answer)
    large.feed(b" " * LONGEST_EVENT)
    assert small.tokens() == {"prompt": 3, "completion": 4}
    assert large.tokens() == other.tokens() == {}


def test_flags_win_over_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MOE_PRUNE_BACKENDS", "a=http://one:8000/v1/, b=http://two")
    monkeypatch.setenv("MOE_PRUNE_PORT", "9000")
    monkeypatch.setenv("MOE_PRUNE_HOST", "0.0.0.0")
    monkeypatch.setenv("MOE_PRUNE_API_KEYS", "k1, k2,")
    keys = tmp_path / "keys"
    keys.write_text("k3\n")
    settings = load_settings({"port": 9001, "host": None, "api_key_file": keys})
    assert settings.backends == BACKENDS
    assert (settings.port, settings.host) == (9001, "0.0.0.0")
    assert [key.get_secret_value() for key in settings.api_keys] == ["k1", "k2", "k3"]
    assert "k1" not in repr(settings) + settings.model_dump_json()


def test_a_key_is_what_stands_in_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"backends": {"a": "http://one"}}
    for value, expected in (("key\n", "key"), (" \n", None), ("", None)):
        monkeypatch.setenv("MOE_PRUNE_BACKEND_API_KEY", value)
        key = load_settings(given).backend_api_key
        assert (key and key.get_secret_value()) == expected
    for value in ("two\nlines", "kéy"):
        monkeypatch.setenv("MOE_PRUNE_BACKEND_API_KEY", value)
        with pytest.raises(GatewayError, match="one line of printable ASCII") as raised:
            load_settings(given)
        assert value not in str(raised.value)


@pytest.mark.parametrize(
    ("origins", "said"),
    [
        ("page.example", "'page.example' is not an origin"),
        ("https://page.example/path", "is not an origin"),
        ("*", "set MOE_PRUNE_API_KEYS too"),
    ],
)
def test_origins_that_are_refused(
    origins: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_PRUNE_ALLOWED_ORIGINS", origins)
    with pytest.raises(GatewayError, match=re.escape(said)):
        load_settings({"backends": {"a": "http://one"}})
    if origins == "*":
        monkeypatch.setenv("MOE_PRUNE_API_KEYS", "key")
        assert load_settings({"backends": {"a": "http://one"}}).allowed_origins == (
            "*",
        )


@pytest.mark.parametrize(
    ("host", "allowed", "names"),
    [
        ("127.0.0.1", (), {"localhost"}),
        ("localhost", ("Mine",), {"localhost", "mine"}),
        ("0.0.0.0", (), None),
        ("0.0.0.0", ("localhost", "gateway"), {"localhost", "gateway"}),
    ],
)
def test_names_by_which_the_gateway_is_reached(
    host: str, allowed: tuple[str, ...], names: set[str] | None
) -> None:
    found = GatewaySettings(host=host, allowed_hosts=allowed).host_names
    assert found == names


@pytest.mark.parametrize(
    ("data", "model"),
    [
        (b'{"x": [{"model": "no"}, "\\"", "model"], "model": "m"}', "m"),
        (b'{"model": "a", "model": "b"}', "b"),
        (rb'{"mod\u0065l": "\u006d"}', "m"),
        (b' {"model": "m", "x": [[], {}, -0.5e-3, null]}\n', "m"),
        (b'{"model": "m", "x": "' + "ü".encode() + b'"}', "m"),
    ],
)
def test_the_model_is_found_in_any_json(data: bytes, model: str) -> None:
    assert model_of(data) == model


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b'{"model": "m", "x": [1,]}', "invalid_json"),
        (b'{"model": "m"} x', "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"x": ' + b"[" * 100_000, "invalid_json"),
        (b'{"model": 1}', "model_required"),
        (b'{"x": {"model": "m"}}', "model_required"),
        (b'["model", "m"]', "model_required"),
    ],
)
def test_a_body_that_names_no_model_is_refused(data: bytes, code: str) -> None:
    with pytest.raises(ApiError) as raised:
        model_of(data)
    assert raised.value.code == code


def test_reading_the_model_builds_nothing_of_the_rest() -> None:
    body = b'{"x": [' + b"[],{}," * 1_000_000 + b'[]], "model": "m"}'
    tracemalloc.start()
    try:
        assert model_of(body) == "m"
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "no backend; give --backend NAME=URL"),
        ("--backend http://x", "'http://x' is not NAME=URL"),
        ("--backend a=x", "'x' is not an http:// or https:// address"),
        ("--backend a=http://u:p@x", "leave out user"),
        ("--backend a=http://x:99999", "'http://x:99999' has a port that is none"),
        ("--backend a=http://x:abc", "'http://x:abc' has a port that is none"),
        ("--backend a/b=http://x", "name 'a/b' may only have letters"),
        ("--backend a=http://x --backend a=http://y", "two backends are called 'a'"),
        ("--backend a=http://x --port 70000", "port: "),
        ("--backend a=http://x --max-body-mib 0", "max_body_mib: "),
        ("--backend a=http://x --read-timeout-s inf", "read_timeout_s: "),
        ("--backend a=http://x --api-key-file none", "none: No such file"),
        ("--backend a=http://x --api-key-file empty", "empty: no key in it"),
        ("--backend a=http://x --api-key-file binary", "binary: byte 1 is not UTF-8"),
        ("--backend a=http://x --api-key-file fifo", "fifo: is not a regular file"),
        ("--backend a=http://x --api-key-file .", ".: is not a regular file"),
        ("--backend a=http://x --api-key-file huge", "huge: is larger than 1 MiB"),
        ("--backend a=http://x --host 203.0.113.1", "cannot listen on 203.0.113.1"),
    ],
)
def test_what_is_refused_is_one_line(
    arguments: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"a\xff")
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(6 << 30)
    ran = run_cli(f"gateway {arguments}", monkeypatch, capsys)
    assert ran.status == 2
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert said in ran.stderr


def test_without_the_gateway_its_command_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gateway, "PACKAGE", "no_such_package")
    app = typer.Typer()
    app.callback()(lambda: None)
    gateway.add_gateway(app, panel="Serve")
    monkeypatch.setattr(cli, "app", app)
    line = "vllm-moe-prune gateway --backend a=http://b --port 1"
    monkeypatch.setattr(sys, "argv", line.split())
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    said = capsys.readouterr()
    assert said.out == ""
    assert "pip install moe-prune-gateway" in said.err
    assert said.err.count("\n") == 1


def test_the_documentation_names_every_setting_and_metric() -> None:
    text = (ROOT / "docs" / "serving" / "gateway.md").read_text("utf-8")
    names = {f"{PREFIX}{name}".upper() for name in GatewaySettings.model_fields}
    names |= {metric.name for metric in Metrics().registry.collect()}
    assert {name for name in names if f"`{name}" not in text} == set()


@pytest.mark.parametrize("status", [400, 401, 404, 408, 429, 503])
def test_refusals_are_errors_of_the_openai_api(status: int) -> None:
    refusal = ApiError(status, "some_code", "What, and why.", 5)
    error = json.loads(refusal.body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert refusal.sse_event.startswith(b"data: {")
    assert refusal.sse_event.endswith(b"}\n\n")
    headers = refusal.response().headers
    assert headers["retry-after"] == "5"
    assert ("www-authenticate" in headers) == (status == 401)
