"""Lists of modules are matched as the installed vLLM does; skipped without it."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_moe_prune.checkpoint.module_names import Matcher, Way
from vllm_moe_prune.cut.renumbered_config import FUSED

pytestmark = pytest.mark.vllm
NAMES = [
    f"model.layers.{layer}.{inner}"
    for layer in (1, 10, 2)
    for inner in ("self_attn.o_proj", "mlp.down_proj", "mlp.experts", "mlp.gate")
]
ENTRIES = ["model.layers.1.mlp.gate", "layers.1", "o_proj", "lm_head", "mlp", ""]


def test_names_and_parts_of_names_are_skipped_as_vllm_skips_them() -> None:
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        is_layer_skipped,
    )

    for mode, way in (("exact", Way.TARGET), ("substring", Way.PART)):
        for entry in ENTRIES:
            test = Matcher("here").test(entry, way)
            for name in NAMES:
                if mode == "exact" and "experts" in name:
                    continue  # there vLLM looks for any module of an expert
                found = is_layer_skipped(name, [entry], match_mode=mode)
                assert test(name) == found, (mode, entry, name)


@pytest.mark.parametrize(
    "rules",
    [
        {r"-:.*\.1\..*": {}, r"+:.*o_proj": {"bits": 8}},
        {r".*layers\.1": {"bits": 8}, r"-:.*": {}},
        {r"-:model.layers.1.*": {}},
        {},
    ],
)
def test_rules_are_read_as_vllm_reads_them(rules: dict[str, Any]) -> None:
    from vllm.model_executor.layers.quantization.utils.gptq_utils import (
        get_dynamic_override,
    )

    tests = {rule: Matcher("here").test(rule, Way.RULE) for rule in rules}
    for name in NAMES:
        first = next((rule for rule, test in tests.items() if test(name)), None)
        expected: Any = None
        if first is not None:
            expected = False if first.startswith("-:") else rules[first]
        config: Any = SimpleNamespace(dynamic=rules)
        assert get_dynamic_override(config, name) == expected, name


def test_fused_modules_are_those_of_our_models() -> None:
    from vllm_moe_prune.plugin.models import arctic, deepseek_v2, mixtral

    found = {"fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]}
    found["qkv_proj"] = ["q_proj", "k_proj", "v_proj"]
    for model in (
        mixtral.MoePruneMixtralForCausalLM,
        arctic.MoePruneArcticForCausalLM,
        deepseek_v2.MoePruneDeepseekV2ForCausalLM,
    ):
        found |= model.packed_modules_mapping
    assert {name: list(parts) for name, parts in FUSED.items()} == found
