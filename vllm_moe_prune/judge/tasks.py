"""Tasks of lm-eval, asked through the OpenAI-compatible API of a server.

One way for every model: lm-eval's own ``local-completions`` against a server that runs
already, or one that is started for it. So a pruned checkpoint is judged by the same
process that will serve it, and two models are never in memory together.
"""

import io
import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from ..errors import EvaluationError, require_extra
from .recovery import Score

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

ZERO_SHOT = (
    *("arc_challenge", "boolq", "hellaswag", "mmlu"),
    *("openbookqa", "piqa", "rte", "winogrande"),
)
"""UNIFIED's suite, Tables 2 to 7."""
GROUPS = {"zero-shot": ZERO_SHOT, "paper": (*ZERO_SHOT, "gsm8k")}
"""Names for several tasks at once, besides lm-eval's own."""
METRICS = ("acc_norm", "acc", "exact_match")
"""What a task is judged by: the first of these that it has, else its first."""
FILTERS = ("none", "flexible-extract")
"""Which of several ways to read an answer counts: likewise."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONCURRENT = 16
"""Requests on their way at a time; vLLM batches them."""


@dataclass(frozen=True)
class Endpoint:
    """A server that answers, and the model to ask there."""

    url: str
    """Up to and with ``/v1``."""
    model: str
    max_length: int
    """Tokens of prompt and answer together."""


@dataclass(frozen=True)
class Suite:
    """Tasks that have been found, data and all."""

    names: tuple[str, ...]
    """Of tasks and of groups with a score of their own, each of which is one row."""
    manager: "TaskManager"


def find_endpoint(server: str, model: str | None) -> Endpoint:
    """Ask a server what it serves.

    Args:
        server: Its address, with or without ``/v1``. A key that it needs is read from
            ``OPENAI_API_KEY``, as lm-eval does.
        model: Which model to ask; None: the only one there is.

    Raises:
        EvaluationError: It does not answer, or serves no such model.
    """
    url = server.rstrip("/").removesuffix("/v1") + "/v1"
    try:
        answer = httpx.get(f"{url}/models", timeout=30, **connection(url))
        answer.raise_for_status()
        found = {str(one["id"]): one for one in answer.json()["data"]}
    # Of a proxy variable that is wrong, or needs a package: ValueError, ImportError.
    except (httpx.HTTPError, httpx.InvalidURL, ImportError) as error:
        raise EvaluationError(
            f"{server}: no server answers there ({error}). Start one with "
            "`vllm-moe-prune serve CKPT`, or leave out --server."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{server}: answers, but not with a list of models. Give the address of "
            "an OpenAI-compatible server."
        ) from error
    if model is None and len(found) == 1:
        (model,) = found
    if model not in found:
        asked = "serves several models" if model is None else f"does not serve {model}"
        raise EvaluationError(
            f"{server}: {asked}. Give --model, one of: {', '.join(sorted(found))}."
        )
    length = found[model].get("max_model_len")
    if not isinstance(length, int) or length < 2:
        raise EvaluationError(
            f"{server}: does not say how many tokens {model} takes (max_model_len). "
            "vLLM does; ask a vLLM server."
        )
    return Endpoint(url, model, length)


def connection(url: str) -> dict[str, Any]:
    """How httpx is to reach a server: its key, and whether through a proxy.

    Raises:
        httpx.InvalidURL: It is no address.
    """
    key = os.environ.get("OPENAI_API_KEY", "")
    return {
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        # This machine's own addresses are not behind a proxy.
        "trust_env": httpx.URL(url).host not in LOOPBACK,
    }


def find_tasks(
    names: Sequence[str], folder: Path | None, *, bars: bool = False
) -> Suite:
    """Load tasks with their data, before anything that takes long is started.

    Args:
        names: Of tasks, of lm-eval's groups and tags, or of ``GROUPS``.
        folder: Task files of one's own. They may run Python code, as lm-eval's do.
        bars: Whether libraries may draw their progress bars on stderr.

    Raises:
        EvaluationError: One is unknown or broken, or its data cannot be had.
    """
    require_extra("eval", ("lm_eval",), "tasks")
    if folder is not None and not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder of task files.")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked = tuple(dict.fromkeys(one for name in names for one in _members(name)))
    try:
        # Those that come with lm-eval take 15 s to index.
        manager = TaskManager(
            include_path=str(folder) if folder else None, include_defaults=False
        )
        if not set(asked) <= set(manager.all_tasks):
            manager = TaskManager(include_path=str(folder) if folder else None)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EvaluationError(f"{folder}: {_one_line(error)}") from error
    with _stderr(bars):
        rows = [row for name in asked for row in _rows(manager, name, folder)]
    return Suite(tuple(dict.fromkeys(rows)), manager)


def _members(name: str) -> tuple[str, ...]:
    return GROUPS.get(name, (name,))


def _rows(manager: "TaskManager", name: str, folder: Path | None) -> list[str]:
    """What is shown of a task, a group or a tag, which is a group without a score."""
    from datasets.exceptions import DatasetsError

    if name not in manager.all_tasks:
        where = "of lm-eval" if folder is None else f"in {folder} or of lm-eval"
        raise EvaluationError(
            f"{name!r}: no such task {where}. Groups of this tool are "
            f"{' and '.join(GROUPS)}; `lm-eval ls tasks` lists the others."
        )
    try:
        found = manager.load([name])
    except (ConnectionError, httpx.HTTPError, DatasetsError) as error:
        raise EvaluationError(
            f"{name}: its data set cannot be had ({_one_line(error)}). Without a data "
            "set hub, name a folder of task files of your own with --task-dir."
        ) from error
    except (OSError, *_BROKEN) as error:
        raise EvaluationError(
            f"{name}: its task file cannot be used: {_one_line(error)}"
        ) from error
    for task in found["tasks"].values():
        _check_metric(name, task.higher_is_better())
    group = found.get("groups", {}).get(name)
    if group is None:
        return list(found["tasks"])
    return [name] if group.has_aggregation else list(found["tasks"])


def _check_metric(name: str, better: dict[str, bool]) -> None:
    """Refuse what is judged by something of which less is better.

    Args:
        name: The task or its group.
        better: Metric -> whether higher is better.
    """
    metric = min(better, key=lambda one: _rank(f"{one},none"), default=None)
    if metric is not None and not better[metric]:
        raise EvaluationError(
            f"{name}: is judged by {metric}, of which less is better. Choose tasks "
            "with right answers; perplexity is measured with --text."
        )


# What lm-eval raises, depending on what is wrong with a task file.
_BROKEN = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(TypeError, ValueError, yaml.YAMLError),
)


def ask(
    suite: Suite,
    endpoint: Endpoint,
    tokenizer: Path,
    *,
    bars: bool = False,
    trust_code: bool = False,
) -> list[Score]:
    """Put all questions of some tasks to a server.

    Args:
        suite: The tasks.
        endpoint: Who is asked.
        tokenizer: A folder that transformers loads the checkpoint's tokenizer from.
        bars: As in ``find_tasks``.
        trust_code: Whether code in that folder may tokenize.

    Returns:
        Of each task, or group that has a score of its own, its main metric.

    Raises:
        EvaluationError: The server failed, or an answer was none.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.registry import get_model

    try:
        with _stderr(bars):
            model = get_model("local-completions")(
                base_url=f"{endpoint.url}/completions",
                model=endpoint.model,
                tokenizer=str(tokenizer),
                tokenizer_backend="huggingface",
                # lm-eval's default, main, is meant for the Hub; this is a folder.
                revision=None,
                trust_remote_code=trust_code,
                # As its own backends have it: the tokenizer says if there is a BOS.
                add_bos_token=True,
                # lm-eval itself keeps one of these tokens for the answer.
                max_length=endpoint.max_length,
                num_concurrent=CONCURRENT,
                # Seconds; on CPUs a request waits long behind the others.
                timeout=3600,
            )
            found = simple_evaluate(
                model,
                tasks=list(suite.names),
                task_manager=suite.manager,
                log_samples=False,
            )
    except (OSError, _client_error(), *_BROKEN) as error:
        raise EvaluationError(
            f"{endpoint.url}: asking {endpoint.model} failed: {_one_line(error)}"
        ) from error
    return [score_of(found, name) for name in suite.names]


def _client_error() -> type[Exception]:
    import aiohttp

    return aiohttp.ClientError


def score_of(found: dict[str, Any], name: str) -> Score:
    """The main score of a task or group in what lm-eval found.

    Raises:
        EvaluationError: There is none.
    """
    measured = found["results"].get(name, {})
    # lm-eval: `METRIC,FILTER` and `METRIC_stderr,FILTER`; other keys have no comma.
    keys = [
        key
        for key, value in measured.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]
    if not keys:
        raise EvaluationError(f"{name}: lm-eval gave no score for it.")
    key = min(keys, key=_rank)
    metric, _, way = key.partition(",")
    # Shares are 0 to 1, correlations such as mcc -1 to 1.
    if not -1 <= measured[key] <= 1:
        raise EvaluationError(
            f"{name}: {metric} is {measured[key]:g}, which is no share of answers."
        )
    # "N/A" where lm-eval has no standard error.
    error = measured.get(f"{metric}_stderr,{way}")
    return Score(
        task=name,
        metric=metric if way == "none" else key,
        value=float(measured[key]),
        stderr=float(error) if isinstance(error, int | float) else None,
        samples=_samples(found, name),
    )


def _rank(key: str) -> tuple[int, int]:
    """Smaller is preferred; among equals the first stays."""
    metric, _, way = key.partition(",")
    return (
        METRICS.index(metric) if metric in METRICS else len(METRICS),
        FILTERS.index(way) if way in FILTERS else len(FILTERS),
    )


def _samples(found: dict[str, Any], name: str) -> int:
    if name in found["n-samples"]:
        return int(found["n-samples"][name]["effective"])
    # A group has no count of its own: it is the sum over its tasks.
    members = found.get("group_subtasks", {}).get(name, [])
    return sum(_samples(found, member) for member in members)


def _stderr(bars: bool) -> AbstractContextManager[object]:
    """For libraries that draw bars whatever they are told; errors are exceptions."""
    return nullcontext() if bars else redirect_stderr(io.StringIO())


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
