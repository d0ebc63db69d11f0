"""Routing where a router row is not simply an expert of this process.

Three cases share one path from router row to (expert, share): redirect mode, where rows
of removed experts are served by others; groups of unequal size, which vLLM's grouped
routers cannot express; and kernels that ignore vLLM's expert map.
T tokens, K top-k, R router rows, G groups, M rows of the largest group.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ..load.served_layer import ServedLayer

NEVER = float("-inf")


class RowTable(nn.Module):
    """Which expert serves each router row, and which rows form a group; on the device.

    Attributes:
        expert_R: Expert ids [R], int32.
        share_R: 1.0, or 0.0 where this process has nothing for the row [R], float32. A
            slot that counts nothing goes to expert 0 with weight 0, which every kernel
            understands.
        group_R: Group of each row [R], int64; absent without uneven groups.
        row_GM: Rows of each group [G, M], int64, filled up with R.
        load: Where tokens per expert are counted [E + 1], int64; absent unless asked.
        counted_R: The entry of ``load`` that a row adds to, int32.
    """

    expert_R: torch.Tensor
    share_R: torch.Tensor
    group_R: torch.Tensor
    row_GM: torch.Tensor
    load: torch.Tensor
    counted_R: torch.Tensor

    def __init__(self, layer: ServedLayer) -> None:
        """For global expert ids; ``localize`` changes that."""
        super().__init__()
        self._device = torch.get_default_device()  # where vLLM builds the model
        self.targets = layer.redirect or tuple(range(layer.experts))
        self.grouped = layer.row_groups is not None
        self.counting = False
        # Buffers, not parameters: they move with the model and are never loaded or
        # saved.
        self._set(
            "expert_R",
            torch.zeros(len(self.targets), dtype=torch.int32, device=self._device),
        )
        self._set("share_R", torch.zeros(len(self.targets), device=self._device))
        self.localize(None)
        if layer.row_groups is not None:
            rows = [
                [row for row, at in enumerate(layer.row_groups) if at == group]
                for group in range(layer.groups)
            ]
            width = max(len(each) for each in rows)
            # R points at the column that is padded with minus infinity.
            fill = [len(layer.row_groups)] * width
            self._set("group_R", torch.tensor(layer.row_groups, device=self._device))
            self._set(
                "row_GM",
                torch.tensor(
                    [(each + fill)[:width] for each in rows], device=self._device
                ),
            )

    def _set(self, name: str, value: torch.Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def localize(self, local_ids: Sequence[int] | None) -> None:
        """Take local expert ids: global id -> index here, -1 for another process."""
        experts = [
            -1 if target is None else target if local_ids is None else local_ids[target]
            for target in self.targets
        ]
        expert_R = torch.tensor(experts, dtype=torch.int32, device=self._device)
        # A kernel may index with any id that it gets, weight 0 or not.
        self._set("expert_R", expert_R.clamp(min=0))
        self._set("share_R", (expert_R >= 0).to(torch.float32))

    def count_into(self, load: torch.Tensor) -> None:
        """Count every routed slot in ``load``, but not those that weigh nothing.

        Args:
            load: A counter per expert of the model, and one that nobody reads.
        """
        from ..watch.load_op import count_routed  # needs vLLM

        nowhere = len(load) - 1
        counted = [nowhere if target is None else target for target in self.targets]
        self._set("load", load)
        self._set(
            "counted_R", torch.tensor(counted, dtype=torch.int32, device=self._device)
        )
        self.counting, self.count_routed = True, count_routed

    def count(self, rows_TK: torch.Tensor, chosen_TK: torch.Tensor) -> None:
        """Count slots [T, K] by their rows, where they were chosen at all."""
        nowhere = len(self.load) - 1
        ids_TK = self.counted_R[rows_TK].masked_fill(~chosen_TK, nowhere)
        self.count_routed(self.load, ids_TK)


def route_rows(
    logits_TR: torch.Tensor,
    table: RowTable,
    *,
    top_k: int,
    renormalize: bool,
    sigmoid: bool = False,
    bias_R: torch.Tensor | None = None,
    top_groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose router rows as the original would, barred from those that are gone.

    Groups score by their best row, with a bias by the sum of their two best (of one,
    where one is left); a group without rows is never chosen. Where the chosen groups
    hold fewer than ``top_k`` rows, the slots left over weigh nothing.

    Args:
        logits_TR: The router's output.
        table: Where rows lead.
        top_k: Slots of a token.
        renormalize: Whether weights are rescaled to sum to one.
        sigmoid: Scores by sigmoid instead of softmax.
        bias_R: Added to scores for choosing, not for weighing (``noaux_tc``).
        top_groups: How many groups a token may choose from.

    Returns:
        Weights [T, K] float32 and expert ids [T, K] int32. Two slots of a token may
        name the same expert; the kernels treat them as two and add them up.
    """
    logits_TR = logits_TR.float()
    scores_TR = logits_TR.sigmoid() if sigmoid else logits_TR.softmax(dim=-1)
    choice_TR = scores_TR if bias_R is None else scores_TR + bias_R
    if table.grouped:
        best = 1 if bias_R is None else 2
        choice_TR = _bar_groups(choice_TR, table, best=best, top_groups=top_groups)
    # Rows are ranked before they become experts: redirected rows compete as they did.
    best_TK, rows_TK = choice_TR.topk(top_k, dim=-1)
    if table.counting:
        table.count(rows_TK, best_TK != NEVER)
    # Minus infinity was chosen only because nothing else was left; it must not weigh.
    weights_TK = scores_TR.gather(1, rows_TK).masked_fill(best_TK == NEVER, 0.0)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    # Shares come last: what other processes serve counts in the sum as well.
    return weights_TK * table.share_R[rows_TK], table.expert_R[rows_TK]


def _bar_groups(
    choice_TR: torch.Tensor, table: RowTable, *, best: int, top_groups: int
) -> torch.Tensor:
    """Scores with minus infinity where a row's group was not chosen."""
    padded = nn.functional.pad(choice_TR, (0, 1), value=NEVER)
    choice_TGM = padded[:, table.row_GM]
    # A group that lost rows is judged by those it has, as in
    # calibrate/expert_forward.py.
    best_TGB = choice_TGM.topk(min(best, choice_TGM.shape[-1]), dim=-1).values
    empty_TG = best_TGB[..., 0] == NEVER
    score_TG = best_TGB.masked_fill(best_TGB == NEVER, 0.0).sum(dim=-1)
    groups_TC = score_TG.masked_fill(empty_TG, NEVER).topk(top_groups, dim=-1).indices
    chosen_TG = torch.zeros_like(empty_TG).scatter(1, groups_TC, value=True)
    return choice_TR.masked_fill(~chosen_TG[:, table.group_R], NEVER)
