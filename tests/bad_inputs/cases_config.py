"""Bad config.json files."""

from typing import Any

from .case import CONFIG, RUN, Case, Spoil, holding, with_keys, without_key

COUNTS = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "intermediate_size": 48,
}
WRONG = {
    "a list": [4],
    "a boolean": True,
    "negative": -4,
    "zero": 0,
    "a fraction": 2.5,
    "text": "4",
    "null": None,
    "a trillion": 10**12,
    "of 400 digits": 10**400,
}


def config(name: str, says: tuple[str, ...], spoil: Spoil) -> Case:
    """A case of config.json."""
    return Case(f"config: {name}", RUN, ("ckpt", *says), spoil)


def values(says: tuple[str, ...], **changed: Any) -> Case:
    """A case in which keys of config.json have other values."""
    name = ", ".join(f"{key} {str(value)[:20]}" for key, value in changed.items())
    return config(name, says, with_keys(CONFIG, **changed))


CASES = [
    config("missing", ("config.json", "missing"), lambda at: (at / CONFIG).unlink()),
    config("not JSON", ("config.json", "not valid JSON"), holding(CONFIG, "{a: 1}")),
    config("a list", ("JSON object", "list"), holding(CONFIG, "[1]")),
    config("empty", ("not valid JSON",), holding(CONFIG, "")),
    config("not UTF-8", ("not valid JSON",), holding(CONFIG, b"{\xff}")),
    config("nested", ("not valid JSON",), holding(CONFIG, "[" * 10**5)),
    config("a long number", ("not valid JSON",), holding(CONFIG, "1" + "0" * 6000)),
    config("NaN", ("not valid JSON", "NaN"), holding(CONFIG, '{"eps": NaN}')),
    config("empty object", ("model_type", "mixtral"), holding(CONFIG, "{}")),
    config("no model_type", ("mixtral",), without_key(CONFIG, "model_type")),
    values(("model_type", "'bert'", "mixtral"), model_type="bert"),
    values(("model_type", "mixtral"), model_type=["mixtral"]),
    values(("model_type", "mixtral"), model_type="../mixtral"),
    values(("model_type", "mixtral"), model_type=None),
    values(("model_type", "'spec'", "mixtral"), model_type="spec"),
    *(
        config(f"no {key}", (key, "missing"), without_key(CONFIG, key))
        for key in COUNTS
    ),
    *(
        config(f"{key} is {what}", ("config.json",), with_keys(CONFIG, **{key: value}))
        for key in COUNTS
        for what, value in WRONG.items()
    ),
    values(("layer 1", "num_hidden_layers is 1"), num_hidden_layers=1),
    values(("layer 2", "missing"), num_hidden_layers=3),
    values(("4 rows", "num_local_experts is 5"), num_local_experts=5),
    values(("expert 3", "num_local_experts is 3"), num_local_experts=3),
    values(("num_experts_per_tok is 5", "4"), num_experts_per_tok=5),
    values(("[4, 32]", "[4, 64]"), hidden_size=64),
    values(("[48, 32]", "[96, 32]"), intermediate_size=96),
    values(("architectures",), architectures="MixtralForCausalLM"),
    values(("quantized", "fp8"), quantization_config={"quant_method": "fp8"}),
    values(("quantized", "awq"), quantization_config="awq"),
    values(("per_layer_config",), per_layer_config=[1]),
    values(("per_layer_config",), per_layer_config=[]),
    values(("per_layer_config",), per_layer_config=7),
    values(("per_layer_config", "'2'", "0 to 1"), per_layer_config={"2": {}}),
    values(("per_layer_config", "'-1'"), per_layer_config={"-1": {}}),
    values(("per_layer_config", "'1'"), per_layer_config={"1": [3]}),
    values(("num_local_experts",), per_layer_config={"1": {"num_local_experts": -1}}),
    values(("layer 0", "expert 0", "no experts"), per_layer_config={
        "0": {"num_local_experts": 0}, "1": {"num_local_experts": 0}
    }),
    values(("layer_types", "1", "2"), layer_types=["full_attention"]),
    values(("max_position_embeddings",), max_position_embeddings="many"),
    values(("max_position_embeddings",), max_position_embeddings=0),
    values(("max_position_embeddings",), max_position_embeddings=True),
    values(("num_attention_heads",), num_attention_heads=0),
    values(("num_attention_heads",), num_attention_heads=[2]),
    values(("q_proj",), num_attention_heads=5),
    values(("num_key_value_heads",), num_key_value_heads=-1),
    values(("vocab_size",), vocab_size="512"),
    values(("vocab_size",), vocab_size=-1),
    values(("config.json", "rms_norm_eps"), rms_norm_eps="small"),
    values(("hidden_act",), hidden_act="mystery"),
    values(("hidden_act",), hidden_act=["silu"]),
    values(("hidden_act",), hidden_act=None),
    values(("rope",), rope_theta="big"),
    values(("rope",), rope_theta=[1.0]),
    values(("rope",), rope_scaling={"rope_type": "mystery", "factor": 2.0}),
    values(("rope",), rope_scaling=7),
    values(("config.json", "sliding_window"), sliding_window="wide"),
]  # fmt: skip
