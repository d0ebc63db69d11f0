"""A server that answers as vLLM does, told by each request how to behave.

    python tests/stub_backend.py PORT MODEL [PLUGIN_FOLDER]

A real HTTP server in a process of its own, so that it can be killed. A JSON body may
have ``"stub": {...}`` with ``events`` and ``size`` of a stream, ``gap_s`` between them,
``first_s`` before the head, ``half`` to end with half an event and then hang,
``tail_s`` between the last event and the end of the stream.
``/stub/seen`` tells what has come in, and how it went.
"""

import asyncio
import hashlib
import json
import mimetypes
import sys
from pathlib import Path
from typing import Any

import uvicorn

PORT, MODEL = int(sys.argv[1]), sys.argv[2]
PLUGIN = Path(sys.argv[3]) if len(sys.argv) > 3 else None
PAGES = Path(__file__).resolve().parents[1] / "serve" / "moe_prune_gateway" / "pages"
RAW = "surrogateescape"  # not every header is UTF-8
# As of a server that lets every page in; vLLM's own default lets none.
CORS = [(b"access-control-allow-origin", b"*"), (b"access-control-allow-headers", b"*")]
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}

seen: list[dict[str, Any]] = []


async def app(scope: Any, receive: Any, send: Any) -> None:
    """The whole server, without a framework: it is also what benchmarks call."""
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    path = scope["path"]
    if scope["method"] == "OPTIONS":
        await answer(send, 200, "")
    elif path == "/stub/seen":
        await answer(send, 200, seen)
    elif path in {"/health", "/v1/models"}:
        models = [{"id": MODEL, "object": "model", "owned_by": "stub"}]
        await answer(send, 200, {"object": "list", "data": models})
    elif path.startswith("/plugins/moe-prune/"):
        await plugin(send, path.rpartition("/")[2])
    else:
        entry = {
            "method": scope["method"],
            "path": scope["raw_path"].decode(),
            "query": scope["query_string"].decode(),
            "headers": [
                (n.decode(), v.decode("utf-8", RAW)) for n, v in scope["headers"]
            ],
            "sha256": hashlib.sha256(body).hexdigest(),
            "ended": "no",
        }
        seen.append(entry)
        del seen[:-100]
        await converse(scope, receive, send, body, entry)


async def plugin(send: Any, name: str) -> None:
    """What the endpoint plugin hands out, from files: data, else the pages."""
    found = list(PLUGIN.glob(f"{name}.*")) if PLUGIN and name else []
    found += [path for path in PAGES.iterdir() if path.name == (name or "index.html")]
    if not found:
        message = "This server has no such thing."
        await answer(send, 404, {"error": {"message": message}})
        return
    await start(send, 200, mimetypes.guess_type(found[0])[0] or "")
    await send({"type": "http.response.body", "body": found[0].read_bytes()})


async def converse(
    scope: Any, receive: Any, send: Any, body: bytes, entry: dict[str, Any]
) -> None:
    """One request of the OpenAI API; any other path is an echo."""
    if not scope["path"].endswith("/completions"):
        kind = dict(scope["headers"]).get(b"content-type", b"text/plain").decode()
        await start(send, 201, kind, [(b"x-stub", b"a"), (b"x-stub", b"b")])
        await send({"type": "http.response.body", "body": body})
        entry["ended"] = "complete"
        return
    try:
        request = json.loads(body)
    except ValueError:
        await answer(send, 400, {"error": {"message": "the stub got no JSON"}})
        return
    wishes = request.get("stub", {})
    await asyncio.sleep(wishes.get("first_s", 0))
    if not request.get("stream"):
        await answer(send, 200, completion("chat.completion", "message", "Hello!"))
        entry["ended"] = "complete"
        return
    leaving = asyncio.ensure_future(receive())
    await start(send, 200, "text/event-stream; charset=utf-8")
    text = "word " * (wishes.get("size", 5) // 5)
    piece = event(completion("chat.completion.chunk", "delta", text, usage=False))
    for _ in range(wishes.get("events", 3)):
        if leaving.done():
            entry["ended"] = "cancelled"
            return
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        if gap := wishes.get("gap_s"):
            await asyncio.wait([leaving], timeout=gap)
    if wishes.get("half"):
        half = piece[: len(piece) // 2]
        await send({"type": "http.response.body", "body": half, "more_body": True})
        await leaving
        entry["ended"] = "cancelled"
        return
    # To a client that is gone uvicorn sends without ever waiting: let the failed write,
    # what it wakes, and then `leaving` run.
    for _ in range(3):
        await asyncio.sleep(0)
    if leaving.done():
        entry["ended"] = "cancelled"
        return
    last = completion("chat.completion.chunk", "delta", "")
    rest = event(last) + b"data: [DONE]\n\n"
    if tail_s := wishes.get("tail_s"):
        await send({"type": "http.response.body", "body": rest, "more_body": True})
        rest = b""
        await asyncio.sleep(tail_s)
    await send({"type": "http.response.body", "body": rest})
    entry["ended"] = "complete"
    leaving.cancel()


def completion(kind: str, part: str, text: str, usage: bool = True) -> dict[str, Any]:
    """An answer, or a piece of one."""
    choice = {"index": 0, part: {"role": "assistant", "content": text}}
    made = {"id": "stub-1", "object": kind, "created": 1, "model": MODEL}
    made |= {"choices": [choice | {"finish_reason": "stop" if usage else None}]}
    return made | ({"usage": USAGE} if usage else {})


def event(data: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


async def answer(send: Any, status: int, data: object) -> None:
    """JSON, as Starlette writes it."""
    body = json.dumps(data, separators=(",", ":")).encode()
    length = (b"content-length", str(len(body)).encode())
    await start(send, status, "application/json", [length])
    await send({"type": "http.response.body", "body": body})


async def start(send: Any, status: int, kind: str, more: Any = ()) -> None:
    """The head of an answer."""
    headers = [(b"content-type", kind.encode()), *CORS, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", ws="none")
