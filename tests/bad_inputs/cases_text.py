"""Texts, tokenizers, devices, options and Hub ids that cannot be used."""

from pathlib import Path

import torch

from .case import (
    PAPER,
    RUN,
    SMALL,
    Case,
    Spoil,
    both,
    deleted,
    holding,
    in_json,
    leave_alone,
    with_keys,
)

NO_GPU = () if torch.cuda.is_available() else ("cuda", "cuda:0")
MEASURE = f"measure ckpt -o new.safetensors {SMALL} {PAPER} --json --calibration"
EVAL = "eval ckpt --json --text"


def text(
    name: str,
    file_name: str,
    content: str | bytes,
    *says: str,
    spoil: Spoil = leave_alone,
) -> list[Case]:
    """A bad text, to calibrate on and to judge by."""
    spoils = both(holding(file_name, content), spoil)
    return [
        Case(f"text: {name}, measure", f"{MEASURE} {file_name}", says, spoils),
        Case(f"text: {name}, eval", f"{EVAL} {file_name}", says, spoils),
    ]


def tokenizer_gone(folder: Path) -> None:
    for path in (folder / "ckpt").glob("tokenizer*"):
        path.unlink()


def without_bos(folder: Path) -> None:
    """A tokenizer that puts nothing in front of a text."""
    with_keys("ckpt/tokenizer.json", post_processor=None)(folder)


def other_tokenizer(folder: Path) -> None:
    """A tokenizer with more ids than the model has embeddings."""
    in_json("ckpt/tokenizer.json", lambda data: _renumber(data["model"]["vocab"]))(
        folder
    )


def _renumber(vocab: dict[str, int]) -> None:
    for word, number in vocab.items():
        if number > 2:
            vocab[word] = number + 1000


def eval_flags(name: str, flags: str, *says: str) -> Case:
    """A case of flags of ``eval``."""
    return Case(f"eval: {name}", f"{EVAL} text.txt {flags}", says)


def no_tokenizer(name: str, spoil: Spoil, *says: str) -> list[Case]:
    """A tokenizer that cannot be used, met by three commands."""
    return [
        Case(f"tokenizer: {name}, run", RUN, says, spoil),
        Case(f"tokenizer: {name}, eval", f"{EVAL} text.txt", says, spoil),
        Case(
            f"tokenizer: {name}, cut",
            "cut ckpt --plan plan.json -o new --calibration text.txt --json",
            says,
            spoil,
        ),
    ]


TEXTS = [
    *text("empty", "e.txt", "", "e.txt", "empty"),
    *text("blank lines", "e.jsonl", "\n\n", "e.jsonl", "empty"),
    *text("binary", "b.txt", b"PK\0\1\2" * 99, "b.txt", "NUL"),
    *text("not UTF-8", "l.txt", "Öl und Maß".encode("latin-1"), "l.txt", "UTF-8"),
    *text("UTF-16", "u.txt", "words".encode("utf-16"), "u.txt", "UTF-8"),
    *text("JSONL not UTF-8", "l.jsonl", b'{"text": "\xff"}', "l.jsonl", "UTF-8"),
    *text(
        "malformed JSONL",
        "m.jsonl",
        '{"text": "good"}\n{"text": bad}\n',
        *("m.jsonl", "line 2", "not valid JSON"),
    ),
    *text("JSONL of numbers", "n.jsonl", "1\n2\n", "n.jsonl", "line 1", "text"),
    *text("JSONL of text 7", "n.jsonl", '{"text": 7}', "n.jsonl", "line 1", "'text'"),
    *text("other JSONL", "o.jsonl", '{"body": "x"}', "line 1", "'text'", "body"),
    *text("nested JSONL", "d.jsonl", "[" * 10**5, "d.jsonl", "line 1"),
    *text("a long number", "i.jsonl", "1" + "0" * 6000, "i.jsonl", "line 1"),
    *text(
        "messages without a template",
        "c.jsonl",
        '{"messages": [{"role": "user", "content": "Hello"}]}',
        *("c.jsonl", "line 1", "chat template"),
        spoil=in_json(
            "ckpt/tokenizer_config.json", lambda data: data.pop("chat_template")
        ),
    ),
    Case("text: too short", f"{MEASURE} s.txt", ("s.txt", "windows", "2", "32"),
         holding("s.txt", "The old clock counts seven stones.")),
    Case("text: too short, eval", f"{EVAL} s.txt", ("s.txt", "1 tokens"),
         both(holding("s.txt", "A"), without_bos)),
    Case("text: missing", f"{MEASURE} no.txt", ("no.txt", "no such")),
    Case("text: missing, eval", f"{EVAL} no.txt", ("no.txt", "no such")),
    Case("text: a folder", f"{MEASURE} ckpt", ("ckpt", "text file")),
    Case("text: a folder, eval", f"{EVAL} ckpt", ("ckpt", "text file")),
    Case("text: none, eval", "eval ckpt", ("--text",)),
    Case("text: second one missing, eval",
         f"{EVAL} text.txt --text no.txt --max-tokens 40", ("no.txt", "no such")),
    Case("text: half a Hub name", f"{MEASURE} hub:/c4", ("hub:/c4", "OWNER/NAME")),
]  # fmt: skip

TOKENIZERS = [
    Case(
        "tokenizer: a length that is no number",
        RUN,
        ("ckpt: its tokenizer cannot be loaded", "'int' and 'str'"),
        with_keys("ckpt/tokenizer_config.json", model_max_length="<unk>"),
    ),
    *no_tokenizer("none", tokenizer_gone, "ckpt", "no tokenizer"),
    *no_tokenizer(
        "not JSON",
        holding("ckpt/tokenizer.json", "{"),
        *("ckpt/tokenizer.json", "not valid JSON"),
    ),
    *no_tokenizer("of another model", other_tokenizer, "ckpt", "512", "another model"),
    Case(
        "tokenizer: asks for code",
        RUN,
        ("ckpt", "tokenizer"),
        both(
            with_keys(
                "ckpt/tokenizer_config.json",
                tokenizer_class="Mine",
                auto_map={"AutoTokenizer": ["mine.Mine", None]},
            ),
            deleted("ckpt/tokenizer.json"),
        ),
    ),
]

OPTIONS = [
    *(
        Case(f"device: {device}, {command.split()[0]}", f"{command} --device {device}",
             (f"'{device}'", "cpu"))
        for device in ("banana", "cuda:99", "cpu:7", "cuda:-1", "meta", *NO_GPU)
        for command in (RUN, f"{EVAL} text.txt")
    ),
    Case("device: banana, measure", f"{MEASURE} text.txt --device banana", ("banana",)),
    Case("device: banana, cut",
         "cut ckpt --plan plan.json -o new --calibration text.txt --device banana",
         ("'banana'", "cpu")),
    Case("cut: shard size 0", "cut ckpt --plan plan.json -o new --shard-size 0",
         ("'0'", "positive")),
    Case("run: shard size 0", f"{RUN} --shard-size 0", ("'0'", "positive")),
    Case("run: samples 0", f"{RUN} --samples 0", ("samples",)),
    Case("run: samples huge", f"{RUN} --samples {10**15}", ("samples", "16777216")),
    Case("run: sequence of 1", f"{RUN} --sequence-length 1", ("sequence_length",)),
    Case("run: seed of text", f"{RUN} --seed best", ("'--seed'", "run --help")),
    eval_flags("sequence of 1", "--sequence-length 1", "'--sequence-length'", "2"),
    eval_flags("no tokens", "--max-tokens 0", "'--max-tokens'", "2"),
    eval_flags("fewer than no tokens", "--max-tokens -5", "'--max-tokens'", "2"),
    Case("no such command", "prune ckpt", ("'prune'", "vllm-moe-prune --help")),
    Case("no such option", "inspect ckpt --fast", ("--fast",)),
    Case("no checkpoint", "inspect", ("argument", "vllm-moe-prune inspect --help")),
    Case("a word too many", "inspect ckpt out", ("out",)),
]  # fmt: skip

HUB = [
    Case(f"hub: unreachable, {command}", command,
         ("no-one/nothing", "Hub", "HF_HUB_OFFLINE"))
    for command in (
        "inspect no-one/nothing",
        "run no-one/nothing new --calibration text.txt",
        "measure no-one/nothing -o new.safetensors",
        "plan no-one/nothing -o plan.json",
        "cut no-one/nothing --plan plan.json -o new",
        "verify no-one/nothing",
        "verify out --source no-one/nothing",
        "serve no-one/nothing --dry-run",
        "eval no-one/nothing --text text.txt",
    )
]  # fmt: skip

CASES = [*TEXTS, *TOKENIZERS, *OPTIONS, *HUB]
