"""Ridge regression of one expert's down projection: the one solver of every refit.

With a feature row per token, f = router weight x inner activation, and r what the layer
lacks for that token while the expert does as it does, the change d of its projection is

    argmin  sum |r - d f|^2  +  lam * mean(diag G) * |w + d - w0|^2,      G = sum f f'

w its present weights, w0 those that it is pulled towards. Experts are taken in turn,
each on what the others leave missing (block-coordinate descent), for a few sweeps.

F expert width, D hidden, n tokens.
"""

import torch
from torch import Tensor

from ..errors import CalibrationError
from .sparsegpt import add_inputs
from .wanda import NOT_FINITE_INPUTS

CHUNK = 4096
"""Tokens of a product; only so many features are held in float32 at once."""


def gram_of(feature_nF: Tensor) -> Tensor:
    """G [F, F] in float32 of features in any floating dtype."""
    width = feature_nF.shape[1]
    gram_FF = torch.zeros(width, width, device=feature_nF.device)
    for chunk_cF in torch.split(feature_nF, CHUNK):
        add_inputs(gram_FF, chunk_cF)
    return gram_FF


def cross_of(feature_nF: Tensor, missing_ND: Tensor, token_n: Tensor) -> Tensor:
    """The sums of f r' [F, D] in float32.

    Args:
        feature_nF: Of some tokens, in any floating dtype.
        missing_ND: r of all tokens, float32.
        token_n: Which they are.
    """
    cross_FD = missing_ND.new_zeros(feature_nF.shape[1], missing_ND.shape[1])
    for chunk_cF, token_c in zip(
        torch.split(feature_nF, CHUNK), torch.split(token_n, CHUNK), strict=True
    ):
        cross_FD.addmm_(chunk_cF.float().T, missing_ND.index_select(0, token_c))
    return cross_FD


class Ridge:
    """One expert's normal equations, factored once for a ridge."""

    def __init__(self, gram_FF: Tensor, ridge: float) -> None:
        """Factor G + ridge * mean(diag G).

        Args:
            gram_FF: float32; a copy of it is factored.
            ridge: Relative to the mean of its diagonal, above 0.

        Raises:
            CalibrationError: The sums are not finite.
        """
        diagonal_F = gram_FF.diagonal()
        if not bool(torch.isfinite(diagonal_F).all()):
            raise CalibrationError(NOT_FINITE_INPUTS)
        self.pull = ridge * float(diagonal_F.mean())
        ridged_FF = gram_FF.clone()
        ridged_FF.diagonal().add_(self.pull)
        self._lower_FF, failed = torch.linalg.cholesky_ex(ridged_FF)
        if failed:
            raise CalibrationError(
                f"the sums of {len(gram_FF)} inputs cannot be inverted at ridge "
                f"{ridge}. Set refit: none, or raise the ridge."
            )

    def change(self, cross_FD: Tensor, away_DF: Tensor) -> Tensor:
        """The change [D, F] that is best for what is missing.

        Args:
            cross_FD: Sums of f r', r what is missing with the present weights.
            away_DF: How far those are from what they are pulled to.
        """
        # The pull is towards w0, the change counts from the present weights.
        cross_FD = cross_FD - self.pull * away_DF.T
        return torch.cholesky_solve(cross_FD, self._lower_FF).T
