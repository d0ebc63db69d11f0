"""Modules that ``quantization_config`` names, matched as its readers match them.

| keys | an entry is | read so by |
|---|---|---|
| ``ignore``, ``targets`` | a name, a class, or ``re:`` and how names start | compressed-tensors, vLLM |
| ``modules_to_not_convert``, ``ignored_layers``, ``modules_to_convert`` | a pattern of how names start, or how they end | transformers |
| the same | a name; in AWQ's block a part of one | vLLM |
| ``modules_in_block_to_quantize`` | a part of names | vLLM |
| ``dynamic`` | ``+:``, ``-:`` or nothing, and a pattern of how names start | GPTQModel, vLLM |

``kv_cache_scheme`` names none. Everything that reads or rewrites such a block goes
through here.
"""  # noqa: E501

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import regex

from ..errors import CheckpointError

CONFIG_KEY = "quantization_config"
PATTERN = "re:"
"""What targets that are patterns begin with."""
SIGNS = ("+:", "-:")
"""What keys of ``dynamic`` may begin with; without one they are ``+:``."""
DYNAMIC, GROUPS = "dynamic", "config_groups"
SECONDS = 1.0
"""What all patterns of a checkpoint may take together, but for their instants."""
INSTANT = 0.001
"""What no pattern that people write takes for one name."""

Test = Callable[[str], bool]
Change = Callable[[Sequence[str], str], list[str]]
"""From the entries of a list, and the key that says how they are read, to entries."""


class Way(Enum):
    """How entries of a list are matched with names of modules."""

    TARGET = "compressed-tensors"
    SKIP = "transformers"
    PART = "part"
    RULE = "GPTQModel"


KEYS = {
    "ignore": Way.TARGET,
    "targets": Way.TARGET,
    "modules_to_not_convert": Way.SKIP,
    "ignored_layers": Way.SKIP,
    "modules_to_convert": Way.SKIP,
    "modules_in_block_to_quantize": Way.PART,
    DYNAMIC: Way.RULE,
}
SKIPPED = ("modules_to_not_convert", "ignored_layers")
UNNAMED = ("kv_cache_scheme",)
"""Keys below which nothing names a module."""


class Matcher:
    """Matches entries with names as the library does that defines the list.

    Patterns come from checkpoints, so those that take their time are refused.
    """

    def __init__(self, where: str) -> None:
        """``where`` is named in errors."""
        self._where = where
        self._left = SECONDS

    def test(self, entry: str, way: Way) -> Test:
        """Whether a name is meant by an entry.

        Raises:
            CheckpointError: The entry is a pattern that cannot be used; also later,
                where it takes too long.
        """
        if way is Way.PART:
            return lambda name: entry in name
        if way is Way.TARGET:
            if not entry.startswith(PATTERN):
                return lambda name: name == entry
            return self._starts(entry.removeprefix(PATTERN), entry)
        if way is Way.RULE:
            return self._starts(entry[2:] if entry[:2] in SIGNS else entry, entry)
        starts = self._starts(entry, entry)
        # Cheap, and false for most names: all that a plain entry meets has its words.
        plain = regex.fullmatch(r"[\w.]*", entry) is not None
        word = max(entry.split("."), key=len) if plain else ""
        return lambda name: name.endswith(entry) or (word in name and starts(name))

    def _starts(self, pattern: str, entry: str) -> Test:
        said = f"{self._where}: {CONFIG_KEY}: {entry[:100]!r}"
        try:
            compiled = regex.compile(pattern)
        except (regex.error, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{said} is not a pattern: {error}.") from error

        def test(name: str) -> bool:
            # This thread's CPU time: a busy machine makes no pattern slow.
            began = time.thread_time()
            try:
                # match anchors the start and not the end, as these readers do.
                found = compiled.match(name, timeout=SECONDS) is not None
            except TimeoutError:
                self._left, found = 0.0, False
            took = time.thread_time() - began
            self._left -= took if took > INSTANT else 0
            if self._left <= 0:
                raise CheckpointError(
                    f"{said} takes too long to match with {name[:100]!r}. Write it "
                    "more simply."
                )
            return found

        return test


def rewritten(block: Mapping[str, Any], change: Change, where: str) -> dict[str, Any]:
    """A copy of a block in which every list of modules has been changed.

    Args:
        block: The ``quantization_config``.
        change: Gets lists whole, of ``dynamic`` one key at a time.
        where: Named in errors.

    Raises:
        CheckpointError: A list holds something that is not a name.
    """
    found: dict[str, Any] = {}
    for key, value in block.items():
        if key in UNNAMED or value is None:
            found[key] = copy.deepcopy(value)
        elif key == DYNAMIC and isinstance(value, Mapping):
            found[key] = _rules(value, change)
        elif key in KEYS and key != DYNAMIC:
            found[key] = _list(value, key, change, f"{where}: {key}")
        elif key == GROUPS:
            # Each a scheme with targets, or targets alone under a scheme's name.
            found[key] = {
                name: _list(group, "targets", change, f"{where}: {name}")
                if isinstance(group, list)
                else rewritten(_object(group, f"{where}: {name}"), change, where)
                for name, group in _object(value, f"{where}: {key}").items()
            }
        elif isinstance(value, Mapping):
            found[key] = rewritten(value, change, where)
        elif isinstance(value, list):
            found[key] = [
                rewritten(each, change, where)
                if isinstance(each, Mapping)
                else copy.deepcopy(each)
                for each in value
            ]
        else:
            found[key] = value
    return found


def _object(value: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{at} is {value!r}, not an object.")
    return value


def _list(value: Any, key: str, change: Change, at: str) -> Any:
    """A list, or one of lists."""
    if not isinstance(value, list):
        raise CheckpointError(f"{at} is {value!r}, not a list of names.")
    if value and all(isinstance(each, list) for each in value):
        return [_list(each, key, change, at) for each in value]
    if wrong := [each for each in value if not isinstance(each, str)]:
        raise CheckpointError(f"{at} lists {wrong[0]!r}, which is not a name.")
    return change(value, key)


def _rules(rules: Mapping[str, Any], change: Change) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for rule, values in rules.items():
        for new in change([rule], DYNAMIC):
            # The first rule that meets a name counts.
            found.setdefault(new, copy.deepcopy(values))
    return found


class Claims:
    """What a block says of matrices: are they stored quantized?"""

    def __init__(self, block: Mapping[str, Any], where: str) -> None:
        """Read every list once.

        Raises:
            CheckpointError: See ``Matcher`` and ``rewritten``.
        """
        matcher = Matcher(where)
        self._method = block.get("quant_method")
        self._entries: dict[str, list[str]] = {}

        def note(entries: Sequence[str], key: str) -> list[str]:
            self._entries.setdefault(key, []).extend(entries)
            return list(entries)

        read = {key: block[key] for key in (*KEYS, GROUPS) if key in block}
        # It knows every place where a list may be, so here it only visits them.
        rewritten(read, note, where)
        self._names = {key: set(entries) for key, entries in self._entries.items()}
        self._tests = {
            key: [matcher.test(entry, KEYS[key]) for entry in entries]
            for key, entries in self._entries.items()
        }
        lists = (self._entries.get(key, ()) for key in SKIPPED)
        self._skipped = [entry for entries in lists for entry in entries]
        self._experts = {_container(entry) for entry in self._skipped}

    def agree(self, module: str, *, quantized: bool, expert: bool) -> bool:
        """Whether any reader takes a matrix for what it is.

        Args:
            module: Its name, without ``.weight``.
            quantized: How it is stored.
            expert: Whether it is of a routed expert.
        """
        if self._method == "compressed-tensors":
            return quantized in self._by_targets(module)
        if self._method == "gptq":
            return quantized in self._by_rules(module, expert=expert)
        if self._method == "awq":
            if not self._skipped and not expert:
                return True  # vLLM looks at what is stored
            named = any(entry in module for entry in self._skipped)
        else:
            named = any(module in self._names.get(key, ()) for key in SKIPPED)
        named |= expert and _container(module) in self._experts
        # vLLM's reading, or transformers': either is enough.
        return quantized is not named or quantized is not any(
            self._meets(key, module) for key in SKIPPED
        )

    def _by_targets(self, module: str) -> set[bool]:
        if self._meets("ignore", module):
            return {False}
        targets = self._names.get("targets", set())
        if "Linear" in targets or self._meets("targets", module):
            return {True}
        # Another class than Linear may be the matrix's, or not.
        return {True, False} if any(_is_class(name) for name in targets) else {False}

    def _by_rules(self, module: str, *, expert: bool) -> set[bool]:
        rules = zip(
            self._entries.get(DYNAMIC, ()), self._tests.get(DYNAMIC, ()), strict=True
        )
        for rule, test in rules:
            if test(module):
                # "-:" excludes modules; other rules only say how to quantize.
                return {not rule.startswith("-:")}
        if self._entries.get("modules_in_block_to_quantize"):
            return {self._meets("modules_in_block_to_quantize", module)}
        return {True} if expert else {True, False}

    def _meets(self, key: str, module: str) -> bool:
        if module in self._names.get(key, ()):
            return True
        return any(test(module) for test in self._tests.get(key, ()))


def _container(module: str) -> str:
    """The module that holds an expert's; vLLM asks of all experts at once."""
    before, found, _ = module.rpartition(".experts.")
    return f"{before}.experts" if found else ""


def _is_class(target: str) -> bool:
    return target[:1].isupper() and "." not in target
