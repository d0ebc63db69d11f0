"""What the streaming forward finds, for tests of whatever changes it."""

from pathlib import Path

import torch

from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import run_layer
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.losses import Loss


def streamed_loss(folder: Path, ids_ST: torch.Tensor) -> Loss:
    """Of the model in a folder, over all predicted tokens."""
    model = StreamingModel(open_checkpoint(folder))
    found = Loss(*model.nll(hidden_states(model, ids_ST), ids_ST))
    assert found.tokens == ids_ST[:, 1:].numel()
    return found


def hidden_states(model: StreamingModel, ids_ST: torch.Tensor) -> torch.Tensor:
    """Behind the last layer [S, T, D]."""
    hidden_STD = model.embed(ids_ST)
    for index in range(model.num_layers):
        run_layer(model, index, hidden_STD)
    return hidden_STD
