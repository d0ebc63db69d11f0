"""What ``families`` prints, and the documentation's table of it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from .draw import facts, print_json

if TYPE_CHECKING:
    from ...archs.support import FamilySupport


def show_families(families: "Sequence[FamilySupport]", as_json: bool) -> None:
    """One block per family."""
    from ...archs.support import MEANING

    if as_json:
        data = [asdict(one) for one in families]
        print_json({"families": data, "tested": MEANING})
        return
    for one in families:
        alias = f" (table of {one.alias_of})" if one.alias_of else ""
        facts(f"{one.model_type}{alias}", list(_facts(one)))
    facts("What is compared", list(MEANING.items()))


def _facts(one: "FamilySupport") -> Iterator[tuple[str, str]]:
    yield "checkpoints", one.checkpoints
    yield "uniform plans", ", ".join((*one.uniform, "plugin"))
    yield "all plans", f"plugin ({one.plugin})"
    yield "stock vLLM >= 0.33", f"uneven: {one.stock_vllm or 'no'}"
    for what in one.refused:
        yield "refused", what.replace("`", "")
    yield "tested", ", ".join(one.tested)


def families_table(families: "Sequence[FamilySupport]") -> str:
    """The same as Markdown."""
    rows = [
        "| `model_type` | checkpoints | uniform plans load in "
        "| uneven in stock vLLM ≥ 0.33 | refused | tested |",
        "|---|---|---|---|---|---|",
    ]
    for one in families:
        tested = f"as `{one.alias_of}`" if one.alias_of else ", ".join(one.tested)
        cells = (
            f"`{one.model_type}`",
            one.checkpoints,
            ", ".join((*one.uniform, "plugin")),
            one.stock_vllm or "",
            "; ".join(one.refused),
            tested,
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
