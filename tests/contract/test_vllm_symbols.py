"""Everything of vLLM's that the plugin uses is where and what the plugin believes.

Read from sources, without importing vLLM: the installed one, and any others unpacked
at the paths in ``VLLM_SOURCES`` (folders that hold ``vllm/``, separated as in PATH).
"""

import ast
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.vllm_symbols import SYMBOLS, Symbol

PLUGIN = Path(__file__).parents[2] / "vllm_moe_prune" / "plugin"
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
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


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def file_of(root: Path, module: str) -> Path:
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those in ``if`` and ``try`` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from statements([*node.body, *node.orelse])


def names_set(node: ast.stmt) -> set[str]:
    """Plain names that a statement assigns."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    else:
        return set()
    return {target.id for target in targets if isinstance(target, ast.Name)}


def find(root: Path, module: str, name: str) -> ast.stmt | None:
    """What a module calls ``name``: its definition, followed through imports."""
    package = module.split(".")
    if file_of(root, module).name != "__init__.py":
        package = package[:-1]
    for node in statements(parse(file_of(root, module)).body):
        if isinstance(node, Definition) and node.name == name:
            return node
        if name in names_set(node):
            return node
        if isinstance(node, ast.ImportFrom):
            up = len(package) - node.level + 1
            base = package[:up] if node.level else []
            target = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(root, target, alias.name)
                if alias.name == "*" and (found := find(root, target, name)):
                    return found
    return lazy(root, module, name)


def lazy(root: Path, module: str, name: str) -> ast.stmt | None:
    """An entry of ``MODULE_ATTRS``, the table behind ``from vllm import ...``."""
    for node in ast.walk(parse(file_of(root, module))):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and key.value == name
                    and isinstance(value, ast.Constant)
                ):
                    target, _, attribute = str(value.value).partition(":")
                    return find(root, module + target, attribute)
    return None


def member(owner: ast.ClassDef, name: str) -> ast.stmt | None:
    """A method, a class attribute, or whatever sets the attribute on construction."""
    for node in owner.body:
        if (isinstance(node, Definition) and node.name == name) or name in names_set(
            node
        ):
            return node
    made = attributes(owner, {"__init__", "__post_init__"})
    return owner if name in made else None


def attributes(owner: ast.ClassDef, methods: set[str] | None = None) -> set[str]:
    """Attributes of ``self`` that methods (None: all) assign."""
    return {
        name
        for node in owner.body
        if isinstance(node, ast.FunctionDef)
        and (methods is None or node.name in methods)
        for name in assigned(node, "self")
    }


def assigned(function: ast.FunctionDef, owner: str) -> set[str]:
    """Attributes of the variable ``owner`` that a function assigns."""
    return {
        part.attr
        for part in ast.walk(function)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == owner
    }


def resolve(root: Path, symbol: Symbol) -> ast.stmt | None:
    name, _, inner = symbol.name.partition(".")
    found = find(root, symbol.module, name)
    if not inner or not isinstance(found, ast.ClassDef):
        return None if inner else found
    return member(found, inner)


@on_every_source
@pytest.mark.parametrize("symbol", SYMBOLS, ids=lambda s: f"{s.module}:{s.name}")
def test_symbol_exists_with_the_parameters_we_pass(root: Path, symbol: Symbol) -> None:
    found = resolve(root, symbol)
    assert found is not None, f"{symbol.module} has no {symbol.name}"
    if symbol.parameters is None:
        return
    assert isinstance(found, ast.FunctionDef)
    plain = [*found.args.posonlyargs, *found.args.args]
    if "." in symbol.name:
        plain = plain[1:]
    keyword = found.args.kwonlyargs
    names = {argument.arg for argument in [*plain, *keyword]}
    assert set(symbol.parameters) <= names, "a parameter is gone or has a new name"
    optional = len(found.args.defaults)
    required = plain[: len(plain) - optional] if optional else plain
    required += [
        argument
        for argument, default in zip(keyword, found.args.kw_defaults, strict=True)
        if default is None
    ]
    new = {argument.arg for argument in required} - set(symbol.parameters)
    assert not new, f"has a new parameter without a default: {new}"


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
    assert plain <= used
