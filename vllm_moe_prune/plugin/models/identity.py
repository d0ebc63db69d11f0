"""What stands where a sublayer was dropped."""

from typing import Any

from torch import nn


class Identity(nn.Module):
    """Hands on what it gets, in the place of a sublayer or of the norm before it.

    In the place of both, the forward of vLLM's decoder layers leaves the attention's
    output to be added to the residual by the next norm, as it must.
    """

    def forward(self, hidden_states: Any, residual: Any = None) -> Any:
        """The arguments, unchanged."""
        return hidden_states if residual is None else (hidden_states, residual)
