"""Recipes: what is refused and how, what flags replace, what ships."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_moe_prune.decide.required_stats import needed_statistics
from vllm_moe_prune.errors import RecipeError
from vllm_moe_prune.recipes.flags import RecipeFlag, recipe_flags, with_overrides
from vllm_moe_prune.recipes.loading import (
    ALIASES,
    WISHES,
    load_recipe,
    shipped_recipes,
    wished,
)
from vllm_moe_prune.recipes.numbers import parse_size
from vllm_moe_prune.recipes.schema import Recipe, parse_recipe


def recipe(**data: Any) -> Recipe:
    return parse_recipe(data, "test")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"mood": "good"}, "mood: Extra inputs"),
        ({"experts": {"dorp": 0.2}}, "experts.dorp: Extra inputs"),
        ({"slim": {"sparsity": 0.5, "ratio": 1}}, "slim.ratio: Extra inputs"),
        ({"calibration": {"file": "x"}}, "calibration.file: Extra inputs"),
        ({"layers": {"drop": [1]}}, "layers.drop: Extra inputs"),
        ({"experts": {"drop": 1.0}}, "experts.drop: Input should be less than 1"),
        ({"experts": {"drop": -0.1}}, "experts.drop: Input should be greater"),
        ({"experts": {"drop": float("nan")}}, "experts.drop"),
        ({"experts": {"drop": "half"}}, "experts.drop: Input should be a valid number"),
        ({"experts": {"keep": 0}}, "experts.keep: Input should be greater"),
        ({"experts": {"method": "luck"}}, "experts.method: Input should be 'stun'"),
        ({"experts": {"drop": 0.2, "keep": 4}}, "give drop or keep, not both"),
        (
            {"experts": {"router_weight": 0, "coactivation_weight": 0}},
            "router_weight and coactivation_weight are both zero",
        ),
        ({"total_sparsity": 1}, "total_sparsity: Input should be less than 1"),
        (
            {"total_sparsity": 0.4, "slim": {"sparsity": 0.5}},
            "give total_sparsity or slim.sparsity, not both",
        ),
        ({"slim": {"pattern": "4:2"}}, "n:m with n < m"),
        ({"routing": "random"}, "routing: Input should be 'drop'"),
        ({"calibration": {"samples": 0}}, "calibration.samples"),
        ({"calibration": {"sequence_length": 1}}, "calibration.sequence_length"),
        ({"experts": None}, "experts: "),
        ({"layers": {"drop_moe": 3}}, "layers.drop_moe: "),
    ],
)
def test_what_is_wrong_is_named_in_one_line(data: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, "mine.yaml")
    message = str(caught.value)
    assert message.startswith("recipe mine.yaml: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize("data", [None, [], "stun", 7, [{"name": "x"}]])
def test_what_is_no_mapping_is_refused(data: object) -> None:
    with pytest.raises(RecipeError, match="top level"):
        parse_recipe(data, "test")


def test_a_long_value_is_not_shown_whole() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"experts": {"method": "x" * 10_000}}, "test")
    assert len(str(caught.value)) < 300


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().routing = "redirect"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "coactivation", "activations"),
    [
        ({}, True, True),
        ({"experts": {"coactivation_weight": 0}}, False, True),
        ({"experts": {"method": "none"}}, False, True),
        ({"slim": {"method": "magnitude"}}, True, False),
        ({"experts": {"method": "none"}, "slim": {"method": "none"}}, False, False),
    ],
)
def test_a_recipe_knows_what_it_needs(
    data: dict[str, Any], coactivation: bool, activations: bool
) -> None:
    found = recipe(**data)
    asked = found.model_copy(
        update={"experts": found.experts.model_copy(update={"drop": 0.5})}
    )
    assert ("coactivation_EE" in needed_statistics(asked)) is coactivation
    assert found.needs_activations is activations


# What a flag needs beside it, and values that its type does not tell.
BESIDE: dict[str, dict[str, Any]] = {
    "reverse": {"criterion": "reap"},
    "search": {"criterion": "removal-loss", "budget": "per-layer"},
    "structured_share": {"total": 0.5},
    "narrow_of_total": {"total": 0.5},
    "slim": {"total": 0.5},
    "bits": {"quantize": "rtn"},
    "group_size": {"quantize": "rtn"},
    "zero_point": {"quantize": "awq"},
    "act_order": {"quantize": "gptq"},
    "quantize_scope": {"quantize": "rtn"},
}
VALUES: dict[str, Any] = {
    "experts": "score",
    "slim": "sparsegpt",
    "bytes": "3KB",
    "pattern": "2:4",
    "protected": "{0: [1, 2]}",
    "scope": "experts,attention",
    "quantize_scope": "experts,head",
    "exclude": "w1,w2",
    "drop_moe": "1,2",
    "drop_blocks": "[1]",
    "budget": "sensitivity",
    "routing": "redirect",
    "structured_share": "auto",
    "blend": "maxmin",
    "narrow_refit": "none",
    "calibration": ["text.txt"],
    "judge_on": ["own.txt"],
}
READ = {
    "calibration": "text.txt",
    "judge_on": "own.txt",
    "bytes": 3000,
    "protected": {0: (1, 2)},
    "scope": ("experts", "attention"),
    "quantize_scope": ("experts", "head"),
    "exclude": ("w1", "w2"),
    "drop_moe": (1, 2),
    "drop_blocks": (1,),
}


def value_for(flag: RecipeFlag) -> Any:
    """One that is not the default."""
    if flag.name in VALUES:
        return VALUES[flag.name]
    if "One of: " in flag.help:
        # The last choice, but "none" where there is one.
        choices = flag.help.split("One of: ")[1].rstrip(".").split(", ")
        choice = next(one for one in reversed(choices) if one != "none")
        return flag.type(choice)
    if flag.type is bool:
        return flag.name != "divide_by_router_norm"
    return {int: 7, float: 0.25, str: "text.txt"}[flag.type]


@pytest.mark.parametrize("name", recipe_flags())
def test_every_key_of_a_recipe_has_a_flag_that_reaches_it(name: str) -> None:
    flag = recipe_flags()[name]
    value = value_for(flag)
    found: Any = with_overrides(Recipe(), {**BESIDE.get(name, {}), name: value})
    for attribute in flag.path:
        found = getattr(found, attribute)
    assert found == READ.get(name, value)
    default: Any = Recipe()
    for attribute in flag.path:
        default = getattr(default, attribute)
    assert found != default


def test_flags_cover_the_schema() -> None:
    keys = {
        (stage, key)
        for stage, field in Recipe.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    }
    assert keys == {flag.path for flag in recipe_flags().values() if flag.path[1:]}


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("default", {"pattern": "2:4"}, "pattern does nothing.*--slim sparsegpt"),
        ("default", {"slim": "sparsegpt"}, "writes no zeros without"),
        ("default", {"bits": "fp8"}, "bits does nothing.*--quantize awq"),
        ("wanda50", {"min_experts": 1}, "min_experts does nothing.*--criterion reap"),
        ("cpu50", {"quantize": "awq"}, "quantize and zeros"),
    ],
)
def test_a_flag_that_would_do_nothing_names_what_it_needs(
    name: str, flags: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        with_overrides(load_recipe(name), flags)


def test_a_size_is_met_by_experts_where_no_zeros_are_written() -> None:
    found = with_overrides(load_recipe("default"), {"total": 0.4})
    assert (found.total_sparsity, found.structured_share) == (0.4, 1.0)
    assert found.experts.drop is None
    found = with_overrides(load_recipe("gpu-int4"), {"bytes": "2GiB"})
    assert (found.max_bytes, found.structured_share) == (2 << 30, 1.0)
    # Where it writes zeros, or says by itself how many experts leave, nothing changes.
    found = with_overrides(load_recipe("stun40-paper"), {"total": 0.6})
    assert (found.experts.drop, found.structured_share) == (0.2, None)


def test_patterns_and_criteria_replace_what_excludes_them() -> None:
    found = with_overrides(load_recipe("stun40-paper"), {"pattern": "2:4"})
    assert (found.total_sparsity, found.experts.drop) == (None, 0.2)
    found = with_overrides(load_recipe("stun40-paper"), {"criterion": "reap"})
    assert (found.experts.method, found.experts.criterion) == ("score", "reap")


def test_each_wish_is_a_shipped_recipe_that_saves_where_it_is_served() -> None:
    assert [one.name for one in wished(None, None)] == ["default"]
    for wish, names in WISHES.items():
        found = wished(None, wish)
        assert [one.name for one in found] == list(names)
        assert all(one.storage == "bitmask" for one in found if one.asks_zeros)
        if wish != "stock-vllm":
            assert [one.name for one in wished("best", wish)] == [f"best-{wish}"]
    assert [one.name for one in wished(None, None, search=True)] == ["best"]
    assert [one.name for one in wished(None, "cpu", search=True)] == ["best-cpu"]
    with pytest.raises(RecipeError, match="leave out --recipe wanda50"):
        wished("wanda50", "cpu")
    with pytest.raises(RecipeError, match="'tpu' is not one of: any, cpu, gpu, stock"):
        wished(None, "tpu")
    with pytest.raises(RecipeError, match="which do not search"):
        wished(None, "stock-vllm", search=True)


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_says_what_it_is_and_what_is_better(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = load_recipe(name)
    meant, better = ALIASES[name]
    assert found.name == meant
    assert load_recipe(better).total_sparsity == found.total_sparsity
    (said,) = [record.getMessage() for record in caplog.records]
    assert name in said
    assert better in said


def test_flags_that_are_not_given_change_nothing() -> None:
    for name in shipped_recipes():
        before = load_recipe(name)
        assert with_overrides(before, dict.fromkeys(recipe_flags())) == before


def test_a_flag_replaces_the_recipes_own_way_of_saying_it() -> None:
    stun = recipe(total_sparsity=0.4, experts={"drop": 0.2})
    found = with_overrides(stun, {"keep": 5})
    assert (found.experts.keep, found.experts.drop) == (5, None)
    found = with_overrides(recipe(experts={"keep": 5}), {"drop": 0.3})
    assert (found.experts.keep, found.experts.drop) == (None, 0.3)
    found = with_overrides(stun, {"slim": "none"})
    assert (found.slim.method, found.total_sparsity) == ("none", None)
    found = with_overrides(stun, {"slim": "none", "total": 0.3})
    assert (found.slim.method, found.total_sparsity) == ("none", 0.3)
    found = with_overrides(recipe(slim={"sparsity": 0.5}), {"total": 0.3})
    assert (found.slim.sparsity, found.total_sparsity) == (None, 0.3)
    shared = recipe(total_sparsity=0.5, structured_share=0.5)
    found = with_overrides(shared, {"drop": 0.1})
    assert (found.structured_share, found.experts.drop) == (None, 0.1)


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(RecipeError, match="give drop or keep, not both"):
        with_overrides(Recipe(), {"drop": 0.2, "keep": 3})


@pytest.mark.parametrize("flag", [{"drop": 0.25}, {"keep": 4}])
def test_a_flag_that_would_do_nothing_is_refused(flag: dict[str, float]) -> None:
    wanda = recipe(name="wanda50", experts={"method": "none"}, slim={"sparsity": 0.5})
    with pytest.raises(RecipeError, match=r"wanda50: (drop|keep) does nothing"):
        with_overrides(wanda, flag)


def test_flags_are_checked_like_the_file() -> None:
    with pytest.raises(RecipeError, match=r"experts\.drop: Input should be less"):
        with_overrides(Recipe(), {"drop": 1.5})
    with pytest.raises(RecipeError, match=r"slim\.method"):
        with_overrides(Recipe(), {"slim": "melt"})


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_survive_being_written_and_read(
    name: str, tmp_path: Path
) -> None:
    shipped = load_recipe(name)
    path = tmp_path / "copy.yaml"
    data = shipped.model_dump(mode="json", exclude_defaults=True)
    path.write_text(yaml.safe_dump(data))
    assert load_recipe(str(path)) == shipped


def test_a_file_is_read_before_it_is_taken_for_a_shipped_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shipped names win in every folder; a file is given by its path."""
    (tmp_path / "cpu50").write_text("name: mine\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("cpu50").name == "cpu50"
    assert load_recipe("./cpu50").name == "mine"


def test_an_unknown_name_lists_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'stun41': no such file.*stun40"):
        load_recipe("stun41")
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        b"a: [1",
        b"\xff\xfe\x00",
        b"a: &x 1\nb: *x\n",
        b"!!python/object/apply:os.system [ls]",
        b"[" * 600,
        b"name: 2024-99-99\n",
        b"\tname: x",
    ],
)
def test_files_that_are_no_plain_yaml_are_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert "bad.yaml: not valid YAML" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("2GiB", 2 << 30),
        (" 1.5 mb ", 1_500_000),
        ("700kib", 700 << 10),
        ("123", 123),
        ("1e3", 1000),
        ("60KB", 60_000),
    ],
)
def test_sizes_are_decimal_or_binary_as_written(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5TB", "-1GB", "0", "0.4", "inf", "nan", "1 2 GB", "5GBB", "x"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_size(text)
