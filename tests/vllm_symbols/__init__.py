"""Every symbol of vLLM's that the plugin uses.

Checked against the installed vLLM, and any other whose sources are at hand, by
``tests/contract/test_vllm_symbols.py``, which reads sources and imports nothing.
"""

from tests.vllm_symbols import models, quantization, watching
from tests.vllm_symbols.symbol import Symbol

__all__ = ["SYMBOLS", "Symbol"]

SYMBOLS = models.SYMBOLS + quantization.SYMBOLS + watching.SYMBOLS
