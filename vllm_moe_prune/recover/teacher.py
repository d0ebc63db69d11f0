"""The original as a teacher: its distribution of the next token, at every token.

The original is streamed once, a layer in memory at a time; what stays is the hidden
state behind its last layer for every token, and its final norm and head, from which
all of the distribution is made again whenever it is needed. Nothing is cut off.

Axes: S windows, T tokens of a window, N tokens, D hidden, V vocabulary.
"""

import torch
from torch.nn import functional

from ..calibrate.data import Tokens
from ..calibrate.forward import StreamingModel
from ..calibrate.memory import release_freed
from ..calibrate.perplexity import run_layer
from ..checkpoint.open import Checkpoint
from ..progress import Progress, Report

CHUNK_BYTES = 256 << 20
"""Of the logits of some tokens, in fp32; two models' are in memory at once."""


class Teacher:
    """Makes logits of final hidden states."""

    def __init__(self, model: StreamingModel) -> None:
        """Keep a model's final norm and head."""
        self._norm = model.build_norm(model.checkpoint.arch.final_norm)
        self._head_VD = model.read(model.head_name)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return len(self._head_VD)

    @torch.no_grad()
    def logits(self, hidden_xD: torch.Tensor) -> torch.Tensor:
        """Of hidden states [..., D], in fp32 [..., V]."""
        return functional.linear(self._norm(hidden_xD), self._head_VD).float()


@torch.no_grad()
def final_states(
    model: StreamingModel, ids_ST: torch.Tensor, report: Report, stage: str
) -> torch.Tensor:
    """Hidden states [S, T, D] behind the last layer, on the CPU; one streaming pass."""
    hidden_STD, size = model.embed(ids_ST), model.checkpoint.tensor_bytes
    for index in range(model.num_layers):
        run_layer(model, index, hidden_STD)
        release_freed()
        done = index + 1
        report(
            Progress(
                stage=stage,
                layer=done,
                layers=model.num_layers,
                bytes_done=size * done // model.num_layers,
                bytes_total=size,
            )
        )
    return hidden_STD.cpu()


def divergence(logits_xV: torch.Tensor, aim_xV: torch.Tensor) -> torch.Tensor:
    """KL(aim || logits) of every token [...], in nats, in fp32."""
    aims_xV = aim_xV.float().log_softmax(dim=-1)
    found_xV = logits_xV.float().log_softmax(dim=-1)
    return (aims_xV.exp() * (aims_xV - found_xV)).sum(dim=-1)


@torch.no_grad()
def mean_divergence(
    taught: StreamingModel,
    hidden_STD: torch.Tensor,
    teacher: Teacher,
    aim_STD: torch.Tensor,
) -> float:
    """The mean over all tokens of two models' final hidden states."""
    student = Teacher(taught)
    hidden_ND, aim_ND = hidden_STD.flatten(0, 1), aim_STD.flatten(0, 1)
    step = max(1, CHUNK_BYTES // (4 * teacher.vocabulary))
    total = 0.0
    for start in range(0, len(hidden_ND), step):
        some = slice(start, start + step)
        found_nV, aim_nV = (
            one.logits(states_ND[some].to(taught.device))
            for one, states_ND in ((student, hidden_ND), (teacher, aim_ND))
        )
        total += float(divergence(found_nV, aim_nV).sum(dtype=torch.float64))
    return total / len(hidden_ND)


class Lesson:
    """The teacher's distributions for all windows.

    ``states_STD`` are its final hidden states for those that are trained on.
    """

    def __init__(
        self,
        original: Checkpoint,
        tokens: Tokens,
        heldout: Tokens,
        device: str,
        report: Report,
    ) -> None:
        model = StreamingModel(original, device)
        # One pass for both: held-out windows come last.
        ids_ST = torch.cat([tokens.ids_ST, heldout.ids_ST])
        states_STD = final_states(model, ids_ST, report, "teacher")
        self.teacher = Teacher(model)
        self.states_STD = states_STD[: len(tokens.ids_ST)]
        self._heldout, self._report = heldout, report
        self._aim_STD = states_STD[len(tokens.ids_ST) :]

    def missed(self, model: StreamingModel) -> float:
        """Mean KL from the teacher on the windows kept apart."""
        ids_ST = self._heldout.ids_ST
        states_STD = final_states(model, ids_ST, self._report, "divergence")
        return mean_divergence(model, states_STD, self.teacher, self._aim_STD)
