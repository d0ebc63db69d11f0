"""LoRA adapters by peft, on matrices whose zeros have to stay zero.

What an adapter adds, B A, is dense. On a matrix that has zeros it is masked, while it
is trained as when it is merged; elsewhere peft's own layer is used as it is.
"""

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.nn import functional

from .model import TrainableModel

# lora_alpha / r, by which peft multiplies B A.
SCALE = 2


class MaskedLinear(lora.Linear):
    """peft's layer for a matrix that has zeros."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds, nothing where the matrix is zero [out, in]."""
        delta: torch.Tensor = super().get_delta_weight(adapter)
        return delta * (self.get_base_layer().weight != 0)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Exactly what the merged matrix will compute."""
        base = self.get_base_layer()
        if self.merged:
            return base(x)
        # Masked element by element, B A no longer factors into B (A x).
        delta = self.get_delta_weight(self.active_adapters[0])
        merged = (base.weight + delta).to(base.weight.dtype)
        return functional.linear(x, merged, base.bias)


def _adapted(base: nn.Linear, adapter: str, **kwargs: Any) -> lora.Linear:
    zeros = bool((base.weight == 0).any())
    # Where no zero has to stay, peft's B (A x) needs no [out, in] per step.
    return (MaskedLinear if zeros else lora.Linear)(base, adapter, **kwargs)


def with_adapters(model: TrainableModel, pattern: str, rank: int) -> PeftModel:
    """The model with an adapter on each matrix that ``pattern`` matches; no more.

    Args:
        model: Changed in place.
        pattern: Of module names.
        rank: Of the adapters.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        target_modules=pattern,
        bias="none",
        # B starts at zero: the first step sees the pruned model itself.
        init_lora_weights=True,
    )
    # peft's way for layers of one's own.
    config._register_custom_module({nn.Linear: _adapted})
    return get_peft_model(model, config)


def merged(model: PeftModel) -> TrainableModel:
    """The model with its adapters added to its matrices, in fp32, rounded once."""
    plain: TrainableModel = model.merge_and_unload()
    return plain
