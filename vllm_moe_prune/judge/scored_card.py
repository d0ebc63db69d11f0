"""Scores in the model card of the checkpoint that they are of."""

from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.open import Checkpoint
from ..cut.card import source_card
from ..cut.card_places import SCORES, cell, fill, has_place
from ..errors import EvaluationError
from ..files.atomic import REPEAT, write_file, writing
from .generation import Generated, habits
from .quality import Quality
from .recovery import recoveries, with_mean


def check_card(checkpoint: Checkpoint) -> Path:
    """The card that scores can be written into.

    Raises:
        EvaluationError: There is none, or no place in it.
    """
    path = checkpoint.folder / "README.md"
    if checkpoint.origin.revision is not None:
        raise EvaluationError(
            f"{checkpoint.origin.name}: --card writes into a folder of this machine, "
            "not into a download of the Hub."
        )
    card = source_card(checkpoint)
    if card is None or not all(has_place(card, name) for name in SCORES):
        lines = ", ".join(f"<!-- {name} --><!-- end of {name} -->" for name in SCORES)
        raise EvaluationError(
            f"{path}: has no place for scores. Add the lines {lines}, or cut it anew."
        )
    return path


def write_scores(
    checkpoint: Checkpoint, quality: Quality, original: Quality | None
) -> None:
    """Put what was measured into the card; scores of other kinds stay there.

    Raises:
        EvaluationError: See ``check_card``.
    """
    path = check_card(checkpoint)
    card = source_card(checkpoint)
    assert card is not None
    for name, text in score_parts(quality, original).items():
        card = fill(card, name, f"\n{text}\n")
    with writing(path, REPEAT):
        write_file(path, card.encode())


def score_parts(quality: Quality, original: Quality | None) -> dict[str, str]:
    """Place -> its table in Markdown, of what was measured."""
    parts = {}
    if quality.texts:
        parts["perplexity"] = _texts(quality, original)
    if quality.scores:
        parts["tasks"] = _tasks(quality, original)
    if quality.generated is not None:
        before = None if original is None else original.generated
        parts["answers"] = _answers(quality.generated, before)
    return parts


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _texts(quality: Quality, original: Quality | None) -> str:
    before = {one.source: one for one in original.texts} if original else {}
    rows = []
    for one in quality.texts:
        row = [cell(one.source), f"{one.tokens:,}", f"{one.perplexity:.3f}"]
        known = before.get(one.source)
        row.append("–" if known is None else f"{known.perplexity:.3f}")
        rows.append(row)
    heads = ("held-out text", "tokens", "perplexity", "of the original")
    return _table(heads, rows)


def _tasks(quality: Quality, original: Quality | None) -> str:
    before = original.scores if original else ()
    known = {one.task: one for one in with_mean(before)} if before else {}
    recovered = {one.task: one for one in recoveries(quality.scores, before)}
    rows = []
    for one in with_mean(quality.scores):
        row = [cell(one.task), cell(one.metric), f"{one.samples:,}"]
        row.append(f"{one.value:.1%}")
        row.append(f"{known[one.task].value:.1%}" if one.task in recovered else "–")
        percent = recovered[one.task].percent if one.task in recovered else None
        row.append("–" if percent is None else f"{percent:.1f} %")
        rows.append(row)
    heads = ("task", "metric", "samples", "score", "of the original", "recovered")
    return _table(heads, rows)


def _answers(found: Generated, original: Generated | None) -> str:
    rows = []
    for kind in ("greedy", "sampled"):
        models = [("this", found), *([("original", original)] if original else [])]
        for name, one in models:
            seen = habits(getattr(one, kind))
            rows.append(
                [
                    f"{kind}, {name}",
                    f"{seen.length:.1f}",
                    f"{seen.ended:.1%}",
                    f"{seen.repetition:.1%}",
                    f"{seen.loops:.1%}",
                ]
            )
    heads = ("answers", "mean tokens", "end by themselves", "repetition", "loops")
    said = (
        f"{len(found.greedy)} prompts of {cell(found.prompts.source)}, at most "
        f"{found.new_tokens} tokens each:\n\n{_table(heads, rows)}"
    )
    if found.against is not None:
        said += (
            f"\n\nAlong the original's greedy answers it chooses "
            f"{found.against.agreement:.1%} of the tokens as the original did; "
            f"KL(original, this) is at least {found.against.kl:.4f} nats per token."
        )
    return said
