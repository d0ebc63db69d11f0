"""Whether integer experts on CPUs round the tokens they multiply, as the user says.

No vLLM in here.
"""

from typing import Any

import torch

from ...errors import ServeError
from ...kernels import cpu_library
from ...kernels.blocks import STEP

KEY = "moe_prune_activations"
"""Of ``--additional-config``."""
ROUNDED, EXACT = "rounded", "exact"


def are_rounded(vllm_config: Any, dtype: torch.dtype) -> bool:
    """Whether tokens are rounded to int8; the default for those of 16 bits.

    Args:
        vllm_config: vLLM's.
        dtype: Of tokens.

    Raises:
        ServeError: The user asks for something that there is not.
    """
    extra = vllm_config.additional_config
    # vLLM takes objects that are no dict here too (SupportsHash).
    value = extra.get(KEY) if isinstance(extra, dict) else None
    if value is None:
        # Who serves in float32 is after the last digit, not after speed.
        return dtype != torch.float32
    if value not in (ROUNDED, EXACT):
        raise ServeError(
            f"--additional-config: {KEY} is {value!r}; use {ROUNDED!r} or {EXACT!r}."
        )
    return bool(value == ROUNDED)


def dots_for(groups: tuple[int, ...], *, rounded: bool) -> int:
    """What multiplies by weights of such groups; ``cpu_library.EXACT``: not rounded."""
    # Sums of what is rounded together are multiplied by one scale.
    fit = all(group % STEP == 0 for group in groups)
    found = cpu_library.all_dots()
    return found[0] if rounded and fit and found else cpu_library.EXACT
