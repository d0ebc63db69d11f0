"""Judging by what servers and benchmarks answered: scores, recovery, speed, tables."""

import json
import math
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.perplexity import perplexity
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cli import app
from vllm_moe_prune.cli.output.draw import print_json
from vllm_moe_prune.cli.output.show_compared import show_speed, speed_data
from vllm_moe_prune.cli.questions import split_flags
from vllm_moe_prune.decide.cut_plan import CutPlan, load_plan
from vllm_moe_prune.errors import EvaluationError, ServeError
from vllm_moe_prune.judge.compare import find_speeds, size_of
from vllm_moe_prune.judge.quality import Quality, Subject, as_data, load_quality
from vllm_moe_prune.judge.recovery import Recovery, Score, mean, recoveries, recovery
from vllm_moe_prune.judge.speed import (
    AtContext,
    Speed,
    Spread,
    Sweep,
    at_context,
    sweep_for,
)
from vllm_moe_prune.judge.tasks import GROUPS, score_of
from vllm_moe_prune.judge.trim_slim_roles import role_of, slimming_of, trimming_of
from vllm_moe_prune.judge.trim_slim_speed import (
    Row,
    Rows,
    cast,
    check_calibration,
    make_roles,
    not_played,
    plans_to_make,
    plot_rows,
)
from vllm_moe_prune.progress import Progress
from vllm_moe_prune.recipes.schema import parse_recipe

LENGTH = 32
RECIPE = {
    "experts": {"method": "score", "keep": 3, "budget": "global"},
    "slim": {"method": "magnitude", "sparsity": 0.5},
    "layers": {"drop_moe": [1]},
}


def score(
    value: float, stderr: float | None, task: str = "t", samples: int = 1
) -> Score:
    return Score(task=task, metric="acc", value=value, stderr=stderr, samples=samples)


# Standard errors


def test_the_standard_error_of_a_recovery_is_the_spread_of_repetitions() -> None:
    """Two models with known hit rates, asked 2,000 times over."""
    draw = random.Random(0)
    ours, theirs, questions = 0.55, 0.8, 400

    def hits(rate: float) -> float:
        return sum(draw.random() < rate for _ in range(questions)) / questions

    ratios = [100 * hits(ours) / hits(theirs) for _ in range(2_000)]

    def exact(rate: float) -> Score:
        return score(rate, math.sqrt(rate * (1 - rate) / questions))

    found = recovery(exact(ours), exact(theirs))
    assert found.percent == pytest.approx(statistics.fmean(ratios), rel=0.005)
    assert found.stderr == pytest.approx(statistics.stdev(ratios), rel=0.05)


def test_a_mean_counts_each_task_once_and_its_error_is_that_of_a_sum() -> None:
    draw = random.Random(1)
    tasks = [score(0.2, 0.03, "a", 10), score(0.9, 0.01, "b", 1000), score(0.4, 0.05)]
    repeated = [
        statistics.fmean(draw.gauss(one.value, one.stderr or 0) for one in tasks)
        for _ in range(20_000)
    ]
    found = mean(tasks)
    assert found.value == pytest.approx(0.5)
    assert found.stderr == pytest.approx(statistics.stdev(repeated), rel=0.02)
    assert mean([*tasks, score(0.1, None)]).stderr is None


def test_the_mean_recovery_is_that_of_the_mean_score() -> None:
    """UNIFIED, Table 3: L8/32 + AWQ, 66.1 of 71.5 = 92.4 %."""
    base = (59.4, 84.2, 84.0, 67.9, 46.8, 83.8, 70.4, 75.6)
    cut = (46.2, 84.2, 74.2, 66.2, 39.0, 75.5, 69.3, 74.2)
    names = GROUPS["zero-shot"]
    original = [score(x / 100, 0.01, name) for name, x in zip(names, base, strict=True)]
    ours = [score(x / 100, 0.01, name) for name, x in zip(names, cut, strict=True)]
    *each, whole = recoveries(ours, original)
    assert [one.task for one in each] == list(names)
    assert whole.task == "mean"
    assert whole.percent == pytest.approx(92.4, abs=0.05)


def test_nothing_can_be_recovered_of_nothing() -> None:
    assert recovery(score(0.5, 0.1), score(0.0, 0.0)) == Recovery("t", None, None)
    assert recovery(score(0.5, None), score(0.5, 0.1)) == Recovery("t", 100.0, None)
    assert recoveries([score(0.5, 0.1, "a")], [score(0.5, 0.1, "b")]) == []


# What lm-eval answers


LM_EVAL: dict[str, Any] = {
    "results": {
        "arc": {
            "alias": "arc",
            "acc,none": 0.4,
            "acc_stderr,none": 0.1,
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": 0.2,
        },
        "gsm8k": {
            "exact_match,strict-match": 0.1,
            "exact_match_stderr,strict-match": 0.01,
            "exact_match,flexible-extract": 0.3,
            "exact_match_stderr,flexible-extract": 0.02,
        },
        "mmlu": {"acc,none": 0.6, "acc_stderr,none": 0.004},
        "odd": {"f1,none": 0.7, "f1_stderr,none": "N/A"},
        "empty": {"alias": "empty"},
    },
    "group_subtasks": {"mmlu": ["one", "two"]},
    "n-samples": {
        name: {"original": 9, "effective": count}
        for name, count in {"arc": 3, "gsm8k": 4, "one": 5, "two": 6, "odd": 7}.items()
    },
}


@pytest.mark.parametrize(
    "expected",
    [
        Score(task="arc", metric="acc_norm", value=0.5, stderr=0.2, samples=3),
        Score(
            task="gsm8k",
            metric="exact_match,flexible-extract",
            value=0.3,
            stderr=0.02,
            samples=4,
        ),
        Score(task="mmlu", metric="acc", value=0.6, stderr=0.004, samples=11),
        Score(task="odd", metric="f1", value=0.7, stderr=None, samples=7),
    ],
    ids=lambda one: one.task,
)
def test_each_task_has_one_main_score(expected: Score) -> None:
    assert score_of(LM_EVAL, expected.task) == expected


def test_what_is_no_share_has_no_recovery() -> None:
    found = {"results": {"wmt": {"bleu,none": 27.3}}, "n-samples": {}}
    with pytest.raises(EvaluationError, match=r"wmt: bleu is 27\.3, which is no share"):
        score_of(found, "wmt")


def test_a_task_without_a_score_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="empty: lm-eval gave no score"):
        score_of(LM_EVAL, "empty")


# What vllm bench answers


def test_speeds_are_tokens_over_the_time_they_took() -> None:
    result = {
        "errors": ["", "", ""],
        "input_lens": [128, 128, 128],
        "output_lens": [5, 5, 5],
        "ttfts": [0.5, 0.25, 1.0],
        # The second server sent its tokens two at a time.
        "itls": [[0.1, 0.1, 0.1, 0.1], [0.1, 0.1], [0.2, 0.2, 0.2, 0.2]],
    }
    found = at_context(128, result)
    assert found.context == 128
    prefill, decode = found.prefill, found.decode
    assert (prefill.low, prefill.median, prefill.high) == (128, 256, 512)
    assert (decode.low, decode.median, decode.high) == pytest.approx((5, 10, 20))


def test_a_failed_request_is_an_error() -> None:
    result = {"errors": ["", "Traceback\nValueError: too long\n"]}
    with pytest.raises(
        EvaluationError, match=r"1 of 2 requests .* ValueError: too long"
    ):
        at_context(128, result)


def test_a_sweep_ends_where_the_models_do(tmp_path: Path) -> None:
    small = open_checkpoint(tiny_checkpoint(tmp_path / "a", layers=1))
    large = open_checkpoint(
        tiny_checkpoint(tmp_path / "b", layers=1, max_positions=4096)
    )
    assert sweep_for([large], None, 32, 5, []).contexts == (128, 512, 1024, 2048)
    found = sweep_for([large, small], None, 32, 5, ["--enforce-eager"])
    assert found.contexts == (128, 480)
    assert found.flags[-3:] == ("--max-model-len", "512", "--enforce-eager")
    given = sweep_for([large], [64], 32, 5, ["--max-model-len=100"])
    assert given.flags[1:] == ("--max-model-len=100",)
    for told in (["--max-model-len", "1024"], ["--max_model_len=1K"]):
        assert sweep_for([large], None, 32, 5, told).contexts == (128, 512, 992)
    with pytest.raises(EvaluationError, match=r"481 with 32 new tokens: .* 2 to 468"):
        sweep_for([large], [481], 32, 5, ["--max-model-len", "0.5k"])
    for told in (["--max-model-len"], ["--max-model-len=auto"]):
        with pytest.raises(EvaluationError, match="need a number of tokens"):
            sweep_for([large], [64], 32, 5, told)
    with pytest.raises(EvaluationError, match=r"481 with 32 new tokens: .* 2 to 480"):
        sweep_for([large, small], [481], 32, 5, [])


def test_flags_are_parted_as_by_a_shell() -> None:
    assert split_flags("--a 1 --b '{\"c\": 2}'") == ["--a", "1", "--b", '{"c": 2}']
    with pytest.raises(ServeError, match="No closing quotation"):
        split_flags("--a '1")


# Roles


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("model") / "original", layers=3)
    return Subject(open_checkpoint(folder), str(folder))


@pytest.fixture(scope="module")
def both(original: Subject, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    out = tmp_path_factory.mktemp("pruned") / "both"
    text = tiny_text(out.parent, 8_000)
    asked = {
        **RECIPE,
        "calibration": {"source": str(text), "samples": 2, "sequence_length": LENGTH},
    }
    recipe = parse_recipe(asked, "test")
    pipeline.run(original.checkpoint, recipe, out, pipeline.RunOptions())
    return Subject(open_checkpoint(out), str(out))


def plan_in(checkpoint: Checkpoint) -> CutPlan:
    return load_plan(checkpoint.folder / "plan.json")


def experts(checkpoint: Checkpoint) -> list[int]:
    return [layer.num_experts for layer in checkpoint.layers]


def test_the_two_between_are_made_from_the_plan_of_both(
    original: Subject, both: Subject, tmp_path: Path
) -> None:
    roles = cast(original, [both])
    assert roles == {"baseline": original, "both": both}
    plans = plans_to_make(roles)
    made = make_roles(roles, plans, tmp_path, pipeline.RunOptions(), None)
    trimmed, slimmed = made["trim-only"].checkpoint, made["slim-only"].checkpoint

    assert experts(trimmed) == experts(both.checkpoint) != experts(original.checkpoint)
    assert zeros_of(trimmed) == 0
    assert experts(slimmed) == experts(original.checkpoint)
    assert zeros_of(slimmed) == original.checkpoint.expert_parameters // 2
    names = (trimmed, slimmed, both.checkpoint, original.checkpoint)
    assert [role_of(one, original.checkpoint, plan_or_none(one)) for one in names] == [
        *("trim-only", "slim-only", "both", "baseline")
    ]
    # What was made is taken again as it is.
    again = make_roles(roles, plans, tmp_path, pipeline.RunOptions(), None)
    assert again["trim-only"].checkpoint.fingerprint == trimmed.fingerprint
    assert plans_to_make(roles | made) == {}


def test_what_is_made_stores_zeros_as_both_does_and_is_of_its_plan(
    original: Subject, both: Subject, tmp_path: Path
) -> None:
    options = pipeline.RunOptions(storage="bitmask")
    packed = tmp_path / "packed"
    pipeline.cut(original.checkpoint, plan_in(both.checkpoint), packed, options)
    roles = cast(original, [Subject(open_checkpoint(packed), str(packed))])
    plans, work = plans_to_make(roles), tmp_path / "work"
    made = make_roles(roles, plans, work, pipeline.RunOptions(), None)
    assert made["slim-only"].checkpoint.storage is not None
    assert made["trim-only"].checkpoint.storage is None
    # What another model left is not taken for this one's.
    layers = plans["slim-only"].layers
    fewer = tuple(one.model_copy(update={"sparsity": 0.4}) for one in layers)
    changed = plans["slim-only"].model_copy(update={"layers": fewer})
    for others, wanted in (
        (cast(original, [both]), plans),
        (roles, plans | {"slim-only": changed}),
    ):
        with pytest.raises(EvaluationError, match=r"slim-only: was made .*--work"):
            make_roles(others, wanted, work, pipeline.RunOptions(), None)


def test_making_them_goes_on_where_it_was_cut_short(
    original: Subject, both: Subject, tmp_path: Path
) -> None:
    roles = cast(original, [both])
    plans = plans_to_make(roles)

    def stop(progress: Progress) -> None:
        if progress.layer > 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_roles(roles, plans, tmp_path, pipeline.RunOptions(report=stop), None)
    assert [one.name for one in tmp_path.iterdir()] == ["trim-only.partial"]
    made = make_roles(roles, plans, tmp_path, pipeline.RunOptions(), None)
    assert made.keys() == {"trim-only", "slim-only"}


def plan_or_none(checkpoint: Checkpoint) -> CutPlan | None:
    path = checkpoint.folder / "plan.json"
    return load_plan(path) if path.is_file() else None


def zeros_of(checkpoint: Checkpoint) -> int:
    record = json.loads((checkpoint.folder / "provenance.json").read_text("utf-8"))
    return int(record["sparsity_achieved"]["zeros"])


def test_a_plan_falls_into_its_trimming_and_its_slimming(both: Subject) -> None:
    plan = plan_in(both.checkpoint)
    trimming, slimming = trimming_of(plan), slimming_of(plan)
    assert not trimming.is_slimmed
    assert [one.keep for one in trimming.layers] == [one.keep for one in plan.layers]
    assert [one.action for one in slimming.layers] == ["keep"] * 3
    assert [one.sparsity for one in slimming.layers] == pytest.approx([0.5] * 3)


def test_roles_that_cannot_be_told_are_refused(
    original: Subject, both: Subject, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=r"is both, as .* is already"):
        cast(original, [both, both])
    with pytest.raises(EvaluationError, match="is baseline, as"):
        cast(original, [original])
    other = tiny_checkpoint(tmp_path / "other", layers=3, seed=1)
    roles = cast(Subject(open_checkpoint(other), "other"), [both])
    with pytest.raises(EvaluationError, match="not made from other by one cut"):
        plans_to_make(roles)
    plan = plan_in(both.checkpoint).model_copy(update={"slim": "wanda"})
    with pytest.raises(
        EvaluationError, match=r"slims by wanda.*text.txt.*--calibration"
    ):
        check_calibration([plan], None)
    check_calibration([plan], "given.txt")


# Results and tables


def test_a_result_is_read_as_it_was_printed(
    original: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = perplexity(
        original.checkpoint, str(tiny_text(tmp_path, 2_000)), sequence_length=LENGTH
    )
    quality = Quality("original", (text,), (score(0.5, 0.1), score(0.3, None, "u")))
    path = tmp_path / "result.json"
    # Sums whose perplexity no float holds, and one that no JSON number says.
    for nll in (text.nll_sum, 1e9, math.inf):
        printed = replace(quality, texts=(replace(text, nll_sum=nll),))
        print_json(as_data(printed))
        path.write_text(capsys.readouterr().out, "utf-8")
        assert "Infinity" not in path.read_text("utf-8")
        assert load_quality(path) == printed


def test_compare_equals_what_the_files_say(
    original: Subject, both: Subject, tmp_path: Path
) -> None:
    text = tiny_text(tmp_path, 2_000)
    command = ["compare", original.source, both.source, "--text", str(text), "--json"]
    ran = CliRunner().invoke(app, [*command, "--sequence-length", str(LENGTH)])
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)["checkpoints"]
    for one, subject in zip(found, (original, both), strict=True):
        files = list(subject.checkpoint.folder.glob("*.safetensors"))
        assert one["file_bytes"] == sum(path.stat().st_size for path in files)
        assert one["weight_bytes"] == 2 * one["parameters"]  # bfloat16
        assert one["flops_per_token"] * 2048 == one["flops"] == naive_flops(subject)
        ours = perplexity(subject.checkpoint, str(text), sequence_length=LENGTH)
        assert one["results"][0]["perplexity"] == pytest.approx(ours.perplexity)
    assert found[1]["parameters"] == both.checkpoint.parameters

    table = CliRunner().invoke(app, command[:-1])
    assert table.exit_code == 0
    share = found[1]["parameters"] / found[0]["parameters"]
    assert f"{found[1]['parameters']:,} ({share:.1%})" in table.stdout


def naive_flops(subject: Subject, tokens: int = 2048) -> int:
    """Two per weight and token; each token meets top-k experts; attention is square."""
    config = subject.checkpoint.config
    hidden, width = config["hidden_size"], config["intermediate_size"]
    heads, head = config["num_attention_heads"], hidden // config["num_attention_heads"]
    keys = config["num_key_value_heads"] * head
    each = 2 * hidden * hidden + 2 * hidden * keys
    weights = config["vocab_size"] * hidden
    for layer in subject.checkpoint.decoder_layers:
        used = min(layer.top_k, layer.num_experts)
        weights += each + used * 3 * hidden * width + layer.num_experts * hidden
    layers = len(subject.checkpoint.decoder_layers)
    return 2 * tokens * weights + layers * 4 * tokens**2 * heads * head


def test_sizes_are_those_of_what_is_stored(both: Subject, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    pipeline.convert(both.checkpoint, packed, pipeline.RunOptions(storage="bitmask"))
    found, dense = size_of(open_checkpoint(packed)), size_of(both.checkpoint)
    assert found.weight_bytes < dense.weight_bytes
    assert found.file_bytes == sum(
        path.stat().st_size for path in packed.glob("*.safetensors")
    )
    assert (found.parameters, found.flops) == (dense.parameters, dense.flops)


def measured(original: Subject, both: Subject) -> Rows:
    def speed(rate: float) -> Speed:
        spread = Spread(rate, rate / 2, rate * 2)
        at = [AtContext(context, spread, spread) for context in (64, 128)]
        return Speed(tuple(at), peak_bytes=1 << 30)

    rows = [
        Row("baseline", original.name, size_of(original.checkpoint), speed(100.0)),
        Row("both", both.name, size_of(both.checkpoint), speed(250.0)),
    ]
    why = not_played({"baseline": original, "both": both})
    return Rows(tuple(rows), why, Sweep((64, 128), 32, 5), load_average=0.0)


def test_speeds_are_read_as_they_were_printed(
    original: Subject, both: Subject, tmp_path: Path
) -> None:
    found = measured(original, both)
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(speed_data(found)), "utf-8")
    assert find_speeds(path, [original, both]) == {
        row.model: row.speed for row in found.rows
    }
    command = ["compare", original.source, both.source, "--speed-from", str(path)]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    assert "250 (125–500)" in ran.stdout
    assert "1.00 GiB (100.0%)" in ran.stdout


def test_four_rows_say_how_much_faster_and_what_is_missing(
    original: Subject,
    both: Subject,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = measured(original, both)
    show_speed(found, as_json=False)
    said = capsys.readouterr().out
    assert re.search(r"64 +both +250 \(125–500\) +2\.50", said), said
    assert "No trim-only" in said
    assert "No slim-only" in said
    plot_rows(found, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
