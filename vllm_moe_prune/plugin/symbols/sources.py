"""Is everything of vLLM's that the plugin uses where and what the plugin believes?

Read from sources: a module that has moved cannot be imported, and importing all of them
would take each process of a server seconds.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .symbol import Symbol

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def parse(path: Path) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(path.read_text("utf-8"))


def file_of(root: Path, module: str) -> Path:
    """Where a module is; the file may not exist."""
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
    path = file_of(root, module)
    if not path.is_file():
        return None
    for node in statements(parse(path).body):
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
    """The definition of a symbol below ``root``; None: it is not there."""
    name, _, inner = symbol.name.partition(".")
    found = find(root, symbol.module, name)
    if not inner or not isinstance(found, ast.ClassDef):
        return None if inner else found
    return member(found, inner)


def problem(root: Path, symbol: Symbol) -> str | None:
    """What is not as the plugin believes, in words; None: nothing.

    Args:
        root: The folder that holds ``vllm/``.
        symbol: What is looked for.
    """
    found = resolve(root, symbol)
    where = f"{symbol.module}.{symbol.name}"
    if found is None:
        return f"{where} is missing"
    if symbol.parameters is None:
        return None
    if not isinstance(found, ast.FunctionDef):
        return f"{where} is no function"
    plain = [*found.args.posonlyargs, *found.args.args]
    if "." in symbol.name:
        plain = plain[1:]
    keyword = found.args.kwonlyargs
    names = {argument.arg for argument in [*plain, *keyword]}
    if gone := sorted(set(symbol.parameters) - names):
        return f"{where} takes no {', '.join(gone)}"
    optional = len(found.args.defaults)
    required = plain[: len(plain) - optional] if optional else plain
    required += [
        argument
        for argument, default in zip(keyword, found.args.kw_defaults, strict=True)
        if default is None
    ]
    if new := sorted({argument.arg for argument in required} - {*symbol.parameters}):
        return f"{where} needs {', '.join(new)}"
    return None
