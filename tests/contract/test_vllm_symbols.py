"""Everything of vLLM's that the plugin uses is where and what the plugin believes.

Read from sources, without importing vLLM: the installed one, and any others unpacked
at the paths in ``VLLM_SOURCES`` (folders that hold ``vllm/``, separated as in PATH).
"""

import ast
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from vllm_moe_prune.errors import ServeError
from vllm_moe_prune.plugin import compat, launch
from vllm_moe_prune.plugin.symbols import SYMBOLS
from vllm_moe_prune.plugin.symbols.per_layer import PATCHED
from vllm_moe_prune.plugin.symbols.sources import (
    assigned,
    attributes,
    file_of,
    find,
    parse,
    problem,
)
from vllm_moe_prune.plugin.symbols.symbol import Symbol

PLUGIN = Path(__file__).parents[2] / "vllm_moe_prune" / "plugin"
# Our constructor replaces vLLM's, so it must set every attribute that vLLM's sets.
REPLACED = {
    "mixtral": {
        "MoePruneMixtralMoE": "MixtralMoE",
        "MoePruneMixtralDecoderLayer": "MixtralDecoderLayer",
        "MoePruneMixtralModel": "MixtralModel",
        "MoePruneMixtralForCausalLM": "MixtralForCausalLM",
    },
    "deepseek_v2": {
        "MoePruneDeepseekV2MoE": "DeepseekV2MoE",
        "MoePruneDeepseekV2DecoderLayer": "DeepseekV2DecoderLayer",
        "MoePruneDeepseekV2Model": "DeepseekV2Model",
        "MoePruneDeepseekV2ForCausalLM": "DeepseekV2ForCausalLM",
    },
}


def sources() -> list[Path]:
    spec = importlib.util.find_spec("vllm")
    installed = [Path(spec.origin).parents[1]] if spec and spec.origin else []
    more = os.environ.get("VLLM_SOURCES", "")
    return installed + [Path(path) for path in more.split(os.pathsep) if path]


SOURCES = sources()
on_every_source = pytest.mark.parametrize(
    "root", SOURCES or [pytest.param(None, marks=pytest.mark.skip("no vLLM"))], ids=str
)


@on_every_source
@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda s: f"{s.module}:{s.name}")
def test_symbol_exists_with_the_parameters_we_pass(root: Path, symbol: Symbol) -> None:
    assert problem(root, symbol) is None


@on_every_source
@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [(family, *pair) for family, pairs in REPLACED.items() for pair in pairs.items()],
)
def test_replaced_constructor_sets_every_attribute(
    root: Path, family: str, ours: str, theirs: str
) -> None:
    upstream = find(root, f"vllm.model_executor.models.{family}", theirs)
    replacement = find(PLUGIN, f"models.{family}", ours)
    assert isinstance(upstream, ast.ClassDef)
    assert isinstance(replacement, ast.ClassDef)
    counts = find(PLUGIN, "models.moe_parts", "count_experts")
    assert isinstance(counts, ast.FunctionDef)
    ours_set = attributes(replacement)
    if "count_experts" in ast.unparse(replacement):
        ours_set |= assigned(counts, "moe")
    assert attributes(upstream, {"__init__"}) <= ours_set


def test_every_import_from_vllm_is_listed() -> None:
    listed = {(symbol.module, symbol.name) for symbol in SYMBOLS}
    used = {
        (node.module, alias.name)
        for path in PLUGIN.rglob("*.py")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom)
        and not node.level
        and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
    }
    assert used <= listed
    plain = {entry for entry in listed if "." not in entry[1]}
    patched = {(symbol.module, symbol.name) for symbol in PATCHED}
    assert plain - patched <= used


def test_a_vllm_that_moved_something_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As if installed: the sources, with one function renamed and one with more."""
    if not SOURCES:
        pytest.skip("no vLLM")
    theirs = shutil.ignore_patterns("*.so", "*.json", "__pycache__")
    shutil.copytree(
        SOURCES[0] / "vllm",
        tmp_path / "vllm",
        copy_function=os.symlink,
        ignore=theirs,
    )
    spec = importlib.util.spec_from_file_location("vllm", tmp_path / "vllm/__init__.py")
    monkeypatch.setattr(compat, "find_spec", lambda name: spec)
    assert compat.missing_symbols("0.33.0") is None
    argument = "def download_model(self, model_config"
    for module, old, new in (
        ("custom_op", "op_registry_oot", "op_registry"),
        ("model_loader.base_loader", argument, "def download_model(self, config"),
    ):
        path = file_of(tmp_path, f"vllm.model_executor.{module}")
        text = path.read_text("utf-8")
        assert old in text
        path.unlink()
        path.write_text(text.replace(old, new), "utf-8")
    parse.cache_clear()
    said = compat.missing_symbols("0.99.1")
    assert said is not None
    assert "\n" not in said
    assert "tested with vLLM 0.32.0 and 0.33.0; 0.99.1 is installed" in said
    assert "vllm.model_executor.custom_op.op_registry_oot is missing" in said
    assert "BaseModelLoader.download_model takes no model_config" in said
    with monkeypatch.context() as patch:
        patch.setattr(launch.importlib.metadata, "version", lambda name: "0.99.1")
        with pytest.raises(ServeError, match="op_registry_oot is missing"):
            launch.check_symbols()
