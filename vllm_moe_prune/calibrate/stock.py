"""The pieces of transformers that the forward is built from, without their MoE block.

Axes: b sequences, T tokens of a sequence, D hidden.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..archs.spec import LATENT_ATTENTION, MOE_NORM, MoeArch
from ..checkpoint.config_values import MTP_OVERRIDES, OVERRIDES
from ..checkpoint.open import Checkpoint
from ..checkpoint.remap import CONFIG_BLOCK
from ..errors import CheckpointError

ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
# Keys of config.json that only concern the MoE block, or the file itself.
OURS = (
    *("architectures", "auto_map", "model_type", "quantization_config"),
    *(OVERRIDES, MTP_OVERRIDES, CONFIG_BLOCK),
)
# The MLP of transformers' decoder layers.
MLP = "mlp"


class Nothing(torch.nn.Module):
    """Stands where a stock layer has its MoE block: leaves the residual as it is."""

    def forward(self, x_bTD: torch.Tensor) -> torch.Tensor:
        """Zero, of no shape."""
        # Broadcasts in residual + mlp(x): no array of zeros is made.
        return x_bTD.new_zeros(())


def find_class(path: str) -> Any:
    """The class named ``module:Class``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def stock_config(checkpoint: Checkpoint) -> Any:
    """The family's transformers config, every layer alike.

    Raises:
        CheckpointError: Nothing can be built from config.json.
    """
    arch = checkpoint.arch
    values = {key: value for key, value in checkpoint.config.items() if key not in OURS}
    if arch.attention is not LATENT_ATTENTION and values.get("head_dim") is None:
        # Some rotary embeddings of transformers take a null for a number.
        heads = values.get("num_attention_heads")
        if isinstance(heads, int) and heads > 0:
            values["head_dim"] = values[arch.config.hidden] // heads
    with _refusing(checkpoint, "a model"):
        config = find_class(arch.hf_config).from_dict(values)
        # Unset, transformers takes eager attention: [T, T] scores of every head.
        config._attn_implementation = "sdpa"
        further = len(checkpoint.layers) - len(checkpoint.decoder_layers)
        for key in arch.per_layer_lists:
            # Layers that predict further tokens have indices behind the last.
            if isinstance(listed := getattr(config, key, None), list):
                setattr(config, key, [*listed, *(listed[-1:] * further)])
    with _refusing(checkpoint, "a decoder layer"):
        # Built and thrown away: sizes that do not go together fail here.
        stock_layer(arch, config, 0)
    return config


def stock_rotary(checkpoint: Checkpoint, config: Any) -> torch.nn.Module:
    """The rotary embedding of a config whose sizes have been compared with the tensors.

    Raises:
        CheckpointError: Nothing can be built from config.json.
    """
    found = checkpoint.config
    said = ", ".join(f"{key} {found[key]!r}" for key in ROPE if key in found)
    with _refusing(checkpoint, f"a rotary embedding with {said or 'no rope keys'}"):
        _check_share(config)
        rotary: torch.nn.Module = find_class(checkpoint.arch.hf_rotary)(config)
    return rotary


def _check_share(config: Any) -> None:
    """Refuse to rotate more of a head than there is: it would be allocated."""
    share = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if not 0 < share <= 1:
        raise ValueError(f"partial_rotary_factor is {share}, not a part of a head")


@contextmanager
def _refusing(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each wrong value fails in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: transformers cannot build {what} "
            f"from it: {reason}."
        ) from error


def stock_layer(arch: MoeArch, config: Any, index: int) -> torch.nn.Module:
    """A decoder layer on the meta device that adds its attention and nothing else."""
    with torch.device("meta"):
        # Its MoE block is made too, and replaced below: no memory on this device.
        layer: torch.nn.Module = find_class(arch.hf_layer)(config, index)
    # Run apart from the layer, since router and experts read what it gives.
    setattr(layer, MOE_NORM, torch.nn.Identity())
    setattr(layer, MLP, Nothing())
    return layer.eval()


def watch_linears(
    layer: torch.nn.Module, see: Callable[[str, torch.Tensor], None]
) -> None:
    """Show every linear map's inputs [n, D], by the name of its weight."""

    def hook(name: str) -> Callable[[torch.nn.Module, Any], None]:
        def show(_module: torch.nn.Module, inputs: Any) -> None:
            see(f"{name}.weight", inputs[0].flatten(0, -2))

        return show

    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))


def stock_norm(arch: MoeArch, config: Any, weight_D: torch.Tensor) -> torch.nn.Module:
    """A norm with its weight."""
    with torch.device("meta"):
        norm: torch.nn.Module = find_class(arch.hf_norm)(
            config.hidden_size, eps=config.rms_norm_eps
        )
    norm.load_state_dict({"weight": weight_D}, assign=True)
    return norm


def attention_bytes(config: Any, length: int, itemsize: int) -> int:
    """Temporaries of one sequence in the attention: about 4 D and 4 heads wide."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "qk_head_dim", None) or getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // heads
    wide = 4 * config.hidden_size + 4 * heads * head_dim
    return int(length * wide * itemsize)


def activation(checkpoint: Checkpoint) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function between an expert's gate and up projections."""
    from transformers.activations import ACT2FN

    name = checkpoint.config.get("hidden_act", "silu")
    if not isinstance(name, str) or name not in ACT2FN:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: hidden_act {name!r} is not an "
            "activation that transformers knows."
        )
    act: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[name]
    return act


def causal_mask(
    arch: MoeArch, config: Any, x_bTD: torch.Tensor, position_ids: torch.Tensor
) -> Any:
    """The mask that the family's model makes; None where plain causal will do."""
    from transformers import masking_utils

    # Any config.json may have the key, as attributes of one that nobody reads.
    sliding = arch.slides and getattr(config, "sliding_window", None) is not None
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
