"""Snowflake Arctic's config.json; fields and defaults as published.

Source: ``configuration_arctic.py`` of Snowflake/snowflake-arctic-instruct. Fields that
only steer training or DeepSpeed are kept as they come and mean nothing here.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class ArcticConfig(PreTrainedConfig):
    """A transformer whose experts read each block's input, beside a dense MLP.

    Raises:
        ValueError: ``use_residual`` and ``parallel_attn_mlp_res``, two names of one
            switch, disagree.
    """

    model_type = "arctic"
    keys_to_ignore_at_inference = ("past_key_values",)
    default_theta = 1000000.0
    # An alias: readers ask for num_experts, files say num_local_experts.
    attribute_map = {"num_experts": "num_local_experts"}  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    attention_dropout: float | int = 0.0
    num_experts_per_tok: int = 1
    num_local_experts: int = 8
    router_aux_loss_coef: float = 0.001
    moe_layer_frequency: int = 2
    """Layer i has experts where ``(i + 1) % moe_layer_frequency == 0``."""
    parallel_attn_mlp_res: bool = False
    """Whether MoE layers have a dense MLP, and experts that read the block's input."""
    use_residual: bool | None = None
    """The same switch under the name that vLLM used to read."""
    rope_parameters: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what the published class fills in."""
        # Without the key each query head has keys and values of its own.
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.use_residual is None:
            self.use_residual = self.parallel_attn_mlp_res
        if self.use_residual != self.parallel_attn_mlp_res:
            raise ValueError(
                f"config.json: use_residual is {self.use_residual}, but "
                f"parallel_attn_mlp_res is {self.parallel_attn_mlp_res}; they are one "
                "switch. Correct the wrong one."
            )
        super().__post_init__(**kwargs)
