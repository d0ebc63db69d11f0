"""The report's numbers as plain data, for ``--json``."""

from typing import Any

from ..calibrate.stats import Array
from .read import Kurtosis, LayerNumbers, Numbers


def as_data(numbers: Numbers) -> dict[str, Any]:
    """Everything that is drawn, but for the distances, which the statistics hold."""
    return {
        "source": numbers.name,
        "revision": numbers.plan.model.revision,
        "recipe": numbers.plan.recipe.name,
        "tool_version": numbers.tool_version,
        "tensor_bytes": {"before": numbers.bytes_before, "after": numbers.bytes_after},
        "parameters": {
            "before": numbers.parameters_before,
            "after": numbers.parameters_after,
            "zeros": numbers.zeros,
        },
        "sparsity": {
            "of_experts": numbers.expert_sparsity,
            "of_all_parameters": numbers.total_sparsity,
        },
        "threshold": numbers.plan.threshold,
        "forward_passes": numbers.forward_passes,
        "kurtosis": _kurtosis(numbers.kurtosis),
        "block_cosine": _list(numbers.block_cosine_HH),
        "layers": [_layer(layer) for layer in numbers.layers],
        "not_measured": list(numbers.missing),
    }


def _layer(layer: LayerNumbers) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "action": layer.action,
        "experts_before": layer.experts,
        "kept": list(layer.keep),
        "clusters": layer.clusters and [list(cluster) for cluster in layer.clusters],
        "merge_heights": [merge.height for merge in layer.merges],
        "removed": layer.removed,
        "zeroed": layer.zeroed,
        "unseen_experts": list(layer.unseen),
        "routing_score": _list(layer.routing_score_E),
        "routing_frequency": _list(layer.frequency_E),
        "moe_cosine": layer.moe_cosine,
        "sensitivity": _list(layer.sensitivity_P2),
        "coverage": layer.coverage,
        "refit": layer.refit.model_dump(exclude={"layer"}) if layer.refit else None,
        "kurtosis": _kurtosis(layer.kurtosis),
    }


def _kurtosis(found: Kurtosis) -> dict[str, float | None]:
    return {
        "before": found.before,
        "trimmed": found.trimmed,
        "slimmed": found.slimmed,
    }


def _list(values: Array | None) -> list[Any] | None:
    return None if values is None else values.tolist()
