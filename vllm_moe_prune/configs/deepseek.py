"""DeepSeek-MoE's config.json (the first generation); fields and defaults as published.

Source: ``configuration_deepseek.py`` of deepseek-ai/deepseek-moe-16b-base.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class DeepseekConfig(PreTrainedConfig):
    """A Llama with leading dense layers, then shared and routed experts."""

    model_type = "deepseek"
    keys_to_ignore_at_inference = ("past_key_values",)
    # An alias: readers ask for num_experts, files say n_routed_experts.
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    rope_parameters: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what the published class fills in."""
        # Without the key each query head has keys and values of its own.
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)
