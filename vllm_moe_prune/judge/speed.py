"""Prefill and decode speed through ``vllm bench serve``, one request at a time."""

import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.config_values import positive
from ..checkpoint.open import Checkpoint
from ..checkpoint.tokenizer import TRUST, needs_code, tokenizer_folder
from ..errors import EvaluationError
from ..files.json_file import read_json
from ..plugin.launch import find_vllm
from .quality import Subject
from .saved_results import RESULT
from .server import Server, peak_memory

CONTEXTS = (128, 512, 1024, 2048)
MAX_LENGTH = "--max-model-len"
UNITS = {"k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}
"""What vLLM takes behind a number of tokens."""


@dataclass(frozen=True)
class Sweep:
    """What is measured."""

    contexts: tuple[int, ...]
    """Prompt lengths in tokens."""
    new_tokens: int
    repeats: int
    flags: tuple[str, ...] = ()
    """For every server alike."""


@dataclass(frozen=True)
class Spread:
    """Tokens per second over repeats."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class AtContext:
    """Speed with prompts of one length."""

    context: int
    prefill: Spread
    """Prompt tokens over the time to the first new token."""
    decode: Spread
    """New tokens after the first over the time they took."""


@dataclass(frozen=True)
class Speed:
    """What one server did."""

    contexts: tuple[AtContext, ...]
    peak_bytes: int
    """See ``server.peak_memory``. Of a GPU's memory it says nothing: vLLM fills that up
    to --gpu-memory-utilization whatever the model."""


def parse_contexts(text: str) -> list[int]:
    """The whole numbers in ``128,512``.

    Raises:
        EvaluationError: They are none.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise EvaluationError(
            f"contexts {text!r}: write whole numbers, e.g. 128,512,2048."
        ) from error


def sweep_for(
    checkpoints: Iterable[Checkpoint],
    contexts: Sequence[int] | None,
    new_tokens: int,
    repeats: int,
    flags: Sequence[str],
) -> Sweep:
    """The sweep that every checkpoint can take.

    Args:
        checkpoints: All that will be measured.
        contexts: Prompt lengths; None: ``CONTEXTS``, as far as the models go.
        new_tokens: To generate after each prompt.
        repeats: Requests per context.
        flags: For vLLM.

    Raises:
        EvaluationError: A context and its new tokens are more than a model takes.
    """
    # The shortest of all models: every row has the same contexts.
    most = min(
        positive(one.config, "max_position_embeddings", one.folder / "config.json")
        for one in checkpoints
    )
    told = _length_in(flags)
    room = min(most, told or most) - new_tokens
    if contexts is None:
        # Contexts that are too long become one, the longest prompt that fits.
        contexts = [min(context, room) for context in CONTEXTS]
    asked = tuple(sorted(set(contexts)))
    if not asked or asked[0] < 2 or asked[-1] > room:
        raise EvaluationError(
            f"contexts {', '.join(map(str, asked))} with {new_tokens} new tokens: the "
            f"models take 2 to {room} tokens of prompt. Give others, or fewer new "
            "tokens."
        )
    # The warm-up sends the first prompt: cached, its prefill would cost little.
    own = ["--no-enable-prefix-caching"]
    if told is None:
        # Else vLLM does not start unless the model's longest context fits the KV cache.
        own += [MAX_LENGTH, str(asked[-1] + new_tokens)]
    # The user's flags come last: of a flag given twice argparse takes the last.
    return Sweep(asked, new_tokens, repeats, (*own, *flags))


def _length_in(flags: Sequence[str]) -> int | None:
    """The longest prompt and answer that flags for vLLM allow; None: they do not say.

    Raises:
        EvaluationError: The number is none.
    """
    told = None
    for at, flag in enumerate(flags):
        name, equals, value = flag.partition("=")
        # vLLM's parser reads underscores in flags as hyphens.
        if name.replace("_", "-") == MAX_LENGTH:
            told = value if equals else "".join(flags[at + 1 : at + 2])
    if told is None:
        return None
    # As human_readable_int in vllm/utils/argparse_utils.py: 1k is 1000, 1K is 1024.
    number, unit = told[:-1], UNITS.get(told[-1:])
    try:
        length = round(float(number) * unit) if unit else int(told)
    except ValueError:
        length = 0
    # vLLM also takes -1 and auto, which tell no number of tokens.
    if length < 1:
        raise EvaluationError(
            f"{MAX_LENGTH} {told}: speeds need a number of tokens there, or no such "
            "flag."
        )
    return length


def measure_speed(subject: Subject, sweep: Sweep) -> Speed:
    """Serve a checkpoint and time it.

    Raises:
        MoePruneError: It cannot be served, or a request failed.
    """
    folder, trusted = subject.checkpoint.folder, subject.checkpoint.trust_code
    code = needs_code(folder, trust_code=trusted)
    with (
        tokenizer_folder(folder, trust_code=trusted) as tokenizer,
        subject.serve(sweep.flags) as server,
    ):
        found = [
            measure_context(server, tokenizer, context, sweep, trust_code=code)
            for context in sweep.contexts
        ]
        return Speed(tuple(found), peak_memory(server.group))


def measure_context(
    server: Server,
    tokenizer: Path,
    context: int,
    sweep: Sweep,
    *,
    trust_code: bool = False,
) -> AtContext:
    """Send some requests of one length to a server, one at a time.

    Raises:
        EvaluationError: The benchmark or one of its requests failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(find_vllm(), "bench", "serve", "--backend", "openai"),
            *("--base-url", server.url, "--model", server.model),
            # With random prompts the benchmark ignores EOS: answers have full length.
            *("--tokenizer", str(tokenizer), "--dataset-name", "random"),
            *("--random-input-len", str(context)),
            *("--random-output-len", str(sweep.new_tokens)),
            *("--num-prompts", str(sweep.repeats), "--num-warmups", "1"),
            *("--max-concurrency", "1", "--temperature", "0", "--disable-tqdm"),
            # Without --save-detailed the times of single requests are left out.
            *("--save-result", "--save-detailed"),
            *([TRUST] if trust_code else ()),
            *("--result-dir", folder, "--result-filename", "result.json"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        result = Path(folder) / "result.json"
        if done.returncode or not result.is_file():
            said = " ".join(done.stderr.splitlines()[-3:])[-400:]
            raise EvaluationError(
                f"vllm bench serve ended with status {done.returncode}: {said}"
            )
        return at_context(context, read_json(result, RESULT))


def at_context(context: int, result: dict[str, Any]) -> AtContext:
    """The speeds in what ``vllm bench serve --save-detailed`` wrote.

    Raises:
        EvaluationError: A request failed.
    """
    # vllm bench serve may end with status 0 although requests failed.
    if failed := [error for error in result["errors"] if error]:
        said = failed[0].strip().splitlines()[-1]
        raise EvaluationError(
            f"{len(failed)} of {len(result['errors'])} requests with {context} tokens "
            f"failed: {said}"
        )
    requests = list(
        zip(
            result["input_lens"],
            result["output_lens"],
            result["ttfts"],
            result["itls"],
            strict=True,
        )
    )
    if not all(sum(gaps) > 0 and first > 0 for *_, first, gaps in requests):
        raise EvaluationError(
            f"requests with {context} tokens: an answer came in one piece, so decoding "
            "cannot be timed. Do not buffer the stream, or ask for more tokens."
        )
    return AtContext(
        context,
        # Time to first token includes HTTP and scheduling: the model itself is faster.
        prefill=_spread([tokens / first for tokens, _, first, _ in requests]),
        # Tokens may come several at a time; the time between arrivals is all the time.
        decode=_spread([(new - 1) / sum(gaps) for _, new, _, gaps in requests]),
    )


def _spread(rates: Sequence[float]) -> Spread:
    return Spread(statistics.median(rates), min(rates), max(rates))
