"""The streaming forward: one decoder layer at a time, one expert at a time.

Attention and norms are the stock classes of transformers, built without their MoE
block and filled from the checkpoint when a layer's turn comes; the experts are ours,
so that every layout, uneven expert counts and redirects run through the same code.
Nothing here computes a gradient. Repeating a run repeats every bit.

Axes: S sequences, T tokens of a sequence, D hidden, F expert width, N = S*T tokens,
n some of them, R router rows, K top-k, V vocabulary.
"""

import importlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from ..checkpoint.index import TensorInfo
from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.reader import DTYPES, read_router, read_tensor
from ..errors import CalibrationError, CheckpointError
from .experts import (
    Activation,
    Read,
    Routing,
    expert_hidden,
    expert_tokens,
    route,
    run_experts,
)

__all__ = [
    "Activation",
    "Read",
    "Routing",
    "StreamingModel",
    "expert_hidden",
    "expert_tokens",
    "run_experts",
]

log = logging.getLogger(__name__)

# Bounds on temporaries; tokens are processed in chunks that stay within them.
TEMPORARY_BYTES = 256 << 20
LOGIT_BYTES = 64 << 20
NO_TARGET = -100
# Every family calls the norm before its MoE sublayer so.
MOE_NORM = "post_attention_layernorm"
# Saved by early transformers versions; recomputed from the config since.
IGNORED = ("rotary_emb.inv_freq",)


class StreamingModel:
    """A checkpoint as a model of which only the part in use is in memory."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device | str = "cpu"
    ) -> None:
        """Check config and tensor names; read no weight.

        Raises:
            CheckpointError: A tensor that the forward needs is missing or misshapen.
        """
        self.checkpoint = checkpoint
        self.device = torch.device(device)
        arch = checkpoint.arch
        self.config = _hf_config(checkpoint)
        self._layer_class = _find_class(arch.hf_layer)
        self._norm_class = _find_class(arch.hf_norm)
        self.rotary: torch.nn.Module = _find_class(arch.hf_rotary)(self.config)
        self.rotary.to(self.device)
        self.dtype = DTYPES[self._info(arch.embedding).dtype]
        self.act = _activation(self.config, checkpoint)
        self._attend_calls = 0
        for index in range(self.num_layers):
            self._check_names(index)
        self._info(arch.final_norm)
        self._info(self._head_name)

    @property
    def num_layers(self) -> int:
        """Decoder layers, with or without an MoE sublayer."""
        return len(self.checkpoint.layers)

    @property
    def forward_passes(self) -> int:
        """Sweeps of token batches through all layers, a begun one counted whole."""
        return math.ceil(self._attend_calls / self.num_layers)

    @torch.no_grad()
    def embed(self, tokens_ST: torch.Tensor) -> torch.Tensor:
        """Token ids to the hidden states that enter layer 0."""
        table_VD = self._read(self.checkpoint.arch.embedding)
        largest = int(tokens_ST.max()) if tokens_ST.numel() else 0
        if largest >= len(table_VD):
            raise CalibrationError(
                f"{self.checkpoint.folder}: the tokenizer gives token {largest}, but "
                f"the model knows {len(table_VD)}. The tokenizer is another model's."
            )
        return functional.embedding(tokens_ST.to(self.device), table_VD)

    @torch.no_grad()
    def attend(self, index: int, hidden_STD: torch.Tensor) -> torch.Tensor:
        """Add layer ``index``'s attention to the hidden states, in place.

        A layer whose MoE sublayer is absent is done after this.
        """
        layer = self._build_layer(index)
        sequences, length, _ = hidden_STD.shape
        position_embeddings, mask, masked_batch = None, None, 0
        position_ids = torch.arange(length, device=self.device).unsqueeze(0)
        for batch in _batches(sequences, self._sequence_bytes(length)):
            x_bTD = hidden_STD[batch]
            if len(x_bTD) != masked_batch:
                masked_batch = len(x_bTD)
                mask = _causal_mask(self.config, x_bTD, position_ids)
                position_embeddings = self.rotary(x_bTD, position_ids)
            hidden_STD[batch] = layer(
                x_bTD,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
            )
        self._attend_calls += 1
        return hidden_STD

    @torch.no_grad()
    def moe_input(self, index: int, hidden_STD: torch.Tensor) -> torch.Tensor:
        """What router and experts of a layer see: the normed hidden states [N, D]."""
        prefix = self.checkpoint.arch.layer_prefix.format(layer=index)
        norm = self._build_norm(f"{prefix}{MOE_NORM}.weight")
        return self._apply_norm(norm, hidden_STD.flatten(0, 1))

    @torch.no_grad()
    def route(self, layer: Layer, x_ND: torch.Tensor) -> Routing:
        """Which router rows each token chooses, in the arithmetic of transformers.

        Raises:
            CheckpointError: The logits are not finite.
        """
        router_RD = read_router(self.checkpoint, layer).to(x_ND)
        return route(
            x_ND,
            router_RD,
            top_k=layer.top_k,
            renormalise=self.checkpoint.arch.renormalise,
            where=f"{self.checkpoint.folder}: layer {layer.index}",
        )

    @torch.no_grad()
    def nll(
        self, hidden_STD: torch.Tensor, tokens_ST: torch.Tensor
    ) -> tuple[float, int]:
        """Summed next-token negative log-likelihood in nats, and how many tokens.

        Each sequence predicts its tokens 1 to T - 1.
        """
        norm = self._build_norm(self.checkpoint.arch.final_norm)
        head_VD = self._read(self._head_name)
        x_ND = hidden_STD.flatten(0, 1)
        # The last token of a sequence predicts nothing; skipping it saves a copy.
        target_N = functional.pad(tokens_ST[:, 1:], (0, 1), value=NO_TARGET)
        target_N = target_N.flatten().to(self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for chunk in _batches(len(x_ND), 4 * len(head_VD), LOGIT_BYTES):
            logits_nV = functional.linear(norm(x_ND[chunk]), head_VD).float()
            loss_n = functional.cross_entropy(
                logits_nV, target_N[chunk], ignore_index=NO_TARGET, reduction="none"
            )
            total += loss_n.sum(dtype=torch.float64)
        return float(total), tokens_ST[:, 1:].numel()

    @property
    def _head_name(self) -> str:
        arch = self.checkpoint.arch
        return arch.embedding if self.config.tie_word_embeddings else arch.head

    def _info(self, name: str) -> TensorInfo:
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.checkpoint.folder}: tensor {name!r} is missing, so the model "
                "cannot be run. Download the checkpoint again."
            )
        return info

    def _read(self, name: str) -> torch.Tensor:
        return read_tensor(self._info(name)).to(self.device, self.dtype)

    def _empty_layer(self, index: int) -> torch.nn.Module:
        """The stock layer on the meta device, its norm and MoE replaced by nothing."""
        with torch.device("meta"):
            layer: torch.nn.Module = self._layer_class(self.config, index)
        setattr(layer, MOE_NORM, torch.nn.Identity())
        setattr(layer, self.checkpoint.arch.skip_name, _Nothing())
        return layer.eval()

    def _build_layer(self, index: int) -> torch.nn.Module:
        prefix = self.checkpoint.arch.layer_prefix.format(layer=index)
        layer = self._empty_layer(index)
        weights = {name: self._read(prefix + name) for name in layer.state_dict()}
        layer.load_state_dict(weights, assign=True)
        return layer

    def _check_names(self, index: int) -> None:
        """Compare a layer's tensors outside the MoE sublayer with the stock class."""
        arch = self.checkpoint.arch
        prefix = arch.layer_prefix.format(layer=index)
        expected = self._empty_layer(index).state_dict()
        for name, tensor in expected.items():
            info = self._info(prefix + name)
            if info.shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{info.file}: {info.name} has shape {list(info.shape)}, "
                    f"config.json asks for {list(tensor.shape)}."
                )
        if self.checkpoint.layers[index].has_moe:
            self._info(f"{prefix}{MOE_NORM}.weight")
        for name in self.checkpoint.layer_names(index):
            inner = name.removeprefix(prefix)
            known = inner in expected or arch.is_moe_member(name, index)
            if not known and not inner.endswith(IGNORED):
                log.warning("%s: %s is not used by the forward", index, name)

    def _build_norm(self, name: str) -> torch.nn.Module:
        with torch.device("meta"):
            norm: torch.nn.Module = self._norm_class(
                self.config.hidden_size, eps=self.config.rms_norm_eps
            )
        norm.load_state_dict({"weight": self._read(name)}, assign=True)
        return norm

    def _apply_norm(self, norm: torch.nn.Module, x_ND: torch.Tensor) -> torch.Tensor:
        out_ND = torch.empty_like(x_ND)
        # The norm works on about three copies in fp32.
        for chunk in _batches(len(x_ND), 12 * x_ND.shape[1]):
            out_ND[chunk] = norm(x_ND[chunk])
        return out_ND

    def _sequence_bytes(self, length: int) -> int:
        """Temporaries of one sequence in the attention: about 4 D and 4 heads wide."""
        config = self.config
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        wide = 4 * config.hidden_size + 4 * heads * head_dim
        return length * wide * self.dtype.itemsize


class _Nothing(torch.nn.Module):
    """Stands where a stock layer has its MoE block: leaves the residual as it is."""

    def forward(self, x_bTD: torch.Tensor) -> torch.Tensor:
        return x_bTD.new_zeros(())


def _batches(
    count: int, item_bytes: int, limit: int = TEMPORARY_BYTES
) -> Iterator[slice]:
    """Slices over ``count`` items so that each slice's temporaries fit the limit."""
    step = max(1, limit // item_bytes)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _find_class(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _hf_config(checkpoint: Checkpoint) -> Any:
    """The family's transformers config, without what only concerns the MoE block."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    ours = ("per_layer_config", "moe_prune", "architectures", "auto_map")
    values = {key: value for key, value in checkpoint.config.items() if key not in ours}
    try:
        config = CONFIG_MAPPING[checkpoint.arch.model_type].from_dict(values)
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: transformers refuses it: {reason}"
        ) from error
    config._attn_implementation = "sdpa"
    return config


def _activation(config: Any, checkpoint: Checkpoint) -> Activation:
    from transformers.activations import ACT2FN

    if config.hidden_act not in ACT2FN:
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: hidden_act {config.hidden_act!r} is "
            "not an activation that transformers knows."
        )
    act: Activation = ACT2FN[config.hidden_act]
    return act


def _causal_mask(config: Any, x_bTD: torch.Tensor, position_ids: torch.Tensor) -> Any:
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
