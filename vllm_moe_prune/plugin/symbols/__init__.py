"""Every symbol of vLLM's that the plugin uses.

The plugin compares them with a vLLM that it was not tested with when it starts
(``compat.missing_symbols``); ``tests/contract/test_vllm_symbols.py`` with the installed
one, and any other whose sources are at hand. Both read sources and import nothing.
"""

from . import models, per_layer, quantization, watching
from .symbol import Symbol

__all__ = ["SYMBOLS", "Symbol"]

SYMBOLS = (
    *(models.SYMBOLS + per_layer.SYMBOLS),
    *(quantization.SYMBOLS + watching.SYMBOLS),
)
