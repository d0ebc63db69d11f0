"""Lists of modules are matched as the installed vLLM does; skipped without it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.reference import DROP_BLOCK, LayerCut, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.module_names import Matcher, Way
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.renumbered_config import FUSED, renumbered
from vllm_moe_prune.decide.cut_plan import load_plan

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


@pytest.mark.parametrize("layout", ["mlp", "block_sparse_moe"])
def test_lists_are_understood_by_the_pruned_mixtral(
    layout: str, tmp_path: Path
) -> None:
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
        should_ignore_layer,
    )

    from vllm_moe_prune.plugin.models.mixtral import MoePruneMixtralForCausalLM

    mapper: Any = MoePruneMixtralForCausalLM.hf_to_vllm_mapper
    folder = tiny_checkpoint(
        tmp_path / "model", layout=f"{layout}.gate_up_down", layers=3, tokenizer=False
    )
    source = open_checkpoint(folder)
    cuts = {0: DROP_BLOCK, 1: LayerCut(keep=(3, 1))}
    plan = load_plan(write_plan(tmp_path / "plan.json", source, cuts))
    one = f"model.layers.2.{layout}.experts.4.up_proj"
    for entry, expected in (
        (
            rf"re:.*\.[1]\.{layout}\.experts.*",
            {(0, at, w) for at in (0, 1) for w in "123"},
        ),
        (one, {(1, 4, "3")}),
        (rf"re:.*{layout}\.experts\.\d+\.down_proj$", None),
    ):
        block = renumbered(source, plan, {"ignore": [entry]})
        ignored = mapper.get_rename_mapper().apply_list(block["ignore"])
        found = {
            (layer, expert, w)
            for layer, experts in ((0, 2), (1, 8))
            for expert in range(experts)
            for w in "123"
            if should_ignore_layer(
                f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{w}", ignored
            )
        }
        if expected is None:
            assert {w for _, _, w in found} == {"2"}
            assert len(found) == 10
        else:
            assert found == expected
