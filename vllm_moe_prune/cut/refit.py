"""The refits of one pass: the original's hidden states run beside the pruned model's.

Up to the first layer that changes there is one stream, behind the last layer that is
refitted there is one again. In between, the original's goes through each layer first,
and through the dropped blocks right behind it: there the pruned model has to arrive.

Axes: S windows, W those of them that refits use, T tokens of a window, N = S*T tokens,
n those of the W windows, D hidden.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..calibrate.data import Tokens
from ..calibrate.forward import StreamingModel
from ..calibrate.perplexity import run_layer
from .layer_cut import LayerCut
from .layer_record import LayerRecord
from .refit_layer import fit_windows, refit_layer, shares


def _first_apart(cuts: Sequence[LayerCut]) -> int:
    """The first layer that has something to make up for; behind all if none has."""
    first = next((cut.index for cut in cuts if cut.changes), len(cuts))
    # Before a dropped block there may be a layer that takes over from it.
    takes_over = 0 < first < len(cuts) and cuts[first].drops_block
    return first - 1 if takes_over and cuts[first - 1].layer_plan.refit else first


class Refits:
    """Refits layer by layer, on the way of a pass through the model."""

    def __init__(
        self, model: StreamingModel, cuts: Sequence[LayerCut], tokens: Tokens
    ) -> None:
        """Nothing runs yet.

        Args:
            model: The input.
            cuts: Its layers under a plan that refits.
            tokens: The calibration.
        """
        ids_ST = tokens.ids_ST
        names = tokens.names or (tokens.source,)
        self._windows = fit_windows(tokens.source_S, names, ids_ST.shape[1])
        self._rows_W = self._windows.rows_W
        self._ids_WT = ids_ST[self._rows_W]
        self.ids_ST = ids_ST
        """The tokens that the pruned model has to be run on."""
        # Zeros and integers look at all windows; without them the others are not run.
        if not cuts[0].plan.changes_by_data:
            self.ids_ST = self._ids_WT
            self._rows_W = torch.arange(len(self._ids_WT))
        self.shape_WT = tuple(self._ids_WT.shape)
        self.original_WTD: Tensor | None = None
        """The original's states; None where they are the pruned model's, or no longer
        needed."""
        self._model, self._cuts = model, cuts
        self._first = _first_apart(cuts)
        self._last = max(cut.index for cut in cuts if cut.layer_plan.refit)

    def is_apart(self, index: int) -> bool:
        """Whether the original's states are other ones before a layer runs."""
        # A dropped block leaves the pruned stream alone: the next layer sets out.
        passed = self._cuts[self._first : index]
        return index <= self._last and not all(cut.drops_block for cut in passed)

    def pass_layer(self, index: int, hidden_STD: Tensor) -> None:
        """Take the original through a layer and all dropped blocks right behind it.

        Args:
            index: The layer, which is not dropped.
            hidden_STD: What enters it in the pruned model.
        """
        if not self._first <= index <= self._last:
            self.original_WTD = None
            return
        if self.original_WTD is None:
            self.original_WTD = self._used(hidden_STD)
            self._run(*range(self._first, index))
        behind = index + 1
        while behind < len(self._cuts) and self._cuts[behind].drops_block:
            behind += 1
        self._run(*range(index, behind))

    def refit(
        self,
        cut: LayerCut,
        record: LayerRecord,
        hidden_STD: Tensor,
        x_ND: Tensor,
        others_ND: Tensor,
    ) -> LayerCut:
        """The layer with its projections refitted, after ``pass_layer``.

        Args:
            cut: The layer.
            record: Where what was found is noted.
            hidden_STD: The pruned stream with all added to it that is not experts'.
            x_ND: What router and experts see.
            others_ND: What shared experts make of that, 0 where there are none.
        """
        if self.original_WTD is None:
            # Nothing has changed so far: there is nothing to make up for.
            return cut
        target_WTD = self.original_WTD.float()
        share_N = shares(target_WTD.flatten(0, 1))
        target_WTD -= self._used(hidden_STD).float()
        target_WTD -= self._used(others_ND.view_as(hidden_STD)).float()
        x_nD = self._used(x_ND.view_as(hidden_STD)).flatten(0, 1)
        target_nD = target_WTD.flatten(0, 1)
        refitted, record.refit = refit_layer(
            self._model, cut, self._windows, x_nD, target_nD, share_N
        )
        return dataclasses.replace(cut, refitted=refitted)

    def _used(self, hidden_STD: Tensor) -> Tensor:
        """A copy of the windows that are used."""
        return hidden_STD.index_select(0, self._rows_W.to(hidden_STD.device))

    def _run(self, *layers: int) -> None:
        for index in layers:
            cut, original_WTD = self._cuts[index], self.original_WTD
            assert original_WTD is not None
            # Layers that predict further tokens are no part of the stream they read.
            if cut.layer.mtp and cut.drops_block:
                continue
            if cut.layer.mtp:
                original_WTD = self._model.further(index, original_WTD, self._ids_WT)
            self.original_WTD = original_WTD.to(self._model.device)
            run_layer(self._model, index, self.original_WTD)
