"""YAML from strangers: plain values only, none of them a reference to another."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from .regular import Kind, read_file

MAX_DEPTH = 32
MAX_DIGITS = 64
"""Of a number, which YAML also spells in base 16 and 60."""


def parse_yaml(data: bytes | str) -> Any:
    """What a YAML text says.

    Raises:
        ValueError: It is none, or one that is refused; the message is one line.
    """
    loader: Any = _Loader
    try:
        return yaml.load(data, loader)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{at}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # A date that there is not, a number that is none: what its constructors let pass.
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise ValueError(f"a value that is none: {error}") from error


def read_yaml(path: Path, kind: Kind) -> Any:
    """What a YAML file says.

    Raises:
        MoePruneError: ``kind.error``: it cannot be read, or is not YAML.
    """
    data = read_file(path, kind)
    try:
        return parse_yaml(data)
    except ValueError as error:
        raise kind.error(f"{path}: not valid YAML: {error}. {kind.remedy}") from error


class _Loader(yaml.SafeLoader):
    """Safe, and without aliases: ten lines of them can stand for gigabytes."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _problem("aliases are not read; write it out", event.start_mark)
        if self.depth > MAX_DEPTH:
            raise _problem(f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        # Before int(), whose time grows with the square of the digits.
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > MAX_DIGITS:
            raise _problem(f"a number of {len(node.value)} digits", node.start_mark)
        return super().construct_scalar(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        # PyYAML would take the last of equal keys.
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            (twice, _), *_ = Counter(keys).most_common(1)
            raise _problem(f"{twice[:100]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _problem(said: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=said, problem_mark=mark)
