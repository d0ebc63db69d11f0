"""Configuration classes of families that transformers does not know.

``register`` makes ``AutoConfig`` read their config.json without running any code from
the checkpoint; vLLM reads every config.json through ``AutoConfig``.
"""

from functools import cache


@cache
def register() -> None:
    """Tell transformers about Arctic, the first DeepSeek and Kimi-K2."""
    from transformers import AutoConfig

    from .arctic import ArcticConfig
    from .deepseek import DeepseekConfig
    from .kimi_k2 import KimiK2Config

    for config_class in (ArcticConfig, DeepseekConfig, KimiK2Config):
        # exist_ok: a later transformers may bring the family itself.
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
