"""Pruned DeepSeek-MoE 16B: DeepSeek-V2's classes with the attention of Llama."""

from ...archs.deepseek import ARCH
from .deepseek_v2 import MoePruneDeepseekV2ForCausalLM


class MoePruneDeepseekForCausalLM(MoePruneDeepseekV2ForCausalLM):
    """DeepseekForCausalLM for checkpoints pruned by this package."""

    arch = ARCH
    # A dict of its own: the constructor adds to it, which V2's must not see.
    packed_modules_mapping: dict[str, list[str]] = {  # noqa: RUF012
        "gate_up_proj": ["gate_proj", "up_proj"]
    }
