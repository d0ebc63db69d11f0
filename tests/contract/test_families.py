"""What ``families`` and the documentation say is tested is what the tests run."""

import json

import pytest
from typer.testing import CliRunner

from tests.e2e import test_plugin_mixtral as mixtral_served
from tests.e2e.test_two_ranks import BY_EXPERTS, TENSORS, mixtral_jobs
from tests.family_cases import CASES, OURS
from tests.properties.test_cut_families import FAMILIES
from tests.properties.test_cut_forward import (
    test_dropping_experts_equals_barring_them as mixtral_float64,
)
from tests.unit.test_calibrate_families import VARIANTS
from tests.unit.test_calibrate_forward import (
    test_every_layout_gives_the_loss_of_transformers as mixtral_loss,
)
from vllm_moe_prune.archs import find_arch, known, supported
from vllm_moe_prune.archs.spec import Evidence
from vllm_moe_prune.archs.support import MEANING, family_support
from vllm_moe_prune.cli import app


def evidence(model_type: str) -> set[Evidence]:
    """What the parameters of the tests hold of a family; Mixtral has its own tests."""
    if model_type == "mixtral":
        assert all((mixtral_loss, mixtral_float64, mixtral_jobs))
        assert {"uniform", "everything"} <= mixtral_served.CASES.keys()
        return set(MEANING)
    cases = [case for case in CASES.values() if case.family == model_type and case.cuts]
    stock = find_arch(model_type, "").stock_architecture
    shared = [*TENSORS.values(), *BY_EXPERTS.values()]
    held: dict[Evidence, bool] = {
        "transformers": model_type in {family for family, _ in VARIANTS.values()},
        "float64": model_type in FAMILIES,
        "vLLM's class": any(case.architecture == stock for case in cases),
        "plugin": any(case.architecture is None for case in cases),
        "two ranks": any(case.family == model_type for case in shared),
    }
    return {name for name, there in held.items() if there}


@pytest.mark.parametrize("model_type", supported())
def test_what_is_said_to_be_tested_is(model_type: str) -> None:
    assert set(find_arch(model_type, "").tested) == evidence(model_type)


def test_every_family_has_a_row_of_its_own() -> None:
    rows = family_support()
    assert [row.model_type for row in rows] == known()
    assert len({row.checkpoints for row in rows}) == len(rows)
    served = {row.model_type: row.plugin for row in rows}
    assert served.items() >= OURS.items()


def test_the_command_prints_what_the_tables_say() -> None:
    data = json.loads(CliRunner().invoke(app, ["families", "--json"]).stdout)
    found = {row["model_type"]: row for row in data["families"]}
    assert list(found) == known()
    assert found["kimi_k2"]["alias_of"] == "deepseek_v3"
    assert found["kimi_k2"]["uniform"] == ["vLLM"]
    assert found["arctic"]["stock_vllm"] is None
    assert found["glm4_moe"]["stock_vllm"] == "drop, mean, preserve"
    assert found["qwen3_moe"]["refused"][0].startswith("`mlp_only_layers`")
    text = CliRunner().invoke(app, ["families"]).stdout
    assert all(name in text for name in [*known(), *MEANING])
