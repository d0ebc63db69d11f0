"""Prometheus metrics of the gateway, ``moe_prune_*``."""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# A label for every path a client can think of would fill the memory.
PATHS = frozenset(
    {
        *("chat/completions", "completions", "responses", "messages", "embeddings"),
        *("models", "score", "rerank", "audio/transcriptions", "audio/translations"),
    }
)
SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)


class Metrics:
    """All of them, in a registry of their own: one per gateway."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "moe_prune_requests",
            "Requests that have ended.",
            ("backend", "path", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "moe_prune_request_seconds",
            "From a request's head to the end of its answer.",
            ("backend",),
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token = Histogram(
            "moe_prune_time_to_first_token_seconds",
            "From a request's head to the first event of a streamed answer.",
            ("backend",),
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            "moe_prune_tokens",
            "Tokens, as answers tell them in their usage.",
            ("backend", "kind"),
            registry=registry,
        )
        self.errors = Counter(
            "moe_prune_errors",
            "Requests that the gateway could not carry out, by reason.",
            ("backend", "code"),
            registry=registry,
        )
        self.in_flight = Gauge(
            "moe_prune_requests_in_flight",
            "Requests on their way at a backend.",
            ("backend",),
            registry=registry,
        )
        self.up = Gauge(
            "moe_prune_backend_up",
            "1 if the backend is healthy.",
            ("backend",),
            registry=registry,
        )
        self.parameters = Gauge(
            "moe_prune_model_parameters",
            "Parameters of the served model, before and after pruning.",
            ("backend", "state"),
            registry=registry,
        )
        self.source_bytes = Gauge(
            "moe_prune_model_source_bytes",
            "Tensor bytes of the checkpoint that was pruned.",
            ("backend",),
            registry=registry,
        )
        self.sparsity = Gauge(
            "moe_prune_model_sparsity_ratio",
            "Removed or zeroed parameters over those before.",
            ("backend", "of"),
            registry=registry,
        )

    def prepare(self, backends: Iterable[str]) -> None:
        """Show every backend from the start."""
        for name in backends:
            self.up.labels(name).set(0)
            self.in_flight.labels(name).set(0)

    def show_model(self, backend: str, provenance: Mapping[str, Any] | None) -> None:
        """Sizes and sparsity of what a backend serves; None: not pruned by us."""
        done = provenance.get("sparsity_achieved") if provenance else None
        known = done if isinstance(done, dict) else {}
        for state in ("before", "after"):
            _set(self.parameters, known.get(f"parameters_{state}"), backend, state)
        for of, key in (("experts", "of_experts"), ("all", "of_all_parameters")):
            _set(self.sparsity, known.get(key), backend, of)
        size = provenance.get("source_bytes") if provenance else None
        _set(self.source_bytes, size, backend)


def _set(gauge: Gauge, value: object, *labels: str) -> None:
    """Set one value, or take it away where there is none (any more)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        gauge.labels(*labels).set(value)
    else:
        gauge.remove(*labels)


def path_label(path: bytes) -> str:
    """What a path under ``/v1/`` counts as."""
    name = path.decode("ascii", "replace")
    return name if name in PATHS else "other"
