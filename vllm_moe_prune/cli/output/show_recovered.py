"""What ``recover`` prints when it is done, as tables or as JSON."""

import dataclasses
from typing import TYPE_CHECKING

from ...calibrate.perplexity import perplexity_of
from ...progress import gib, peak_rss_bytes
from .draw import duration, facts, hint, print_json, table

if TYPE_CHECKING:
    from ...recover.recover import Recovered


def show_recovered(result: "Recovered", elapsed_s: float, as_json: bool) -> None:
    """What was trained, and what that did to the loss."""
    asked, before, after = result.training, result.loss_before, result.loss_after
    if as_json:
        print_json(
            {
                "output": str(result.out),
                **dataclasses.asdict(asked),
                "loss": {"before": before, "after": after},
                "perplexity": {
                    "before": perplexity_of(before),
                    "after": perplexity_of(after),
                },
                "divergence": None
                if result.divergence is None
                else dict(zip(("before", "after"), result.divergence, strict=True)),
                "tensors": result.tensors,
                "parameters": result.parameters,
                "layers": [dataclasses.asdict(layer) for layer in result.layers],
                "file_bytes": result.file_bytes,
                "elapsed_s": round(elapsed_s, 3),
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
        return
    if result.layers:
        table(
            "Squared distance from the original's output on held-out windows",
            ("layer", "original layer", "before", "after"),
            [
                (
                    layer.layer,
                    layer.original_layer,
                    f"{layer.before:.4f}",
                    f"{layer.after:.4f}",
                )
                for layer in result.layers
            ],
        )
    facts(
        f"Wrote {result.out}",
        [
            ("trained", f"{', '.join(asked.targets)} by {asked.method}"),
            ("weights", f"{result.parameters:,} in {result.tensors} tensors"),
            ("loss", f"{before:.4f} -> {after:.4f} nats per token"),
            (
                "perplexity",
                f"{perplexity_of(before):.2f} -> {perplexity_of(after):.2f}",
            ),
            *_divergence(result),
            ("time", duration(elapsed_s)),
            ("peak memory", gib(peak_rss_bytes())),
        ],
    )
    hint(f"Next: vllm-moe-prune eval {result.out} --text HELDOUT")


def _divergence(result: "Recovered") -> list[tuple[str, str]]:
    if result.divergence is None:
        return []
    before, after = result.divergence
    return [("KL from the teacher", f"{before:.4f} -> {after:.4f} nats per token")]
