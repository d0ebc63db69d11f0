"""A stand-in for vLLM's server: a test's function answers ``/v1/completions``."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.loopback import Handler, listening

MAX_LENGTH = 512
Reply = Callable[[dict[str, Any]], Any]
"""A request's body -> the answer: bytes as they are, a number as a status, JSON."""


@contextmanager
def answering(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and the requests for completions that have come in."""
    seen: list[dict[str, Any]] = []

    class Answer(Handler):
        def do_GET(self) -> None:
            model = {"id": "judged", "max_model_len": MAX_LENGTH}
            self.respond(200, json.dumps({"data": [model]}).encode())

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            seen.append(json.loads(self.rfile.read(length)))
            said = reply(seen[-1])
            if isinstance(said, int):
                self.respond(said, b'{"error": "told to fail"}')
            elif isinstance(said, bytes):
                self.respond(200, said)
            else:
                self.respond(200, json.dumps(said).encode())

    with listening(Answer) as url:
        yield url, seen


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
