"""Lists of modules in ``quantization_config`` mean the same before and after a cut.

Judged by the matching functions of the libraries that read the lists, and by a map from
the output's names to the input's that is made from the plan alone.
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.utils.match import match_name
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from tests.reference import (
    DROP_BLOCK,
    DROP_MOE,
    DROP_MOE_KEEP_NORM,
    Cuts,
    LayerCut,
    write_plan,
)
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.renumbered_config import renumbered
from vllm_moe_prune.decide.cut_plan import CutPlan, load_plan

LAYERS, EXPERTS = 12, 3
SIZES: dict[str, Any] = {
    **{"hidden": 16, "width": 8, "vocab": 40, "heads": 2, "shards": 1},
    **{"layers": LAYERS, "experts": EXPERTS, "tokenizer": False, "top_k": 1},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mixtral-mlp": {"layout": "mlp.gate_up_down"},
    "mixtral-packed": {"layout": "mlp.packed"},
    "deepseek_v3": {"num_nextn_predict_layers": 1, "n_group": 1, "topk_group": 1}
    | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8}
    | {"qk_nope_head_dim": 8, "v_head_dim": 8},
}
Names = Sequence[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: open_checkpoint(
            tiny_checkpoint(
                folder / name, model_type=name.partition("-")[0], **SIZES | options
            )
        )
        for name, options in FAMILIES.items()
    }


def plan_of(checkpoint: Checkpoint, cuts: Cuts) -> CutPlan:
    with tempfile.TemporaryDirectory() as folder:
        return load_plan(write_plan(Path(folder) / "plan.json", checkpoint, cuts))


def sources(plan: CutPlan, modules: Names) -> dict[str, str]:
    """Each module of the output, and the input's that it comes from."""
    left = [layer for layer in plan.layers if layer.action != "drop-block"]
    new_layers = {layer.layer: at for at, layer in enumerate(left)}
    found = {}
    for name in modules:
        parts = name.split(".")
        if "layers" in parts:
            at = parts.index("layers") + 1
            layer = plan.layers[int(parts[at])]
            if layer.layer not in new_layers:
                continue
            moe = {"mlp", "block_sparse_moe"} & {parts[at + 1]} and layer.experts > 0
            norm = parts[at + 1] == "post_attention_layernorm" and layer.experts > 0
            stays = layer.action == "drop-moe-keep-norm" and norm
            if layer.action != "keep" and (moe or norm) and not stays:
                continue
            parts[at] = str(new_layers[layer.layer])
            if "experts" in parts[:-1]:
                place = parts.index("experts") + 1
                if int(parts[place]) not in layer.keep:
                    continue
                parts[place] = str(layer.keep.index(int(parts[place])))
        found[".".join(parts)] = name
    return found


def modules_of(checkpoint: Checkpoint) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in checkpoint.tensors})


def by_targets(names: Names) -> Callable[[str], bool]:
    return lambda module: any(match_name(module, name) for name in names)


def by_skipping(names: Names) -> Callable[[str], bool]:
    return lambda module: not should_convert_module(module, list(names))


def by_rules(rules: dict[str, Any]) -> Callable[[str], object]:
    """As GPTQModel and vLLM do: the first pattern that the name starts with."""

    def find(module: str) -> object:
        for rule, values in rules.items():
            pattern = rule[2:] if rule[:2] in ("+:", "-:") else rule
            if re.match(pattern, module):
                return False if rule.startswith("-:") else values
        return None

    return find


NUMBER = st.integers(0, LAYERS + 1).map(str)
SUB = st.sampled_from(
    [
        "self_attn.q_proj",
        "mlp",
        "mlp.gate",
        "mlp.exp",
        "mlp.experts",
        "mlp.experts.0.gate_proj",
        "block_sparse_moe",
        "block_sparse_moe.experts.1.w2",
        "experts.2",
    ]
)
PLAIN = st.one_of(
    st.sampled_from(["lm_head", "gate", "q_proj", "experts", "model.layers", "w1", ""]),
    st.builds("model.layers.{}.{}".format, NUMBER, SUB),
    st.builds("model.layers.{}".format, NUMBER),
    st.builds("layers.{}.{}".format, NUMBER, SUB),
    st.builds("experts.{}.w1".format, st.integers(0, EXPERTS)),
    st.builds(".{}.self_attn".format, NUMBER),
)
REGEX = st.one_of(
    st.sampled_from([".*", ".*gate$", "model", r".*experts\.\d+\.w1", r".*\.\d\..*"]),
    st.sampled_from([r".*[02468]\.self_attn.*", r"model\.layers\.1[01]?\..*"]),
    st.builds(r"model\.layers\.{}\..*".format, NUMBER),
    st.builds(r"model.layers.{}.*".format, NUMBER),
    st.builds(r".*\.({}|{})\..*proj".format, NUMBER, NUMBER),
    st.builds(r".*layers\.{}\.mlp\.(gate|experts\..*)".format, NUMBER),
    st.builds(r".*experts\.[{}]\.(w1|up_proj)$".format, st.integers(0, EXPERTS)),
)
ENTRIES = st.lists(PLAIN | REGEX, max_size=5)
TARGETS = st.lists(PLAIN | REGEX.map("re:{}".format) | st.just("Linear"), max_size=5)
RULES = st.dictionaries(
    st.builds("{}{}".format, st.sampled_from(["+:", "-:", ""]), REGEX),
    st.sampled_from([{"bits": 8}, {"bits": 4, "group_size": 64}, {}]),
    max_size=4,
)


@st.composite
def layer_cuts(draw: st.DrawFn) -> Cuts:
    dropped = [DROP_BLOCK, DROP_MOE, DROP_MOE_KEEP_NORM]
    cuts = {}
    for index in range(LAYERS):
        keep = draw(st.permutations(range(EXPERTS)))
        few = LayerCut(keep=tuple(keep[: draw(st.integers(1, EXPERTS))]))
        cuts[index] = draw(st.sampled_from([LayerCut(), few, few, *dropped]))
    return cuts | {5: LayerCut(keep=(2, 0))}


def fitting(checkpoint: Checkpoint, cuts: Cuts) -> Cuts:
    """Layers without experts can only go or stay."""
    return {
        index: cut
        if checkpoint.layers[index].has_moe or cut.action == "drop-block"
        else LayerCut()
        for index, cut in cuts.items()
    }


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    cuts=layer_cuts(),
    targets=TARGETS,
    ignore=TARGETS,
    skipped=ENTRIES,
    rules=RULES,
    method=st.sampled_from(["fp8", "awq", "gptq", "compressed-tensors"]),
)
@example("mixtral", {0: DROP_BLOCK}, ["Linear"], [], ["model.layers.1"], {}, "fp8")
@example("mixtral", {0: DROP_BLOCK}, ["Linear"], [], ["layers.1"], {}, "awq")
@example("mixtral-mlp", {}, [], [r"re:.*mlp\.gate$"], [], {"-:.*mlp.*": {}}, "gptq")
def test_a_module_is_named_exactly_if_its_source_was(
    models: dict[str, Checkpoint],
    family: str,
    cuts: Cuts,
    targets: list[str],
    ignore: list[str],
    skipped: list[str],
    rules: dict[str, Any],
    method: str,
) -> None:
    source = models[family]
    plan = plan_of(source, fitting(source, cuts))
    block = {
        "quant_method": method,
        "bits": 4,
        "kv_cache_scheme": {"targets": ["model.layers.3"], "num_bits": 8},
        "config_groups": {
            "group_0": {"targets": targets, "weights": {"dynamic": False}}
        },
        "ignore": ignore,
        "modules_to_not_convert": skipped,
        "dynamic": rules,
        "modules_in_block_to_quantize": [skipped, []],
    }
    found = renumbered(source, plan, block)
    assert list(found) == list(block)
    assert found["kv_cache_scheme"] == block["kv_cache_scheme"]
    assert found["bits"] == 4
    new = found["config_groups"]["group_0"]["targets"]
    assert ("Linear" in new) == ("Linear" in targets)
    pairs = sources(plan, modules_of(source))
    assert len(pairs) > 3
    parts = found["modules_in_block_to_quantize"]
    for out, old in pairs.items():
        assert by_targets(new)(out) == by_targets(targets)(old), out
        assert by_targets(found["ignore"])(out) == by_targets(ignore)(old), out
        after = found["modules_to_not_convert"]
        assert by_skipping(after)(out) == by_skipping(skipped)(old), (out, after)
        if method == "awq":  # vLLM: a part of the name
            named = any(name in old for name in skipped)
            assert any(name in out for name in after) == named, (out, after)
        else:  # vLLM: the name
            assert (out in after) == (old in skipped), (out, after)
        assert any(name in out for name in parts[0]) == any(
            name in old for name in skipped
        ), (out, parts)
        assert by_rules(found["dynamic"])(out) == by_rules(rules)(old), out
