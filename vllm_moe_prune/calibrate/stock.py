"""The pieces of transformers that the forward is built from, without their MoE block.

Axes: b sequences, T tokens of a sequence, D hidden.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from ..archs.spec import MoeArch
from ..checkpoint.open import Checkpoint
from ..errors import CheckpointError

# Every family calls the norm before its MoE sublayer so.
MOE_NORM = "post_attention_layernorm"
# Keys of config.json that only concern the MoE block, or the file itself.
OURS = ("per_layer_config", "moe_prune", "architectures", "auto_map")


class Nothing(torch.nn.Module):
    """Stands where a stock layer has its MoE block: leaves the residual as it is."""

    def forward(self, x_bTD: torch.Tensor) -> torch.Tensor:
        """Zero, of no shape."""
        return x_bTD.new_zeros(())


def find_class(path: str) -> Any:
    """The class named ``module:Class``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def stock_config(checkpoint: Checkpoint) -> Any:
    """The family's transformers config, every layer alike."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = {key: value for key, value in checkpoint.config.items() if key not in OURS}
    try:
        config = CONFIG_MAPPING[checkpoint.arch.model_type].from_dict(values)
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: transformers refuses it: {reason}"
        ) from error
    config._attn_implementation = "sdpa"
    return config


def stock_layer(arch: MoeArch, config: Any, index: int) -> torch.nn.Module:
    """A decoder layer on the meta device that adds its attention and nothing else."""
    with torch.device("meta"):
        layer: torch.nn.Module = find_class(arch.hf_layer)(config, index)
    setattr(layer, MOE_NORM, torch.nn.Identity())
    setattr(layer, arch.skip_name, Nothing())
    return layer.eval()


def stock_norm(arch: MoeArch, config: Any, weight_D: torch.Tensor) -> torch.nn.Module:
    """A norm with its weight."""
    with torch.device("meta"):
        norm: torch.nn.Module = find_class(arch.hf_norm)(
            config.hidden_size, eps=config.rms_norm_eps
        )
    norm.load_state_dict({"weight": weight_D}, assign=True)
    return norm


def activation(checkpoint: Checkpoint) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function between an expert's gate and up projections."""
    from transformers.activations import ACT2FN

    name = checkpoint.config.get("hidden_act", "silu")
    if name not in ACT2FN:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: hidden_act {name!r} is not an "
            "activation that transformers knows."
        )
    act: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return act


def causal_mask(config: Any, x_bTD: torch.Tensor, position_ids: torch.Tensor) -> Any:
    """The mask MixtralModel makes: None where plain causal attention will do."""
    from transformers import masking_utils

    sliding = getattr(config, "sliding_window", None) is not None
    make = (
        masking_utils.create_sliding_window_causal_mask
        if sliding
        else masking_utils.create_causal_mask
    )
    return make(
        config=config,
        inputs_embeds=x_bTD,
        attention_mask=None,
        past_key_values=None,
        position_ids=position_ids,
    )
