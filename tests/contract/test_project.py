"""Rules of the code base that no other test would notice being broken."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import entry_points, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import moe_prune_gateway
import vllm_moe_prune
from vllm_moe_prune.recipes.loading import load_recipe, shipped_recipes

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vllm_moe_prune"
GATEWAY = ROOT / "serve" / "moe_prune_gateway"
MAX_LINES = 400

# Each unit (file or folder of the package) may import its own row and those below.
ROWS = (
    {"errors"},
    {"files"},
    {"progress", "ranks", "recipes"},
    {"archs", "checkpoint", "configs", "kernels"},
    {"calibrate", "cut", "decide", "recover", "report", "slim"},
    {"plugin", "publish", "stages", "tune"},
    {"judge", "pipeline"},
    {"cli"},
    {"__main__"},
)
# pathlib and friends; decide/cut_plan.py reads and writes plans and nothing else does.
FILE_MODULES = {
    *("fileinput", "glob", "io", "mmap", "os", "pathlib", "shutil", "tempfile"),
    *("datasets", "huggingface_hub", "safetensors"),
}
# vLLM imports these by name when it needs them; the others load with the plugin.
EAGER_PLUGIN = {"__init__.py", "compat.py"}


@dataclass(frozen=True)
class Import:
    """One import statement, its target as a dotted name."""

    target: str
    line: int
    at_top: bool

    @property
    def package(self) -> str:
        return self.target.split(".")[0]


def modules(package: Path = PACKAGE) -> list[Path]:
    return sorted(package.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[Import]:
    """All imports of a file, relative ones resolved, ``from`` ones with their name."""
    tree = tree_of(path)
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    root = GATEWAY.parent if path.is_relative_to(GATEWAY) else ROOT
    parents = path.relative_to(root).parts[:-1]
    for node in ast.walk(tree):
        at_top = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_top)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else ()
            start = ".".join((*base, *filter(None, [node.module])))
            for alias in node.names:
                yield Import(f"{start}.{alias.name}", node.lineno, at_top)


def own_imports(path: Path) -> Iterator[tuple[str, Import]]:
    """Imports of other units of this package, with the unit."""
    known = {unit_of(module) for module in modules()}
    for found in imports_of(path):
        parts = found.target.split(".")
        if parts[0] == PACKAGE.name and len(parts) > 1 and parts[1] in known:
            yield parts[1], found


def row_of(unit: str) -> int:
    for row, units in enumerate(ROWS):
        if unit in units:
            return row
    pytest.fail(f"{unit} is new: give it a place in ROWS of {name_of(Path(__file__))}")


def loaded_after(code: str, *names: str) -> set[str]:
    """Which of the named modules a fresh interpreter has loaded after some code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return set(names) & set(json.loads(result.stdout.splitlines()[-1]))


def test_units_import_only_their_own_row_and_those_below() -> None:
    wrong = [
        f"{name_of(path)}:{found.line}: {unit_of(path)} imports {unit}"
        for path in modules()
        if path != PACKAGE / "__init__.py"
        for unit, found in own_imports(path)
        if row_of(unit) > row_of(unit_of(path))
    ]
    assert not wrong, "\n".join(wrong)


def test_units_do_not_import_each_other_in_a_circle() -> None:
    needs: dict[str, set[str]] = {}
    for path in modules():
        others = {unit for unit, _ in own_imports(path)} - {unit_of(path)}
        needs.setdefault(unit_of(path), set()).update(others)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_decide_and_slim_open_no_files() -> None:
    wrong = []
    for path in modules():
        if unit_of(path) not in {"decide", "slim"} or path.name == "cut_plan.py":
            continue
        wrong += [
            f"{name_of(path)}:{found.line}: imports {found.target}"
            for found in imports_of(path)
            if found.package in FILE_MODULES
        ]
        wrong += [
            f"{name_of(path)}:{node.lineno}: calls open"
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "open"
        ]
    assert not wrong, "\n".join(wrong)


def test_only_the_plugin_imports_vllm() -> None:
    wrong = [
        f"{name_of(path)}:{found.line}"
        for path in modules()
        for found in imports_of(path)
        if found.package == "vllm"
        and (unit_of(path) != "plugin" or (found.at_top and path.name in EAGER_PLUGIN))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_gateway_needs_neither_the_other_package_nor_what_is_heavy() -> None:
    foreign = {PACKAGE.name, "vllm", "torch", "transformers", "numpy"}
    wrong = [
        f"{name_of(path)}:{found.line}: imports {found.target}"
        for path in modules(GATEWAY)
        for found in imports_of(path)
        if found.package in foreign
    ]
    assert not wrong, "\n".join(wrong)
    code = "import moe_prune_gateway.cli, moe_prune_gateway.run"
    assert not loaded_after(code, *foreign)


def test_the_gateway_declares_what_it_imports() -> None:
    names = {
        re.split(r"[<>=\[ ]", item)[0].replace("-", "_")
        for item in project(GATEWAY.parent)["dependencies"]
    }
    used = {found.package for path in modules(GATEWAY) for found in imports_of(path)}
    outside = used - set(sys.stdlib_module_names) - {GATEWAY.name, "starlette"}
    assert outside - names == set()


def test_only_command_and_pages_look_for_the_gateway() -> None:
    users = {
        name_of(path)
        for path in modules()
        for found in imports_of(path)
        if found.package == GATEWAY.name
    }
    assert users == {
        "vllm_moe_prune/cli/gateway.py",
        "vllm_moe_prune/plugin/watch/endpoint.py",
    }


MAKERS = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided"),
    *("eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint"),
    *("randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices"),
    *("triu_indices", "zeros"),
}


def test_kernels_and_plugin_say_where_tensors_are_made() -> None:
    """vLLM builds and loads under a default device; C++ needs the host's addresses."""
    wrong = [
        f"{name_of(path)}:{node.lineno}: torch.{node.func.attr} without a device"
        for path in modules()
        if unit_of(path) in {"kernels", "plugin"}
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in MAKERS
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]
    # A maker under another name would pass unseen.
    wrong += [
        f"{name_of(path)}:{found.line}: imports {found.target}"
        for path in modules()
        if unit_of(path) in {"kernels", "plugin"}
        for found in imports_of(path)
        if found.package == "torch" and found.target.split(".")[-1] in MAKERS
    ]
    assert not wrong, "\n".join(wrong)


def compares_versions(node: ast.AST) -> bool:
    """Whether a comparison looks at another package's version."""
    if not isinstance(node, ast.Compare):
        return False
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and part.attr == "__version__":
            return True
        if isinstance(part, ast.Call):
            function = part.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in {"version", "Version", "SpecifierSet"}:
                return True
    return False


def test_only_compat_compares_versions() -> None:
    wrong = []
    for path in modules():
        if path == PACKAGE / "plugin" / "compat.py":
            continue
        wrong += [
            f"{name_of(path)}:{found.line}: imports {found.target}"
            for found in imports_of(path)
            if found.package == "packaging"
        ]
        wrong += [
            f"{name_of(path)}:{node.lineno}: compares versions"
            for node in ast.walk(tree_of(path))
            if compares_versions(node)
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "import vllm_moe_prune",
        "import vllm_moe_prune.plugin",
        "import vllm_moe_prune.cli",
        "import sys\n"
        "from vllm_moe_prune.cli import main\n"
        "sys.argv = ['vllm-moe-prune', '--help']\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code, done.code",
    ],
    ids=["package", "plugin", "cli", "help"],
)
def test_starting_up_loads_nothing_heavy(code: str) -> None:
    assert not loaded_after(code, "torch", "transformers", "vllm", "scipy.stats")


def test_files_stay_readable() -> None:
    long = {
        name_of(path): count
        for path in [*modules(), *modules(GATEWAY)]
        if (count := len(path.read_text("utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_modules_say_what_they_are_for() -> None:
    silent = [
        name_of(path)
        for path in [*modules(), *modules(GATEWAY)]
        if tree_of(path).body and not ast.get_docstring(tree_of(path))
    ]
    assert not silent, f"no docstring: {silent}"


def project(folder: Path = ROOT) -> dict[str, Any]:
    with (folder / "pyproject.toml").open("rb") as file:
        found: dict[str, Any] = tomllib.load(file)["project"]
    return found


@pytest.mark.parametrize(
    ("name", "folder", "package"),
    [
        ("vllm-moe-prune", ROOT, vllm_moe_prune),
        ("moe-prune-gateway", GATEWAY.parent, moe_prune_gateway),
    ],
)
def test_versions_are_written_once(
    name: str, folder: Path, package: ModuleType
) -> None:
    ours = project(folder)["version"]
    literal = re.compile(rf"(?<![\w.]){re.escape(ours)}(?![\w.])")
    files = [
        *modules(),
        *modules(GATEWAY),
        *ROOT.glob("*.toml"),
        *GATEWAY.parent.glob("*.toml"),
        *(path for path in (ROOT / "docker").glob("*") if path.is_file()),
        ROOT / "Makefile",
    ]
    places = [path for path in files for _ in literal.findall(path.read_text("utf-8"))]
    both = {ROOT / "pyproject.toml", GATEWAY.parent / "pyproject.toml"}
    assert places.count(folder / "pyproject.toml") == 1
    assert set(places) <= both
    assert package.__version__ == version(name) == ours


def test_entry_points_lead_somewhere() -> None:
    (command,) = entry_points(group="console_scripts", name="vllm-moe-prune")
    (gateway,) = entry_points(group="console_scripts", name="moe-prune-gateway")
    assert callable(gateway.load())
    (plugin,) = entry_points(group="vllm.general_plugins", name="moe_prune")
    assert callable(command.load())
    (routes,) = entry_points(group="vllm.endpoint_plugins", name="moe_prune_api")
    assert callable(plugin.load())
    assert callable(routes.load())


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (GATEWAY / "py.typed").is_file()


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_named_after_their_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
