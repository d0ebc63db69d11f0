"""Tasks and speeds from one real vLLM server, against plain transformers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MixtralForCausalLM
from typer.testing import CliRunner

from tests.tiny import sentences, tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cli import app
from vllm_moe_prune.errors import EvaluationError, ServeError
from vllm_moe_prune.judge import speed
from vllm_moe_prune.judge.divergence import kl_at_least
from vllm_moe_prune.judge.generation import LIKELIEST, Generated, Steps, generate
from vllm_moe_prune.judge.prompts import load_prompts
from vllm_moe_prune.judge.server import Server, peak_memory, resident, served
from vllm_moe_prune.judge.tasks import find_endpoint
from vllm_moe_prune.progress import ignore

pytestmark = pytest.mark.vllm

FLAGS = ["--enforce-eager", "--dtype", "float32", "--no-enable-prefix-caching"]
NEW = 6
CHOICE = """\
task: next
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
"""
WORD = """\
task: word
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("m") / "tiny", layers=2)


@pytest.fixture(scope="module")
def server(model: Path, offline: None) -> Iterator[Server]:
    with served(str(model), None, FLAGS) as found:
        yield found


class Naive:
    """The same questions to transformers, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = MixtralForCausalLM.from_pretrained(
            folder, dtype="float32", experts_implementation="eager"
        ).eval()

    @torch.no_grad()
    def likeliest(self, context: str, choices: list[str]) -> int:
        given = len(self.tokenizer(context).input_ids)
        found = []
        for choice in choices:
            ids = torch.tensor([self.tokenizer(f"{context} {choice}").input_ids])
            log_TV = self.model(ids).logits[0, :-1].log_softmax(-1)
            each_T = log_TV.gather(1, ids[0, 1:, None])[:, 0]
            found.append(float(each_T[given - 1 :].sum()))
        return found.index(max(found))

    @torch.no_grad()
    def greedy(self, context: str) -> str:
        ids = self.tokenizer(context, return_tensors="pt").input_ids
        out = self.model.generate(ids, max_new_tokens=NEW, do_sample=False)
        text: str = self.tokenizer.decode(
            out[0, ids.shape[1] :], skip_special_tokens=True
        )
        return text

    @torch.no_grad()
    def steps(self, ids: tuple[int, ...]) -> tuple[tuple[int, ...], torch.Tensor]:
        """The tokens of the greedy answer, and log-probabilities [T, V] at each."""
        out = self.model.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False
        )[0].tolist()
        return tuple(out[len(ids) :]), self.logs(out, len(ids))

    @torch.no_grad()
    def logs(self, ids: list[int], given: int) -> torch.Tensor:
        logits_TV = self.model(torch.tensor([ids])).logits[0, given - 1 : -1]
        return logits_TV.double().log_softmax(-1)


def likeliest(log_TV: torch.Tensor) -> tuple[dict[int, float], ...]:
    """What vLLM tells of some distributions."""
    values, tokens = log_TV.topk(LIKELIEST)
    return tuple(
        dict(zip(row.tolist(), logs.tolist(), strict=True))
        for row, logs in zip(tokens, values, strict=True)
    )


@pytest.fixture(scope="module")
def tasks(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, float, float]:
    """Two tasks, and the share of each that transformers gets right."""
    folder = tmp_path_factory.mktemp("tasks")
    naive = Naive(model)
    lines = list(dict.fromkeys(sentences(6_000).splitlines()))[:24]
    questions: list[dict[str, Any]] = []
    for at, line in enumerate(lines):
        words = line.split()
        choices = [" ".join(one.split()[4:]) for one in (line, *lines[:3])]
        if len(set(choices)) == 4:
            context = " ".join(words[:4])
            questions.append({"context": context, "choices": choices, "gold": at % 4})
    assert len(questions) > 12
    right = [
        naive.likeliest(one["context"], one["choices"]) == one["gold"]
        for one in questions
    ]
    # Line ends and halves of characters do not survive a template.
    said = {line: naive.greedy(line) for line in lines}
    plain = [
        line for line in lines if said[line].isascii() and said[line].isprintable()
    ]
    answers = [
        {"context": line, "answer": said[line] if at % 3 else "something else"}
        for at, line in enumerate(plain)
    ]
    exact = sum(at % 3 > 0 for at in range(len(plain))) / len(plain)
    assert 0 < exact < 1
    for name, documents, text in (
        ("next", questions, CHOICE),
        ("word", answers, WORD),
    ):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in documents), "utf-8")
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(file)), "utf-8")
    return folder, sum(right) / len(right), exact


def run(*arguments: str) -> dict[str, Any]:
    ran = CliRunner().invoke(app, [*arguments, "--json"])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def test_tasks_score_as_they_do_in_transformers(
    server: Server, model: Path, tasks: tuple[Path, float, float], tmp_path: Path
) -> None:
    folder, likeliest, exact = tasks
    command = ["eval", str(model), "--tasks", "next,word", "--task-dir", str(folder)]
    command += ["--server", server.url]
    found = run(*command)
    choice, word = found["tasks"]
    assert 0 < likeliest < 1
    assert choice["value"] == pytest.approx(likeliest)
    assert choice["metric"] == "acc"
    count = choice["samples"]
    sample_variance = likeliest * (1 - likeliest) * count / (count - 1)
    assert choice["stderr"] == pytest.approx((sample_variance / count) ** 0.5)
    assert word["value"] == pytest.approx(exact)
    assert word["metric"] == "exact_match"
    assert found["mean"]["value"] == pytest.approx((likeliest + exact) / 2)

    result = tmp_path / "original.json"
    result.write_text(json.dumps(found), "utf-8")
    again = run(*command, "--against", str(result))
    assert [one["task"] for one in again["recovery"]] == ["next", "word", "mean"]
    assert [one["percent"] for one in again["recovery"]] == pytest.approx([100] * 3)
    ran = CliRunner().invoke(app, [*command, "--against", str(result)])
    assert re.search(r"next +acc +\d+ .*100\.0 ± [\d.]+ %", ran.stdout), ran.output


def test_answers_are_compared_as_transformers_would(
    server: Server, model: Path, tmp_path: Path
) -> None:
    """Along the answers of another model, which stands for the original."""
    other = Naive(tiny_checkpoint(tmp_path / "other", layers=2, seed=1))
    lines = list(dict.fromkeys(sentences(6_000).splitlines()))[:8]
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8"
    )
    prompts = load_prompts(open_checkpoint(model), str(tmp_path / "p.jsonl"))
    chosen, logits = zip(*map(other.steps, prompts.ids), strict=True)
    top = [likeliest(rows) for rows in logits]
    original = Generated(
        prompts=prompts,
        new_tokens=NEW,
        greedy=(),
        sampled=(),
        steps=tuple(map(Steps, chosen, top)),
        against=None,
    )
    endpoint = find_endpoint(server.url, None)
    found = generate(endpoint, prompts, NEW, original, ignore)

    naive = Naive(model)
    own = [naive.steps(ids)[0] for ids in prompts.ids]
    assert [steps.chosen for steps in found.steps] == own
    ours = [
        naive.logs([*ids, *answer], len(ids))
        for ids, answer in zip(prompts.ids, chosen, strict=True)
    ]
    tokens = sum(map(len, chosen))
    exact = sum(
        float((p_TV.exp() * (p_TV - q_TV)).sum())
        for p_TV, q_TV in zip(logits, ours, strict=True)
    )
    same = sum(
        int((q_TV.argmax(-1) == torch.tensor(answer)).sum())
        for q_TV, answer in zip(ours, chosen, strict=True)
    )
    assert found.against is not None
    assert found.against.tokens == tokens
    assert found.against.agreement == pytest.approx(same / tokens)
    assert 0 < found.against.kl <= exact / tokens + 1e-4
    bound = sum(
        kl_at_least(p, q)
        for p_T, q_TV in zip(top, ours, strict=True)
        for p, q in zip(p_T, likeliest(q_TV), strict=True)
    )
    # The server also tells the token that was given, which can only add to it.
    assert found.against.kl >= bound / tokens - 1e-4

    # The model against itself: nothing differs but rounding.
    again = generate(endpoint, prompts, NEW, found, ignore).against
    assert again is not None
    assert (again.agreement, again.prefix) == (1.0, 1.0)
    assert again.kl < 1e-4


def test_eval_fails_where_a_condition_holds(
    server: Server, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a miller\nthe old clock\n", "utf-8")
    command = ["eval", str(model), "--generate", str(tmp_path / "p.txt"), "--json"]
    command += ["--new-tokens", "16", "--server", server.url]
    ran = CliRunner().invoke(app, [*command, "--fail-if", "length<17"])
    assert ran.exit_code == 3, (ran.output, ran.exception)
    found = json.loads(ran.stdout)
    assert found["generation"]["greedy"]["answers"] == 2
    assert {one["where"] for one in found["failed"]} == {
        "greedy answers",
        "sampled answers",
    }
    assert run(*command, "--fail-if", "length>17")["failed"] == []


def test_a_server_says_what_it_serves(server: Server) -> None:
    found = find_endpoint(f"{server.url}/v1/", None)
    assert (found.url, found.model) == (f"{server.url}/v1", "judged")
    assert found.max_length == 512
    with pytest.raises(EvaluationError, match=r"does not serve big.*: judged"):
        find_endpoint(server.url, "big")


def test_vllm_bench_times_a_server(server: Server, model: Path) -> None:
    sweep = speed.Sweep((64,), new_tokens=8, repeats=3)
    found = speed.measure_context(server, model, 64, sweep)
    for rate in (found.prefill, found.decode):
        assert 0 < rate.low <= rate.median <= rate.high
    # The weights alone, in float32; no process holds more than all together.
    weights = 2 * open_checkpoint(model).stored_bytes
    assert weights < peak_memory(server.group) < 1.5 * resident(server.group)


def test_a_server_that_cannot_start_says_why(model: Path) -> None:
    with (
        pytest.raises(ServeError, match=r"its server ended.*--no-such-flag"),
        served(str(model), None, ["--no-such-flag"]),
    ):
        pytest.fail("it must not start")
