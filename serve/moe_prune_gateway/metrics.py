"""Prometheus metrics of the gateway, ``moe_prune_*``."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from .backend_reports import ReportedProvenance, ReportedSparsity

# A label for every path a client can think of would fill the memory.
PATHS = frozenset(
    {
        *("chat/completions", "completions", "responses", "messages", "embeddings"),
        *("models", "score", "rerank", "audio/transcriptions", "audio/translations"),
    }
)
# Up to 10 minutes for long generations; prometheus_client adds +Inf.
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
            "Tokens, by the usage that answers report.",
            ("backend", "kind"),
            registry=registry,
        )
        self.errors = Counter(
            "moe_prune_errors",
            "Requests that failed in the gateway, by reason.",
            ("backend", "code"),
            registry=registry,
        )
        self.in_flight = Gauge(
            "moe_prune_requests_in_flight",
            "In-flight requests of a backend.",
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

    def show_model(self, backend: str, found: ReportedProvenance | None) -> None:
        """Sizes and sparsity of what a backend serves; None: not pruned by us."""
        found = found or ReportedProvenance()
        achieved = found.sparsity_achieved or ReportedSparsity()
        _set(self.parameters, achieved.parameters_before, backend, "before")
        _set(self.parameters, achieved.parameters_after, backend, "after")
        _set(self.sparsity, achieved.of_experts, backend, "experts")
        _set(self.sparsity, achieved.of_all_parameters, backend, "all")
        _set(self.source_bytes, found.source_bytes, backend)


def _set(gauge: Gauge, value: float | None, *labels: str) -> None:
    """Set one value, or take it away where there is none (any more)."""
    if value is None:
        gauge.remove(*labels)
    else:
        gauge.labels(*labels).set(value)


def path_label(path: bytes) -> str:
    """What a path under ``/v1/`` counts as."""
    name = path.decode("ascii", "replace")
    return name if name in PATHS else "other"
