"""Refitting the experts a layer keeps: their down projections, by ridge regression.

The pruned model is to have, behind the layer, the hidden states of the original. What
is not the experts' is taken off that target, so that the experts, fed by the layers
that were pruned before and routed as the pruned router does, are to give the rest. A
part of every calibration source is kept apart; the source that gains least chooses the
ridge, and a layer in which any source would get worse stays as it was. Errors count
relative to the hidden states: what comes next norms those.

Axes: S calibration windows, W those of them that refits use, T tokens of a window, N =
W*T tokens, n those of one expert, D hidden, F expert width.
"""

import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibrate.expert_forward import expert_hidden, expert_tokens, place, token_chunks
from ..calibrate.forward import StreamingModel
from ..errors import CalibrationError
from ..slim.ridge import CHUNK, Ridge, cross_of, gram_of
from .layer_cut import LayerCut
from .layer_record import RefitRecord, SourceErrors
from .slim_layer import naming, trimmed_routing
from .trimmed import survivor

log = logging.getLogger(__name__)

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
"""What is tried, relative to the mean diagonal of an expert's Gram matrix."""
KEPT_GAIN = 0.9
"""Of the best ridge's gain: the largest ridge that keeps as much changes least."""
LEAST_ERROR = 1e-12
"""Share of a window's target below which what is missing is noise."""
SMALLEST = 1e-6
"""Added to mean squares, as norms do."""
SWEEPS = 3
"""Over the experts of a layer."""
JUDGE_ONE_OF = 5
"""Windows of a source: the others are fitted on."""
MOST_TOKENS = 1 << 15
"""Beyond these, windows evenly spaced are used: more change little, and each is to be
held in float32."""


@dataclass(frozen=True)
class FitWindows:
    """The calibration windows that refits use, the same for all layers."""

    rows_W: Tensor
    """Which of the calibration's windows, ascending."""
    source_W: Tensor
    """The source of each, int64."""
    judged_W: Tensor
    """True where a window is kept apart to judge."""
    names: tuple[str, ...]
    """Of the sources."""


def fit_windows(source_S: Tensor, names: Sequence[str], length: int) -> FitWindows:
    """Divide the windows of every source into those to fit on and those to judge.

    Args:
        source_S: The source of each calibration window, int64.
        names: Of the sources.
        length: Tokens of a window.

    Raises:
        CalibrationError: No window would be left to fit on.
    """
    # However long windows are, each source needs one to fit on and one to judge.
    most = max(2 * len(names), MOST_TOKENS // length)
    rows: list[int] = []
    judged: set[int] = set()
    for source in range(len(names)):
        own = (source_S == source).nonzero().flatten().tolist()
        # In proportion, so that the mix stays what was asked for.
        count = len(own) if len(source_S) <= most else len(own) * most // len(source_S)
        used = _spread(own, max(1, count))
        rows += used
        judged |= set(_spread(used, max(1, len(used) // JUDGE_ONE_OF)))
    rows.sort()
    if len(judged) == len(rows):
        raise CalibrationError(
            f"experts.refit: of {len(source_S)} calibration windows each is one "
            "source's only one, and that is kept apart to judge. Calibrate on more "
            "windows (--samples), or set experts.refit: none."
        )
    if len(names) == 1:
        log.warning(
            "experts are refitted to one calibration source, %s: on other text the "
            "model may get worse. Calibrate on several, one for each use.",
            names[0],
        )
    return FitWindows(
        torch.tensor(rows),
        source_S[rows],
        torch.tensor([row in judged for row in rows]),
        tuple(names),
    )


def _spread(rows: list[int], count: int) -> list[int]:
    """``count`` of them, evenly spaced."""
    return [rows[(2 * at + 1) * len(rows) // (2 * count)] for at in range(count)]


@torch.no_grad()
def refit_layer(
    model: StreamingModel,
    cut: LayerCut,
    windows: FitWindows,
    x_ND: Tensor,
    target_ND: Tensor,
    share_N: Tensor,
) -> tuple[dict[int, Tensor], RefitRecord]:
    """The down projections [D, F] of a layer's survivors, by new number.

    Args:
        model: For its routing and activation.
        cut: The layer.
        windows: Which windows these are.
        x_ND: What enters the MoE of the pruned model.
        target_ND: What the routed experts are to give, float32; overwritten.
        share_N: What an error of each token is multiplied with, float32.

    Returns:
        Those that change, in the stored dtype (none if the layer stays as it is), and
        what was found.
    """
    fit = _Fit(model, cut, windows, x_ND, target_ND, share_N)
    ridge = fit.best_ridge()
    downs, sources = fit.refitted(ridge)
    # Not max: one that is NaN must not pass.
    if all(_ratio(one) < 1.0 for one in sources):
        return downs, RefitRecord(ridge=ridge, sources=sources)
    return {}, RefitRecord(ridge=None, sources=sources)


def shares(hidden_ND: Tensor) -> Tensor:
    """What errors of hidden states are multiplied with: 1 / RMS, 1 on average [N]."""
    # A few tokens have states a hundred times larger, which no norm lets through.
    share_N = (hidden_ND.square().mean(-1) + SMALLEST).rsqrt()
    return share_N / share_N.mean()


def _ratio(errors: SourceErrors) -> float:
    # An error of 0 cannot get smaller: a reason to leave the layer alone.
    return errors.after / errors.before if errors.before > 0 else 1.0


class _Seen(NamedTuple):
    """One expert's share of the tokens, those to fit on first."""

    token_n: Tensor
    feature_nF: Tensor
    """Router weight x inner activation, in the dtype of the hidden states."""
    fitted: int
    """How many are fitted on."""
    down_DF: Tensor
    """The projection it starts with, in its stored dtype."""


@dataclass
class _Try:
    """A ridge, and what the layer lacks with it so far."""

    ridge: float
    missing_ND: Tensor
    downs: dict[int, Tensor] | None
    """What became of the projections; None: not kept, good for one sweep."""


class _Fit:
    """One layer's regression."""

    def __init__(
        self,
        model: StreamingModel,
        cut: LayerCut,
        windows: FitWindows,
        x_ND: Tensor,
        target_ND: Tensor,
        share_N: Tensor,
    ) -> None:
        self._cut, self._act, self._x_ND = cut, model.act, x_ND
        self._routing = trimmed_routing(model, cut, x_ND)
        length = len(x_ND) // len(windows.rows_W)
        repeated = windows.judged_W.repeat_interleave(length)
        self._judged_N = repeated.to(x_ND.device)
        self._windows_of = [
            [
                slice(at * length, (at + 1) * length)
                for at in own_W.nonzero().flatten().tolist()
            ]
            for own_W in (
                windows.judged_W & (windows.source_W == source)
                for source in range(len(windows.names))
            )
        ]
        self._share_N = share_N
        target_ND *= share_N[:, None]
        self._sizes = self._squares(target_ND)
        for seen in self._experts():
            _take_off(target_ND, seen, seen.down_DF)
        self._missing_ND = target_ND
        self._names, self._before = windows.names, self._errors(target_ND)

    def best_ridge(self) -> float:
        """The largest that keeps most of the best one's gain, after one sweep.

        A gain is the share of its error that the source which gains least loses.
        """
        tries = [_Try(ridge, self._missing_ND.clone(), None) for ridge in RIDGES]
        self._sweep(tries)
        gains = [1.0 - max(map(_ratio, self._judged(one))) for one in tries]
        enough = KEPT_GAIN * max(gains)
        if not enough > 0:
            return RIDGES[-1]
        return max(
            ridge for ridge, gain in zip(RIDGES, gains, strict=True) if gain >= enough
        )

    def refitted(self, ridge: float) -> tuple[dict[int, Tensor], list[SourceErrors]]:
        """The projections after all sweeps, and the errors with them."""
        downs: dict[int, Tensor] = {}
        one = _Try(ridge, self._missing_ND, downs)
        for _ in range(SWEEPS):
            self._sweep([one])
        return downs, self._judged(one)

    def _sweep(self, tries: Sequence[_Try]) -> None:
        """Each expert once, on what the others leave missing; gram and features once
        for all ridges."""
        for new, seen in enumerate(self._experts()):
            if seen.fitted == 0:
                continue
            token_n = seen.token_n[: seen.fitted]
            fitted_nF = seen.feature_nF[: seen.fitted]
            with naming(self._cut, new):
                gram_FF = gram_of(fitted_nF)
                if not bool(gram_FF.diagonal().any()):
                    continue  # none of its inner activations ever fired
                for one in tries:
                    start_DF = seen.down_DF
                    present_DF = (one.downs or {}).get(new, start_DF)
                    away_DF = present_DF.float() - start_DF.float()
                    cross_FD = cross_of(fitted_nF, one.missing_ND, token_n)
                    change_DF = Ridge(gram_FF, one.ridge).change(cross_FD, away_DF)
                    # What the others then make up for is what will be stored.
                    changed_DF = (present_DF.float() + change_DF).to(start_DF.dtype)
                    # Zeros of an earlier cut stay: they may be stored as such.
                    changed_DF.masked_fill_(start_DF == 0, 0.0)
                    _take_off(one.missing_ND, seen, changed_DF, present_DF)
                    if one.downs is not None:
                        one.downs[new] = changed_DF

    def _experts(self) -> Iterator[_Seen]:
        """Every survivor with its tokens, one at a time."""
        for new in range(self._cut.trimmed.num_experts):
            redirect = self._cut.trimmed.redirect
            token_n, weight_n = expert_tokens(self._routing, new, redirect)
            weight_n = weight_n * self._share_N[token_n].to(weight_n.dtype)
            # Stable: the same order, hence the same sums, every time.
            order = torch.argsort(self._judged_N[token_n].int(), stable=True)
            token_n, weight_n = token_n[order], weight_n[order]
            expert = place(survivor(self._cut, new), self._x_ND)
            feature_nF = self._x_ND.new_empty(len(token_n), len(expert.gate_FD))
            at = 0
            for some_c, weight_c in token_chunks(token_n, weight_n, expert):
                x_cD = self._x_ND.index_select(0, some_c)
                inner_cF = expert_hidden(x_cD, expert, self._act)
                rows = feature_nF[at : at + len(some_c)]
                torch.mul(inner_cF, weight_c[:, None], out=rows)
                at += len(some_c)
            judged = int(self._judged_N[token_n].sum())
            yield _Seen(token_n, feature_nF, len(token_n) - judged, expert.down_DF)

    def _judged(self, one: _Try) -> list[SourceErrors]:
        errors = zip(
            self._names, self._before, self._errors(one.missing_ND), strict=True
        )
        return [
            SourceErrors(source=name, before=before, after=after)
            for name, before, after in errors
        ]

    def _errors(self, missing_ND: Tensor) -> list[float]:
        """Of each source; see ``SourceErrors``."""
        pairs = zip(self._squares(missing_ND), self._sizes, strict=True)
        # Geometric: no window counts more because more of it is missing.
        return [
            statistics.geometric_mean(map(_share, found, sizes))
            for found, sizes in pairs
        ]

    def _squares(self, missing_ND: Tensor) -> list[list[float]]:
        """Of the windows of each source that are kept apart."""
        return [
            [
                float(missing_ND[rows].square().sum(dtype=torch.float64))
                for rows in windows
            ]
            for windows in self._windows_of
        ]


def _share(missing: float, size: float) -> float:
    """What is missing as a part of the target, at least ``LEAST_ERROR``."""
    # In this order max keeps a NaN.
    return max(missing / size if size > 0 else 0.0, LEAST_ERROR)


def _take_off(
    missing_ND: Tensor, seen: _Seen, down_DF: Tensor, instead_of: Tensor | None = None
) -> None:
    """Take what an expert gives off what is missing, in place."""
    change_DF = down_DF.float()
    if instead_of is not None:
        change_DF = change_DF - instead_of.float()
    pairs = zip(
        torch.split(seen.token_n, CHUNK),
        torch.split(seen.feature_nF, CHUNK),
        strict=True,
    )
    for token_c, feature_cF in pairs:
        some_cD = missing_ND.index_select(0, token_c)
        some_cD.addmm_(feature_cF.float(), change_DF.T, alpha=-1.0)
        missing_ND.index_copy_(0, token_c, some_cD)
