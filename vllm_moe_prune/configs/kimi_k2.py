"""Configuration of Kimi-K2: DeepSeek-V3's under another name."""

from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config


class KimiK2Config(DeepseekV3Config):
    """Fields of config.json of moonshotai/Kimi-K2-Instruct."""

    model_type = "kimi_k2"
