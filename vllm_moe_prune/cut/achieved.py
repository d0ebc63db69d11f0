"""What a cut achieved: sparsity per layer, of the experts, of the whole model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.open import Checkpoint
from ..decide.cut_plan import CutPlan
from .layer_record import LayerRecord
from .slice import output_tensors


@dataclass(frozen=True, kw_only=True)
class LayerAchieved:
    """One input layer, counted in expert parameters."""

    layer: int
    action: str
    experts_before: int
    experts_after: int
    parameters_before: int
    parameters_after: int
    zeros: int
    """Zeros written by this cut among the parameters that are left."""
    dense_zeros: int
    """Zeros in its attention and MLPs, where those were slimmed."""
    unseen: tuple[int, ...]

    @property
    def sparsity(self) -> float:
        """Removed or zeroed expert parameters over those before."""
        if self.parameters_before == 0:
            return 0.0
        # A removed weight counts like a zeroed one.
        return 1.0 - (self.parameters_after - self.zeros) / self.parameters_before


@dataclass(frozen=True)
class Achieved:
    """The whole model."""

    layers: tuple[LayerAchieved, ...]
    parameters_before: int
    parameters_after: int

    @property
    def zeros(self) -> int:
        """Zeros written into surviving experts."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def expert_sparsity(self) -> float:
        """Removed or zeroed expert parameters over expert parameters before."""
        before = sum(layer.parameters_before for layer in self.layers)
        after = sum(layer.parameters_after for layer in self.layers)
        return 1.0 - (after - self.zeros) / before if before else 0.0

    @property
    def total_sparsity(self) -> float:
        """Removed or zeroed parameters over all parameters before."""
        dense = sum(layer.dense_zeros for layer in self.layers)
        left = self.parameters_after - self.zeros - dense
        return 1.0 - left / self.parameters_before

    def as_dict(self) -> dict[str, Any]:
        """For provenance.json."""
        return {
            "of_experts": round(self.expert_sparsity, 6),
            "of_all_parameters": round(self.total_sparsity, 6),
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "zeros": self.zeros,
            "layers": [
                {
                    "layer": layer.layer,
                    "action": layer.action,
                    "experts_before": layer.experts_before,
                    "experts_after": layer.experts_after,
                    "sparsity": round(layer.sparsity, 6),
                    "zeros": layer.zeros,
                    "dense_zeros": layer.dense_zeros,
                    "unseen_experts": list(layer.unseen),
                }
                for layer in self.layers
            ],
        }


def achieved(
    checkpoint: Checkpoint, plan: CutPlan, records: Sequence[LayerRecord]
) -> Achieved:
    """Count what is left, from shapes and the zeros counted while writing."""
    tensors = output_tensors(checkpoint, plan)
    by_layer = {record.layer: record for record in records}
    layers = []
    for layer, layer_plan in zip(checkpoint.layers, plan.layers, strict=True):
        before = sum(
            checkpoint.tensors[name].numel
            for name in (checkpoint.expert_names(layer) if layer.has_moe else ())
        )
        after = sum(
            tensor.parameters
            for tensor in tensors
            if tensor.layer == layer.index and tensor.is_expert
        )
        # No record: neither slimmed nor quantized, so no zeros were written.
        record = by_layer.get(layer.index, LayerRecord(layer=layer.index))
        layers.append(
            LayerAchieved(
                layer=layer.index,
                action=layer_plan.action,
                experts_before=layer.num_experts,
                experts_after=len(layer_plan.keep),
                parameters_before=before,
                parameters_after=after,
                zeros=record.zeros,
                dense_zeros=record.dense_zeros,
                unseen=tuple(record.unseen),
            )
        )
    # Scales of FP8 blocks are stored tensors but no parameters of the model.
    after_all = sum(
        tensor.parameters
        for tensor in tensors
        if not checkpoint.is_scale(tensor.groups[0][0].source)
    )
    return Achieved(tuple(layers), checkpoint.parameters, after_all)
