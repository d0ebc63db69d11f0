"""Answers of a served model to prompts: greedy ones, sampled ones, and what they show.

Everything goes through ``/v1/completions`` of a real server as token ids, with every
sampling setting given, so that nothing in generation_config.json hides a loop.
"""

import asyncio
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import httpx
from pydantic import Field, ValidationError

from ..errors import EvaluationError
from ..files.json_file import parse_json
from ..files.regular import MIB
from ..progress import Progress, Report
from ..recipes.schema import first_problem
from .divergence import Agreement, Likeliest, compare_steps
from .loops import common_prefix, repetition, suffix_cycle
from .prompts import Prompts
from .saved_results import Printed
from .tasks import CONCURRENT, Endpoint, connection

LIKELIEST = 20
"""Log-probabilities asked for per token: the most that vLLM gives by default."""
PLAIN = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_p"), 0.0),
    "repetition_penalty": 1.0,
    "top_k": 0,
}
"""No penalties, whatever generation_config.json says: they would hide loops."""
GREEDY = {"temperature": 0.0, "top_p": 1.0}
SAMPLED = {"temperature": 0.7, "top_p": 0.95}
MAX_ANSWER_BYTES = 64 * MIB
"""Of one response; 20 log-probabilities of 8,192 tokens take about 16 MiB."""
TIMEOUT_S = 3600
"""On CPUs a request waits long behind the others."""


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    tokens: tuple[int, ...]
    """Without the token that ends an answer."""
    text: str
    ended: bool
    """By itself, not by the limit of tokens."""


@dataclass(frozen=True, kw_only=True)
class Habits:
    """What answers of one kind have in common; definitions in docs/methods.md."""

    answers: int
    length: float
    """Mean tokens."""
    ended: float
    """Share that ended by itself."""
    repetition: float
    """Mean share of 4-grams that stood in the answer before."""
    loops: float
    """Share of the answers that end in a cycle."""


@dataclass(frozen=True)
class Steps:
    """How an answer was chosen, to be compared with another model."""

    chosen: tuple[int, ...]
    """With the token that ends it."""
    likeliest: tuple[Likeliest, ...]


@dataclass(frozen=True, kw_only=True)
class Generated:
    """All that one model said to some prompts."""

    prompts: Prompts
    new_tokens: int
    greedy: tuple[Answer, ...]
    sampled: tuple[Answer, ...]
    steps: tuple[Steps, ...]
    """Of the greedy answers."""
    against: Agreement | None
    """With the original, if it was asked too."""

    def as_data(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        every = zip(self.prompts.texts, self.greedy, self.sampled, strict=True)
        return {
            "prompts": self.prompts.source,
            "prompts_sha256": self.prompts.sha256,
            "new_tokens": self.new_tokens,
            "greedy": asdict(habits(self.greedy)),
            "sampled": asdict(habits(self.sampled)),
            "against": asdict(self.against) if self.against else None,
            "answers": [
                {"prompt": prompt, "greedy": greedy.text, "sampled": sampled.text}
                for prompt, greedy, sampled in every
            ],
        }


def habits(answers: Sequence[Answer]) -> Habits:
    """What some answers, at least one, have in common."""
    return Habits(
        answers=len(answers),
        length=statistics.fmean(len(one.tokens) for one in answers),
        ended=statistics.fmean(one.ended for one in answers),
        repetition=statistics.fmean(repetition(one.tokens) for one in answers),
        loops=statistics.fmean(suffix_cycle(one.tokens) is not None for one in answers),
    )


def generate(
    endpoint: Endpoint,
    prompts: Prompts,
    new_tokens: int,
    original: Generated | None,
    report: Report,
) -> Generated:
    """Have a served model answer, and compare it with the original's answers.

    Args:
        endpoint: Who is asked.
        prompts: What.
        new_tokens: At most so many per answer.
        original: What the original said to the same prompts.
        report: Called after every prompt.

    Raises:
        EvaluationError: A prompt is too long, or the server failed.
    """
    for number, ids in enumerate(prompts.ids, 1):
        # One more: to score an answer the server makes a token behind it.
        if len(ids) + new_tokens + 1 > endpoint.max_length:
            raise EvaluationError(
                f"{prompts.source}: prompt {number} has {len(ids)} tokens, with "
                f"{new_tokens} new ones more than the {endpoint.max_length} that "
                f"{endpoint.url} takes. Lower --new-tokens, or leave it out."
            )
    found = asyncio.run(_ask(endpoint, prompts, new_tokens, original, report))
    greedy, sampled, steps, scored = zip(*found, strict=True)
    return Generated(
        prompts=prompts,
        new_tokens=new_tokens,
        greedy=greedy,
        sampled=sampled,
        steps=steps,
        against=None if original is None else _agreement(original, steps, scored),
    )


_Found = tuple[Answer, Answer, Steps, tuple[Likeliest, ...]]


def _agreement(
    original: Generated,
    steps: Sequence[Steps],
    scored: Sequence[Sequence[Likeliest]],
) -> Agreement:
    """What the model makes of the original's greedy answers, and of its own."""
    counts = [
        compare_steps(step.chosen, step.likeliest, model)
        for step, model in zip(original.steps, scored, strict=True)
    ]
    tokens = sum(len(step.chosen) for step in original.steps)
    return Agreement(
        tokens=tokens,
        agreement=sum(same for same, _ in counts) / tokens,
        prefix=statistics.fmean(
            # Of chosen tokens, with the end: an answer that ends too soon differs.
            common_prefix(ours.chosen, theirs.chosen) / len(theirs.chosen)
            for ours, theirs in zip(steps, original.steps, strict=True)
        ),
        kl=sum(divergence for _, divergence in counts) / tokens,
    )


async def _ask(
    endpoint: Endpoint,
    prompts: Prompts,
    new_tokens: int,
    original: Generated | None,
    report: Report,
) -> list[_Found]:
    """Every prompt, some at a time; vLLM batches them."""
    free = asyncio.Semaphore(CONCURRENT)
    done = 0

    async with httpx.AsyncClient(
        **connection(endpoint.url), timeout=TIMEOUT_S
    ) as client:
        asker = _Asker(client, endpoint)

        async def one(number: int) -> _Found:
            nonlocal done
            ids = prompts.ids[number]
            async with free:
                greedy, step = await asker.answer(
                    ids, new_tokens, {**GREEDY, "logprobs": LIKELIEST}
                )
                # A seed of its own: equal prompts need not get equal answers.
                sampled, _ = await asker.answer(
                    ids, new_tokens, {**SAMPLED, "seed": number}
                )
                scored: tuple[Likeliest, ...] = ()
                if original is not None:
                    scored = await asker.score(ids, original.steps[number].chosen)
            done += 1
            report(_progress(done, len(prompts.ids)))
            return greedy, sampled, step, scored

        return await asyncio.gather(*map(one, range(len(prompts.ids))))


def _progress(done: int, count: int) -> Progress:
    return Progress(
        stage="generate",
        layer=0,
        layers=0,
        bytes_done=done,
        bytes_total=count,
        counted="steps",
    )


Logarithm = Annotated[float, Field(ge=-1e5, le=1e-3)]
Id = Annotated[int, Field(ge=0, lt=1 << 31)]


class _Logprobs(Printed):
    top_logprobs: tuple[dict[str, Logarithm], ...]


class _Given(Printed):
    logprob: Logarithm


class _Choice(Printed):
    text: str
    finish_reason: str
    token_ids: tuple[Id, ...]
    logprobs: _Logprobs | None = None
    prompt_logprobs: tuple[dict[Id, _Given] | None, ...] | None = None


class _Completion(Printed):
    choices: Annotated[tuple[_Choice, ...], Field(min_length=1, max_length=1)]


class _Asker:
    """Requests to one server."""

    def __init__(self, client: httpx.AsyncClient, endpoint: Endpoint) -> None:
        self._client = client
        self._endpoint = endpoint

    async def answer(
        self, ids: Sequence[int], new_tokens: int, settings: Mapping[str, Any]
    ) -> tuple[Answer, Steps]:
        """An answer, and how each of its tokens was chosen, if that was asked for."""
        choice = await self._complete(ids, max_tokens=new_tokens, **settings)
        ended = choice.finish_reason == "stop"
        tokens = choice.token_ids
        if not 0 < len(tokens) <= new_tokens:
            raise self._odd(f"{len(tokens)} tokens for {new_tokens} at most")
        likeliest: tuple[Likeliest, ...] = ()
        if choice.logprobs is not None:
            likeliest = tuple(map(self._by_id, choice.logprobs.top_logprobs))
        if "logprobs" in settings and len(likeliest) != len(tokens):
            raise self._odd("not the log-probabilities of every token")
        said = tokens[:-1] if ended else tokens
        return Answer(said, choice.text, ended), Steps(tokens, likeliest)

    async def score(
        self, ids: Sequence[int], answer: Sequence[int]
    ) -> tuple[Likeliest, ...]:
        """What the model expects at each token of an answer that is given."""
        choice = await self._complete(
            [*ids, *answer], max_tokens=1, prompt_logprobs=LIKELIEST, **GREEDY
        )
        rows = (choice.prompt_logprobs or ())[len(ids) :]
        if len(rows) != len(answer) or not all(rows):
            raise self._odd("not the log-probabilities of every token of the prompt")
        return tuple(
            {token: given.logprob for token, given in (row or {}).items()}
            for row in rows
        )

    async def _complete(self, ids: Sequence[int], **settings: Any) -> _Choice:
        body = {
            "model": self._endpoint.model,
            "prompt": list(ids),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **PLAIN,
            **settings,
        }
        url = f"{self._endpoint.url}/completions"
        try:
            async with self._client.stream("POST", url, json=body) as response:
                data = bytearray()
                async for part in response.aiter_bytes():
                    data += part
                    if len(data) > MAX_ANSWER_BYTES:
                        raise self._odd(f"more than {MAX_ANSWER_BYTES // MIB} MiB")
                if response.status_code != 200:
                    said = " ".join(data.decode("utf-8", "replace").split())[:400]
                    raise self._odd(f"status {response.status_code}: {said}")
        except httpx.HTTPError as error:
            raise EvaluationError(
                f"{url}: {type(error).__name__}: {error}. See what the server says."
            ) from error
        try:
            (choice,) = _Completion.model_validate(parse_json(bytes(data))).choices
        except ValidationError as error:
            said = f"no completion with token ids: {first_problem(error)}"
            raise self._odd(said) from error
        except ValueError as error:
            raise self._odd("no JSON") from error
        return choice

    def _by_id(self, row: Mapping[str, float]) -> Likeliest:
        # vLLM's return_tokens_as_token_ids: "token_id:7".
        found = {key.removeprefix("token_id:"): value for key, value in row.items()}
        if not all(key.isascii() and key.isdigit() for key in found):
            raise self._odd("tokens without their ids")
        return {int(key): value for key, value in found.items()}

    def _odd(self, what: str) -> EvaluationError:
        return EvaluationError(
            f"{self._endpoint.url}: asked for {self._endpoint.model}'s answer it gave "
            f"{what}. Ask a vLLM server."
        )
