"""Held-out perplexity by the streaming forward, for models larger than memory.

Axes: S windows, T tokens of a window, D hidden.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..checkpoint.open import Checkpoint
from ..checkpoint.reader import read_expert
from ..errors import CalibrationError, CheckpointError
from ..progress import Progress, Report, ignore
from ..ranks.group import ALONE, Ranks
from .constants import add_constants
from .data import Ids, TokenReader, sha256_of
from .forward import NO_TARGET, StreamingModel
from .memory import release_freed
from .shared_experts import agree_on, check_states, run_shared
from .text import name_of

# Of the hidden states of one batch; every batch reads all weights once.
BATCH_BYTES = 1 << 30
# math.exp overflows a double above 709.78.
MAX_EXPONENT = 700.0


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text."""

    tokens: int
    """Predicted tokens; the first of each window is given, not predicted."""
    nll_sum: float
    """Natural logarithm."""
    source: str

    @property
    def perplexity(self) -> float:
        """e to the mean negative log-likelihood; infinite beyond what a float holds."""
        return perplexity_of(self.nll_sum / self.tokens)


def perplexity_of(mean_nll: float) -> float:
    """e to a mean loss in nats; infinite beyond what a float holds."""
    return math.exp(mean_nll) if mean_nll < MAX_EXPONENT else math.inf


def perplexity(
    checkpoint: Checkpoint,
    source: str,
    *,
    name: str = "",
    sequence_length: int = 2048,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
    report: Report = ignore,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """Perplexity of a text in windows that do not overlap, the last perhaps shorter.

    Args:
        checkpoint: Any checkpoint that can be opened, cut or not.
        source: As in ``calibrate.text``.
        name: What the result is called; default: as the source is.
        sequence_length: Of a window, BOS included; at most what the model allows.
        max_tokens: Only the first this many tokens of the text.
        device: Where to run.
        report: Called after every layer of every batch.
        ranks: Share out the experts; every rank returns the same.

    Raises:
        CalibrationError: The text cannot be used, or is shorter than two tokens.
        CheckpointError: The loss is not finite.
    """
    if sequence_length < 2:
        raise CalibrationError(
            f"sequence length {sequence_length}: a token is predicted from the one "
            "before it, so it must be at least 2."
        )
    model = StreamingModel(checkpoint, device, ranks=ranks)
    text = TokenReader(checkpoint, source)
    ids = text.read(max_tokens)
    windows_ST = _windows(text, ids, text.cap(sequence_length))
    if int((windows_ST[:, 1:] != NO_TARGET).sum()) == 0:
        raise CalibrationError(
            f"{source}: gives {len(ids)} tokens; nothing is left to predict. "
            "Use a longer text."
        )
    agree_on(ranks, checkpoint, text=sha256_of(windows_ST))
    total, count = summed_loss(model, windows_ST, source, report)
    return Perplexity(count, total, name or name_of(source))


def summed_loss(
    model: StreamingModel,
    windows_ST: torch.Tensor,
    source: str,
    report: Report = ignore,
) -> tuple[float, int]:
    """Negative log-likelihood of windows in nats, and how many tokens were predicted.

    Args:
        model: The model.
        windows_ST: Token ids; those that are ``NO_TARGET`` are not predicted.
        source: How an error names the text.
        report: Called after every layer of every batch.

    Raises:
        CheckpointError: The loss is not finite.
    """
    checkpoint = model.checkpoint
    batches = list(_batches(checkpoint, windows_ST, model.dtype))
    total, count = 0.0, 0
    for number, tokens_ST in enumerate(batches):
        # NO_TARGET is no row of the table; any id does, as nothing after it is scored.
        hidden_STD = model.embed(tokens_ST.clamp(min=0))
        for index in range(model.num_layers):
            run_layer(model, index, hidden_STD)
            release_freed()
            report(_progress(checkpoint, index, number, len(batches)))
        nll, predicted = model.nll(hidden_STD, tokens_ST)
        total += nll
        count += predicted
    if not math.isfinite(total):
        raise CheckpointError(
            f"{checkpoint.folder}: its loss on {source} is {total}. The weights are "
            f"damaged, or {model.dtype} overflows on this text."
        )
    return total, count


@torch.no_grad()
def run_layer(model: StreamingModel, index: int, hidden_STD: torch.Tensor) -> None:
    """One whole decoder layer, in place."""
    _, x_ND = model.enter(index, hidden_STD)
    if x_ND is not None:
        check_states(model.ranks, x_ND, index)
        leave(model, index, hidden_STD, x_ND, routed(model, index, x_ND))


@torch.no_grad()
def routed(model: StreamingModel, index: int, x_ND: torch.Tensor) -> torch.Tensor:
    """What a layer's routed experts make of ``x_ND`` [N, D], shared ones left out."""
    checkpoint = model.checkpoint
    layer = checkpoint.layers[index]
    routing = model.route(layer, x_ND)
    out_ND = run_shared(
        model.ranks,
        x_ND,
        routing,
        layer,
        lambda expert: read_expert(checkpoint, layer, expert),
        model.act,
    )
    add_constants(checkpoint, layer, routing, out_ND)
    return out_ND


def leave(
    model: StreamingModel,
    index: int,
    hidden_STD: torch.Tensor,
    x_ND: torch.Tensor,
    out_ND: torch.Tensor,
) -> None:
    """Add what shared experts make of ``x_ND`` to ``out_ND``, and both to the layer."""
    model.add_shared(index, x_ND, out_ND)
    hidden_STD += out_ND.view_as(hidden_STD)


def _windows(text: TokenReader, ids: Ids, length: int) -> torch.Tensor:
    """All tokens as windows [S, T]; the last is filled up with ``NO_TARGET``.

    What follows a token does not change its prediction, so the filling does no harm.
    """
    # A text shorter than a window is one window of its own length.
    payload = min(text.payload(length), len(ids))
    missing = -len(ids) % payload
    rows = np.append(ids, np.full(missing, NO_TARGET)).reshape(-1, payload)
    return text.with_bos(rows)


def _batches(
    checkpoint: Checkpoint, windows_ST: torch.Tensor, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    hidden = checkpoint.config[checkpoint.arch.config.hidden]
    window_bytes = windows_ST.shape[1] * hidden * dtype.itemsize
    # At least one window, however long: attention needs it whole.
    yield from torch.split(windows_ST, max(1, BATCH_BYTES // window_bytes))


def _progress(checkpoint: Checkpoint, index: int, batch: int, batches: int) -> Progress:
    layers = len(checkpoint.decoder_layers)
    done = batch * layers + index + 1
    return Progress(
        stage="evaluate",
        layer=done,
        layers=layers * batches,
        bytes_done=checkpoint.tensor_bytes * done // layers,
        bytes_total=checkpoint.tensor_bytes * batches,
    )
