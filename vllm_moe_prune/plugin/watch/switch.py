"""Watching what a served model does: how it is switched on, and what is then said.

No vLLM in here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from ...checkpoint.open import Checkpoint
from ...checkpoint.remap import ExpertRemap
from ...errors import ServeError

SWITCH = "moe_prune_load"
"""The key of ``--additional-config`` that switches counting on."""
EXTENSION = f"{__package__}.routing_load.RoutingLoad"
"""What ``--worker-extension-cls`` has to name, so that counts can be read."""
PLUGINS = ("moe_prune", "moe_prune_api")
"""What ``VLLM_PLUGINS`` has to name: vLLM adds routes for named plugins only."""


class LayerLoad(BaseModel):
    """A layer that has experts, or had some before it was pruned."""

    layer: int
    """Index in the served model."""
    source_layer: int
    """Index in the original."""
    experts: list[int]
    """Tokens each expert got; one that several slots of a token lead to counts each.
    Empty where the MoE sublayer was dropped."""
    source_experts: list[int]
    """The expert of the original that each of them is."""


class Load(BaseModel):
    """Live routing load since the server was ready."""

    enabled: bool
    since: float | None
    """Seconds since 1970; None: nothing is counted."""
    top_k: int
    """Slots of a token, in the layer with most."""
    weight_bytes: int | None
    """Of the model in the memory of all processes; None: nothing is counted."""
    layers: list[LayerLoad]


def is_on(vllm_config: Any) -> bool:
    """Whether the user asked for counting.

    Args:
        vllm_config: vLLM's.

    Raises:
        ServeError: With something else than true or false.
    """
    extra = vllm_config.additional_config
    # vLLM takes objects that are no dict here too (SupportsHash).
    value = extra.get(SWITCH, False) if isinstance(extra, dict) else False
    if not isinstance(value, bool):
        raise ServeError(
            f"--additional-config: {SWITCH} is {value!r}; use true or false."
        )
    return value


def check_supported(parallel_config: Any) -> None:
    """Refuse settings under which no process sees every token just once.

    Raises:
        ServeError: Naming the flag.
    """
    for name in (
        "data_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if (size := getattr(parallel_config, name)) > 1:
            raise ServeError(
                f"--{name.replace('_', '-')} {size}: routed tokens cannot be counted "
                f"under it. Leave it out, or {SWITCH}."
            )


def merge(
    workers: Iterable[Sequence[tuple[int, list[int]]] | None],
) -> dict[int, list[int]]:
    """Layer -> tokens per expert, from all processes; those that say None add none.

    Raises:
        ServeError: Two processes speak for the same layer.
    """
    merged: dict[int, list[int]] = {}
    for worker in workers:
        # Each pipeline stage speaks for layers of its own.
        for layer, counts in worker or ():
            if layer in merged:
                raise ServeError(f"layer {layer} was counted by two processes.")
            merged[layer] = counts
    return merged


def describe_load(
    checkpoint: Checkpoint | None,
    remap: ExpertRemap | None,
    counts: Mapping[int, list[int]],
    since: float | None,
    top_k: int = 0,
    weight_bytes: int | None = None,
) -> Load:
    """What was counted, in the terms of the original model too.

    Args:
        checkpoint: What vLLM was given to serve; None: of a family not known here.
        remap: What became of the original's experts; None: it was never pruned.
        counts: Layer -> tokens per expert.
        since: When counting began; None: never.
        top_k: Slots of a token, where the family is not known.
        weight_bytes: Of the model in the memory of all processes.

    Raises:
        ServeError: What was counted is not what the table says is served.
    """
    if checkpoint is not None:
        top_k = max((layer.top_k for layer in checkpoint.moe_layers), default=0)
    if checkpoint is None:
        experts = [
            (layer, layer, tuple(range(len(counts[layer])))) for layer in sorted(counts)
        ]
    elif remap is None:
        experts = [
            (layer.index, layer.index, tuple(range(layer.num_experts)))
            for layer in checkpoint.decoder_layers
            if layer.has_moe
        ]
    else:
        # Pruned while loading, the checkpoint is the original, with its own top-k.
        top_k = min(top_k, max(len(entry.router_rows) for entry in remap.layers))
        experts = [
            (entry.layer, entry.original_layer, entry.kept)
            for entry in remap.layers
            if entry.moe or entry.moe_dropped
        ]
    if since is None:
        return Load(
            enabled=False, since=None, top_k=top_k, weight_bytes=None, layers=[]
        )
    layers = [
        LayerLoad(
            layer=layer,
            source_layer=source,
            experts=counts.get(layer, []),
            source_experts=list(kept),
        )
        for layer, source, kept in experts
    ]
    for each in layers:
        if len(each.experts) != len(each.source_experts):
            raise ServeError(
                f"layer {each.layer}: {len(each.experts)} experts were counted, but "
                f"{len(each.source_experts)} are served."
            )
    return Load(
        enabled=True,
        since=since,
        top_k=top_k,
        weight_bytes=weight_bytes,
        layers=layers,
    )
