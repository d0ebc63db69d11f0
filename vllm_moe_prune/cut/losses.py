"""What all ways to the losses of plans share: texts, the journal, sweeps over layers.

Axes: S sequences, T tokens of a sequence, D hidden.
"""

import hashlib
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field

from ..calibrate.data import sha256_of
from ..calibrate.forward import StreamingModel
from ..calibrate.memory import release_freed
from ..checkpoint.open import Checkpoint
from ..decide.cut_plan import CutPlan
from ..errors import CalibrationError, OutputError, RecipeError
from ..files.atomic import writing
from ..files.json_file import parse_json
from ..files.regular import MIB, Kind, read_file
from ..progress import Progress, Report
from ..ranks.group import ALONE, Ranks
from .layer_cut import LayerCut
from .slim_expert import kind_of

STATE_BYTES = 1 << 30
"""Of hidden states held at once; more plans than fit take further sweeps."""
LOSSES = Kind(name="journal of losses", max_bytes=256 * MIB, error=OutputError)


@dataclass(frozen=True)
class Text:
    """Tokens that models are judged on."""

    ids_ST: torch.Tensor
    targets_ST: torch.Tensor | None = None
    """What is to be predicted, ``NO_TARGET`` elsewhere; everything if None. With
    targets of its own a text is also judged by its exact matches."""


@dataclass(frozen=True)
class Loss:
    """Summed next-token negative log-likelihood in nats, and how many tokens."""

    nll: float
    tokens: int
    exact: int = 0
    """Sequences of a text with targets that greedy decoding gets right."""

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.nll / self.tokens


class _Line(BaseModel):
    """A line of the journal; a loss that is not finite is null there."""

    key: str
    losses: tuple[
        tuple[
            Annotated[float, Field(ge=0.0)] | None,
            Annotated[int, Field(ge=1)],
            Annotated[int, Field(ge=0)],
        ],
        ...,
    ]


class LossJournal:
    """Losses found so far, one line each, so that a killed search can continue."""

    def __init__(self, path: Path | None = None, ranks: Ranks = ALONE) -> None:
        """Read what is there; a line cut short by a kill is left out.

        Args:
            path: The file; None: nothing is kept.
            ranks: Who shares in finding losses. Rank 0 keeps the file.
        """
        self.ranks = ranks
        self._path = path if ranks.rank == 0 else None
        self.losses: dict[str, tuple[Loss, ...]] = {}
        """By ``key_of`` a plan, or what is made of that."""
        lines = ranks.first(lambda: self._lines())
        for line in lines:
            with suppress(ValueError):  # of pydantic too
                entry = _Line.model_validate(parse_json(line))
                self.losses[entry.key] = tuple(
                    Loss(math.inf if nll is None else nll, tokens, exact)
                    for nll, tokens, exact in entry.losses
                )

    def _lines(self) -> list[str]:
        if self._path is None or not self._path.is_file():
            return []
        data = read_file(self._path, LOSSES)
        # What a disk spoilt is no UTF-8, nor JSON.
        return data.decode(errors="replace").split("\n")

    def missing(
        self, keys: Sequence[str], plans: Sequence[CutPlan]
    ) -> dict[str, CutPlan]:
        """Plans whose losses are not known, one of those that share a key."""
        pairs = zip(keys, plans, strict=True)
        return {key: plan for key, plan in pairs if key not in self.losses}

    def add(self, key: str, losses: tuple[Loss, ...]) -> None:
        """Keep what a plan loses on each text.

        Raises:
            OutputError: It cannot be written.
        """
        self.losses[key] = losses
        if self._path is None:
            return
        rows = [
            (one.nll if math.isfinite(one.nll) else None, one.tokens, one.exact)
            for one in losses
        ]
        line = json.dumps({"key": key, "losses": rows})
        with writing(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                # A line of its own, even behind one that was cut short.
                file.write(("\n" if file.tell() else "") + line)


def loss_of(model: StreamingModel, text: Text, state_STD: torch.Tensor) -> Loss:
    """The loss on a text whose hidden states have passed all layers."""
    targets_ST = text.ids_ST if text.targets_ST is None else text.targets_ST
    nll, tokens = model.nll(state_STD, targets_ST)
    exact = 0
    if text.targets_ST is not None:
        exact = model.exact_matches(state_STD, targets_ST)
    return Loss(nll if math.isfinite(nll) else math.inf, tokens, exact)


def check_plans(plans: Sequence[CutPlan], calibration_ST: torch.Tensor | None) -> None:
    """Refuse plans whose losses cannot be found without writing them.

    Raises:
        CalibrationError: A plan needs calibration and there is none.
        RecipeError: A plan slims more than experts, or quantizes.
    """
    if any(plan.is_slimmed and plan.slim_parts != ("experts",) for plan in plans):
        raise RecipeError(
            "plans are judged with zeros in experts alone; set slim.scope: [experts]."
        )
    if any(plan.is_quantized for plan in plans):
        raise RecipeError("plans are judged unquantized; leave out quantize.")
    if any(plan.needs_activations for plan in plans) and calibration_ST is None:
        raise CalibrationError("a plan slims by data: calibration tokens are needed.")


def key_of(
    plan: CutPlan, texts: Sequence[Text], calibration_ST: torch.Tensor | None
) -> str:
    """Identifies a loss: the plan's effect on which model, judged by which tokens."""
    # Nothing of recipe or prediction: plans of the same effect share a loss.
    slim = (*kind_of(plan), plan.slim_parts)
    layers = [layer.model_dump_json() for layer in plan.layers]
    tokens = [sha256_of(text.ids_ST) for text in texts]
    tokens += [
        sha256_of(text.targets_ST) for text in texts if text.targets_ST is not None
    ]
    # Other plans have the same loss whatever the calibration.
    if plan.needs_activations and calibration_ST is not None:
        tokens.append(sha256_of(calibration_ST))
    said = (plan.model.fingerprint, plan.routing, slim, plan.slim_exclude, layers)
    narrows = plan.narrow.model_dump_json() if plan.is_narrowed else None
    return hashlib.sha256(repr((said, narrows, tokens)).encode()).hexdigest()


def split_at(
    members: Sequence[int], cuts: Sequence[Sequence[LayerCut]], layer: int
) -> tuple[list[int], list[list[int]]]:
    """Divide plans by what they do to a layer.

    Args:
        members: Numbers of the plans.
        cuts: Of each plan all layers.
        layer: Of the input.

    Returns:
        Those that drop its block, and groups of those that do the same to it.
    """
    dropping: list[int] = []
    groups: dict[Hashable, list[int]] = {}
    for member in members:
        cut = cuts[member][layer]
        if cut.drops_block:
            dropping.append(member)
        else:
            groups.setdefault(_effect(cut), []).append(member)
    return dropping, list(groups.values())


def _effect(cut: LayerCut) -> Hashable:
    """Everything a plan says about one layer."""
    plan = cut.plan
    how = (*kind_of(plan), plan.slim_exclude)
    slims = how if cut.writes_zeros else None
    narrows = plan.narrow if cut.layer_plan.narrows else None
    return plan.routing, cut.layer_plan, slims, narrows


def plans_together(model: StreamingModel, tokens: int, room: int = 0) -> int:
    """How many plans a sweep can take.

    Args:
        model: The input of all plans.
        tokens: Of all texts that run through it.
        room: Bytes that states may take if they are more than ``STATE_BYTES``.
    """
    width = int(model.checkpoint.config[model.checkpoint.arch.config.hidden])
    # At worst each plan has hidden states of its own, what its experts read and what
    # they give.
    size = 3 * tokens * width * model.dtype.itemsize
    return max(1, max(STATE_BYTES, room) // size)


Sweep = Callable[[Sequence[CutPlan], Callable[[int], None]], list[tuple[Loss, ...]]]
"""Runs plans through all layers, telling after each how many are done."""


def add_losses(
    journal: LossJournal,
    plans: Mapping[str, CutPlan],
    together: int,
    sweep: Sweep,
    checkpoint: Checkpoint,
    report: Report,
    stage: str,
) -> None:
    """Find the losses of plans and add them to the journal, sweep by sweep.

    Args:
        journal: Where they go; its ranks share the work.
        plans: By the keys that they have there.
        together: Plans of one sweep.
        sweep: Finds their losses.
        checkpoint: The input of all plans.
        report: Called after every layer of every sweep.
        stage: How progress calls it.
    """
    ranks = journal.ranks
    # Each rank judges some of the plans, whose losses depend on no others.
    step = together * ranks.size
    sweeps = math.ceil(len(plans) / step)
    for number in range(sweeps):
        keys = list(plans)[number * step : (number + 1) * step]
        tell = partial(_tell, checkpoint, report, stage, number, sweeps)
        own = [plans[key] for key in keys[ranks.rank :: ranks.size]]
        found = sweep(own, tell) if own else []
        told = ranks.everyones([[astuple(loss) for loss in each] for each in found])
        for at, key in enumerate(keys):
            losses = told[ranks.owner(at)][at // ranks.size]
            journal.add(key, tuple(Loss(*loss) for loss in losses))


def _tell(
    checkpoint: Checkpoint,
    report: Report,
    stage: str,
    sweep: int,
    sweeps: int,
    layers_done: int,
) -> None:
    release_freed()
    count, total = len(checkpoint.decoder_layers), checkpoint.tensor_bytes
    done = sweep * count + layers_done
    report(
        Progress(
            stage=stage,
            layer=done,
            layers=count * sweeps,
            bytes_done=total * done // count,
            bytes_total=total * sweeps,
        )
    )
