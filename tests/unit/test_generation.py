"""Answers: prompts, what is counted, conditions, the card; a server that lies."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.answering import answering, completion, scores
from tests.reference import LayerCut, write_plan
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.calibrate.perplexity import Perplexity
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cli import app
from vllm_moe_prune.cut.card_places import SCORES, cell, fill, without_scores
from vllm_moe_prune.cut.convert import convert
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CalibrationError, EvaluationError
from vllm_moe_prune.judge.divergence import Agreement
from vllm_moe_prune.judge.gate import (
    Failure,
    check_measured,
    failures,
    parse_conditions,
)
from vllm_moe_prune.judge.generation import (
    Answer,
    Generated,
    Habits,
    Steps,
    generate,
    habits,
)
from vllm_moe_prune.judge.prompts import Prompts, load_prompts
from vllm_moe_prune.judge.quality import Quality
from vllm_moe_prune.judge.recovery import Score
from vllm_moe_prune.judge.tasks import find_endpoint
from vllm_moe_prune.progress import gib, ignore
from vllm_moe_prune.recipes.loading import load_recipe

LOOP, PLAIN = (7, 8) * 6, tuple(range(10, 30))
PROMPTS = Prompts("p.txt", ("One", "Two"), ((1, 5), (1, 6)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("m") / "in", layers=2)


@pytest.fixture
def output(model: Path, tmp_path: Path) -> Path:
    """What a cut wrote, card and all."""
    checkpoint = open_checkpoint(model)
    plan = write_plan(tmp_path / "plan.json", checkpoint, {0: LayerCut(keep=(0, 2, 5))})
    execute_plan(checkpoint, load_plan(plan), tmp_path / "out")
    return tmp_path / "out"


def generated(against: Agreement | None = None) -> Generated:
    greedy = (Answer(LOOP, "a", False), Answer(PLAIN, "b", True))
    sampled = (Answer(PLAIN, "c", True), Answer((), "", True))
    steps = (Steps(LOOP, ({7: -0.1},) * 12), Steps((*PLAIN, 2), ({9: -0.1},) * 21))
    return Generated(
        prompts=PROMPTS,
        new_tokens=21,
        greedy=greedy,
        sampled=sampled,
        steps=steps,
        against=against,
    )


# What is asked


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "Add 1 and 2.\n\n  \nSay more."),
        ("p.jsonl", '{"prompt": "Add 1 and 2."}\n{"question": "Say more."}\n'),
        (
            "p.json",
            '[{"messages": [{"role": "user", "content": "Add 1 and 2."}]}, {"messages":'
            ' [{"role": "user", "content": "Say more."}, {"role": "assistant", '
            '"content": "An answer that nobody sees."}]}]',
        ),
    ],
)
def test_a_model_with_a_chat_template_is_asked_in_its_form(
    model: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content, "utf-8")
    checkpoint = open_checkpoint(model)
    found = load_prompts(checkpoint, str(tmp_path / name))
    assert found.source == name
    assert [text.replace("<s>", "").replace("</s>", "") for text in found.texts] == [
        "[user] Add 1 and 2.[assistant] ",
        "[user] Say more.[assistant] ",
    ]
    # The template has written BOS; no second one is added.
    assert [ids.count(1) for ids in found.ids] == [1, 1]


def test_a_line_is_one_prompt_however_long(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    long = "a miller " * 20_000
    path.write_text(f"One.\n{long}\nTwo.\n", "utf-8")
    texts = load_prompts(open_checkpoint(model), str(path)).texts
    assert [text.count("a miller") for text in texts] == [0, 20_000, 0]


def test_a_question_keeps_its_system_prompt(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    asked = {"system": "Be brief.", "instruction": "Add.", "input": "1, 2"}
    path.write_text(json.dumps({**asked, "output": "3"}), "utf-8")
    (text,) = load_prompts(open_checkpoint(model), str(path)).texts
    said = text.replace("<s>", "").replace("</s>", "")
    assert said == "[system] Be brief.[user] Add.\n\n1, 2[assistant] "


def test_texts_are_continued_as_they_are(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "a miller"}\n', "utf-8")
    found = load_prompts(open_checkpoint(model), str(path))
    assert found.texts == ("a miller",)
    assert found.ids[0].count(1) == 1


def test_without_a_template_a_question_is_a_text(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", layers=1)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    path = tmp_path / "p.jsonl"
    path.write_text('{"instruction": "Add these.", "input": "1 and 2"}\n', "utf-8")
    found = load_prompts(open_checkpoint(folder), str(path))
    assert found.texts == ("Add these.\n\n1 and 2",)
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n', "utf-8")
    with pytest.raises(CalibrationError, match="line 1: holds messages, but"):
        load_prompts(open_checkpoint(folder), str(path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty; there is no prompt"),
        ("7\n", r"line 1: is a number\. A prompt is a line of text"),
        ('{"answer": "4"}\n', r"line 1: has only answer\. A prompt is"),
        ('{"prompt": {"a": 1}}\n', "the conversation is an object"),
        ('{"text": "a"}\n' * 10_001, "holds more than 10,000 prompts"),
    ],
)
def test_what_is_no_prompt_is_refused(
    model: Path, tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(content, "utf-8")
    with pytest.raises((CalibrationError, EvaluationError), match=says):
        load_prompts(open_checkpoint(model), str(path))


# What is counted


def test_habits_are_means_over_answers() -> None:
    assert habits(generated().greedy) == Habits(
        answers=2, length=16.0, ended=0.5, repetition=pytest.approx(7 / 18), loops=0.5
    )
    assert habits(generated().sampled).loops == 0


def test_a_server_is_asked_without_penalties_and_compared_along_the_original() -> None:
    def reply(body: dict[str, Any]) -> Any:
        if "prompt_logprobs" in body:
            return scores(body["prompt"])
        sampled = body["temperature"] > 0
        return completion([*PLAIN, 2] if sampled else list(LOOP), ended=sampled)

    with answering(reply) as (url, seen):
        endpoint = find_endpoint(url, None)
        first = generate(endpoint, PROMPTS, 21, None, ignore)
        again = generate(endpoint, PROMPTS, 21, first, ignore)
    assert first.against is None
    assert [one.tokens for one in first.greedy] == [LOOP, LOOP]
    # Its last token is the one that ends an answer.
    assert [one.tokens for one in first.sampled] == [PLAIN, PLAIN]
    assert again.against == Agreement(tokens=24, agreement=1.0, prefix=1.0, kl=0.0)
    assert len(seen) == 2 * 2 + 2 * 3
    for body in seen:
        assert body["repetition_penalty"] == 1.0
        assert body["presence_penalty"] == body["frequency_penalty"] == 0.0
        assert body["prompt"][:2] in ([1, 5], [1, 6])
    seeds = {body["prompt"][1]: body["seed"] for body in seen if "seed" in body}
    assert seeds == {5: 0, 6: 1}


def _without(key: str) -> dict[str, Any]:
    found = completion([3])
    del found["choices"][0][key]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "says"),
    [
        (500, r"status 500: .*told to fail"),
        (b"<html>", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        ({"choices": []}, "no completion with token ids"),
        (_without("token_ids"), "no completion with token ids"),
        (_without("logprobs"), "not the log-probabilities of every token"),
        (completion([]), "0 tokens for 21 at most"),
        (completion([3] * 22), "22 tokens for 21 at most"),
        (completion([-1]), "no completion with token ids"),
        (b" " * (65 << 20), "more than 64 MiB"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_answer_that_is_none_is_refused(said: Any, says: str) -> None:
    with (
        answering(lambda _: said) as (url, _),
        pytest.raises(EvaluationError, match=says),
    ):
        generate(find_endpoint(url, None), PROMPTS, 21, None, ignore)


def test_prompts_that_do_not_fit_are_named_before_any_is_asked() -> None:
    long = Prompts("p.txt", ("a", "b"), ((1,), (1,) * 500))
    with answering(lambda _: 500) as (url, seen):
        endpoint = find_endpoint(url, None)
        with pytest.raises(EvaluationError, match=r"prompt 2 has 500 tokens, with 12 "):
            generate(endpoint, long, 12, None, ignore)
        assert seen == []


# Conditions

QUALITY = Quality(
    "m",
    (Perplexity(10, 20.0, "a.txt"), Perplexity(10, 30.0, "b.txt")),
    (Score(task="t", metric="acc", value=0.4, stderr=None, samples=5),),
    generated(Agreement(33, 0.5, 0.25, 0.125)),
)
ORIGINAL = replace(
    QUALITY,
    texts=(Perplexity(10, 20.0, "a.txt"),),
    scores=(replace(QUALITY.scores[0], value=0.5),),
)


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("loops>0.02", [("greedy answers", 0.5)]),
        ("loops > 0.5", []),
        ("loops>=0.5", [("greedy answers", 0.5)]),
        ("ended<0.9", [("greedy answers", 0.5)]),
        ("length<=16", [("greedy answers", 16.0), ("sampled answers", 10.0)]),
        ("repetition>0.9", []),
        ("agreement<0.6", [("the original's greedy answers", 0.5)]),
        ("prefix<0.2", []),
        ("kl>1e-1", [("the original's greedy answers", 0.125)]),
        ("perplexity>10", [("b.txt", pytest.approx(20.0855, abs=1e-3))]),
        ("perplexity_ratio>1.5", []),
        ("recovery<90", [("t", pytest.approx(80.0))]),
    ],
)
def test_conditions_are_met_by_what_was_measured(
    text: str, met: list[tuple[str, float]]
) -> None:
    found = failures(parse_conditions([text]), QUALITY, ORIGINAL)
    assert found == [Failure("m", text, value, where) for where, value in met]


def test_what_is_no_number_fails() -> None:
    """Infinite over infinite, here."""
    odd = replace(QUALITY, texts=(Perplexity(1, 1e6, "a"),))
    for text in ("perplexity_ratio>2", "perplexity_ratio<2"):
        assert failures(parse_conditions([text]), odd, odd)


def test_several_conditions_may_be_given_at_once() -> None:
    found = parse_conditions(["loops>0.02,kl>1", "ended<0.5"])
    assert [(one.name, one.sign, one.bound) for one in found] == [
        ("loops", ">", 0.02),
        ("kl", ">", 1.0),
        ("ended", "<", 0.5),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lops>0.02", r"'lops' is nothing that is measured. Names: loops, .*recovery"),
        ("loops", r"write NAME, one of < <= > >=, and a number"),
        ("loops>", "write NAME"),
        ("loops>many", "write NAME"),
        ("loops>nan", "write NAME"),
        ("loops=>1", "write NAME"),
        ("", "write NAME"),
        ("loops>1,", "write NAME"),
    ],
)
def test_conditions_that_are_none_are_refused(text: str, says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        parse_conditions([text])


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("loops>1", "--generate"),
        ("kl>1", "--generate and --against"),
        ("perplexity>1", "--text"),
        ("recovery<1", "--tasks and --against"),
    ],
)
def test_conditions_on_what_is_not_measured_are_refused(text: str, flags: str) -> None:
    nothing = dict.fromkeys(("answers", "texts", "tasks", "original"), False)
    with pytest.raises(EvaluationError, match=f"without {flags}."):
        check_measured(parse_conditions([text]), **nothing)
    check_measured(parse_conditions([text]), **dict.fromkeys(nothing, True))


# The whole command, and the card


def test_eval_answers_counts_writes_the_card_and_fails(
    output: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "p|<b>.txt"
    prompts.write_text("One\nTwo\n", "utf-8")
    text = tiny_text(tmp_path, 2000)
    command = ["eval", str(output), "--generate", str(prompts), "--new-tokens", "12"]
    with answering(lambda _: completion(list(LOOP), text="x\x1b[31m")) as (url, _):
        command += ["--server", url]
        runner = CliRunner()
        flags = ["--fail-if", "loops>0.02", "--fail-if", "ended<0.5"]
        ran = runner.invoke(app, [*command, *flags, "--json", "--card"])
        plain = runner.invoke(app, [*command, "--fail-if", "loops>1"])
        failed = runner.invoke(app, [*command, "--fail-if", "loops>0.5"])
    assert ran.exit_code == 3
    data = json.loads(ran.stdout)
    assert data["generation"]["greedy"]["loops"] == 1.0
    assert data["generation"]["answers"][1]["greedy"] == "x\x1b[31m"
    assert [one["condition"] for one in data["failed"]] == [
        *["loops>0.02"] * 2,
        *["ended<0.5"] * 2,
    ]
    assert ran.stderr.count("failed: ") == 4
    assert plain.exit_code == 0, plain.output
    assert "100.0%" in plain.stdout
    assert "\x1b" not in plain.output
    assert failed.exit_code == 3
    assert "failed: loops>0.5: 1 (greedy answers" in failed.stderr
    assert "loops" in failed.stdout
    card = (output / "README.md").read_text("utf-8")
    assert "2 prompts of p&#124;&lt;b>.txt" in card
    assert "| greedy, this | 12.0 | 0.0% |" in card

    # Another kind of score joins it, the same kind replaces it.
    ran = runner.invoke(app, ["eval", str(output), "--text", str(text), "--card"])
    assert ran.exit_code == 0, ran.output
    both = (output / "README.md").read_text("utf-8")
    assert "| held-out text |" in both
    assert "| greedy, this |" in both
    again = runner.invoke(app, ["eval", str(output), "--text", str(text), "--card"])
    assert again.exit_code == 0
    assert (output / "README.md").read_text("utf-8") == both


def test_a_card_without_a_place_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path
) -> None:
    ran = CliRunner().invoke(
        app, ["eval", str(model), "--text", str(tiny_text(tmp_path, 2000)), "--card"]
    )
    assert isinstance(ran.exception, EvaluationError)
    assert "README.md: has no place for scores" in str(ran.exception)


def test_scores_go_with_the_weights_that_they_are_of(output: Path) -> None:
    card = (output / "README.md").read_text("utf-8")
    for name in SCORES:
        card = fill(card, name, "\nmeasured\n")
    assert card.count("measured\n<!-- end of") == 3
    assert "measured\n" not in without_scores(card)
    assert fill("no place", "tasks", "x") == "no place"


def test_hostile_names_stay_in_their_cell() -> None:
    assert cell("a|b<!-- end of tasks -->\n\x1b") == (
        "a&#124;b&lt;!-- end of tasks -->  "
    )


def test_the_card_says_what_a_reader_needs(output: Path) -> None:
    card = (output / "README.md").read_text("utf-8")
    for heading in ("Serve", "Scores", "Limits", "Made by", "What was removed"):
        assert f"\n## {heading}\n" in card


def test_the_card_has_the_size_of_what_it_is_with(model: Path, tmp_path: Path) -> None:
    checkpoint, cut, packed = open_checkpoint(model), tmp_path / "out", tmp_path / "p"
    cuts = dict.fromkeys(range(2), LayerCut(sparsity=0.75))
    plan = write_plan(tmp_path / "plan.json", checkpoint, cuts, slim="magnitude")
    execute_plan(checkpoint, load_plan(plan), cut)
    convert(open_checkpoint(cut), packed, "bitmask")
    before, after, smaller = (
        gib(open_checkpoint(folder).stored_bytes) for folder in (model, cut, packed)
    )
    assert before == after != smaller
    for folder, size in ((cut, after), (packed, smaller)):
        line = f"| size of the tensors | {before} | <!-- bytes -->{size}<!-- end of"
        assert line in (folder / "README.md").read_text("utf-8")


def test_the_saved_recipe_states_every_value_and_reads_back(output: Path) -> None:
    saved = load_recipe(str(output / "moe_prune.yaml"))
    assert saved == load_plan(output / "plan.json").recipe
    text = (output / "moe_prune.yaml").read_text("utf-8")
    for name in ("criterion", "seed", "order", "routing"):
        assert f"{name}:" in text
