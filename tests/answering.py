"""A server on this machine that answers ``/v1/completions`` as it is told to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MAX_LENGTH = 512
Reply = Callable[[dict[str, Any]], Any]
"""A request's body -> the answer: bytes as they are, a number as a status, JSON."""


@contextmanager
def answering(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and the requests for completions that have come in."""
    seen: list[dict[str, Any]] = []

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            model = {"id": "judged", "max_model_len": MAX_LENGTH}
            self._send(200, json.dumps({"data": [model]}).encode())

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            seen.append(json.loads(self.rfile.read(length)))
            said = reply(seen[-1])
            if isinstance(said, int):
                self._send(said, b'{"error": "told to fail"}')
            elif isinstance(said, bytes):
                self._send(200, said)
            else:
                self._send(200, json.dumps(said).encode())

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def completion(
    tokens: list[int], *, ended: bool = False, text: str = "said"
) -> dict[str, Any]:
    """What vLLM answers where token ids and log-probabilities are asked for."""
    choice = {
        "text": text,
        "finish_reason": "stop" if ended else "length",
        "token_ids": tokens,
        "logprobs": {"top_logprobs": [{f"token_id:{one}": -0.5} for one in tokens]},
    }
    return {"choices": [choice]}


def scores(prompt: list[int]) -> dict[str, Any]:
    """What vLLM answers where the log-probabilities of a prompt are asked for."""
    found = completion([3])
    rows = [{str(one): {"logprob": -0.5, "rank": 1}} for one in prompt[1:]]
    found["choices"][0]["prompt_logprobs"] = [None, *rows]
    return found
