"""Pruned DeepSeek-V3, R1 and Moonlight: V2's classes, sigmoid scores and their bias."""

from ...archs.deepseek_v3 import ARCH
from .deepseek_v2 import MoePruneDeepseekV2ForCausalLM


class MoePruneDeepseekV3ForCausalLM(MoePruneDeepseekV2ForCausalLM):
    """DeepseekV3ForCausalLM for checkpoints pruned by this package."""

    arch = ARCH
    # A dict of its own: the constructor adds to it, which V2's must not see.
    packed_modules_mapping: dict[str, list[str]] = {  # noqa: RUF012
        "gate_up_proj": ["gate_proj", "up_proj"]
    }
