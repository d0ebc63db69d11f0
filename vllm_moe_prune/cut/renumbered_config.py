"""The ``quantization_config`` of an input, whose modules get other names in the output.

Layers and experts get new numbers, so every list of modules is rewritten: a module of
the output is named exactly if the one it comes from was. That is not left to spelling
but tried out on the names of all modules. An entry keeps its form with other numbers
where that means the same; else it becomes the list of what it named.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..checkpoint.module_names import (
    CONFIG_KEY,
    KEYS,
    PATTERN,
    SIGNS,
    Matcher,
    Way,
    rewritten,
)
from ..checkpoint.open import Checkpoint
from ..decide.cut_plan import CutPlan
from ..errors import PlanError
from .slice import output_tensors

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "w13": ("w1", "w3"),
}
"""Modules that vLLM makes of several, and asks for by these names."""
WRAPPERS = ("language_model.model.", "model.language_model.", "")
"""What stands before ``layers.`` in names that are another model's, of which this one
was a part."""
BEFORE = r"(?:^|(?<=[^0-9A-Za-z_]))"
# Dots may be escaped, as they are in patterns.
LAYER = re.compile(BEFORE + r"(layers\\?\.)(\d+)(?!\d)")
EXPERT = re.compile(BEFORE + r"(experts\\?\.)(\d+)(?!\d)")


def renumbered(
    checkpoint: Checkpoint, plan: CutPlan, block: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A block with the names that its modules have in the output.

    Args:
        checkpoint: The input.
        plan: What is cut from it.
        block: The block; None: that of config.json.

    Raises:
        CheckpointError: It lists what is no name or pattern.
        PlanError: No list of names means the same in the output.
    """
    if block is None:
        block = checkpoint.config[CONFIG_KEY]
    where = str(checkpoint.folder / "config.json")
    # vLLM's auto_awq.py skips modules by substring.
    in_part = block.get("quant_method") == "awq"
    renaming = _Renaming(checkpoint, plan, where, in_part=in_part)
    return rewritten(block, renaming.entries, where)


def module_pairs(checkpoint: Checkpoint, plan: CutPlan) -> dict[str, str]:
    """The modules of the output that readers ask about, and what each comes from."""
    pairs: dict[str, str] = {}
    children: dict[str, dict[str, str]] = {}
    for tensor in output_tensors(checkpoint, plan):
        out, source = (
            name.rpartition(".")[0]
            for name in (tensor.name, tensor.groups[0][0].source)
        )
        pairs[out] = source
        before, found, _ = out.partition(".experts.")
        if found:
            # vLLM asks once for all experts of a layer, by this name.
            pairs[f"{before}.experts"] = f"{source.partition(found)[0]}.experts"
        else:
            parent, _, child = out.rpartition(".")
            children.setdefault(parent, {})[child] = source
    for parent, each in children.items():
        for fused, parts in FUSED.items():
            if all(part in each for part in parts):
                source = each[parts[0]].rpartition(".")[0]
                pairs[f"{parent}.{fused}"] = f"{source}.{fused}"
    return pairs


@dataclass(frozen=True)
class _Names:
    """What modules are called before a cut and after it."""

    sources: tuple[str, ...]
    outs: tuple[str, ...]
    in_vllm: tuple[str, ...]
    """The latter as vLLM calls them."""

    @cached_property
    def out_of(self) -> dict[str, str]:
        return dict(zip(self.sources, self.outs, strict=True))

    @cached_property
    def sorted(self) -> tuple[list[str], list[str]]:
        """Sources and outs, each in their own order."""
        return sorted(self.sources), sorted(self.outs)

    def wrapped(self, start: str, prefix: str) -> "_Names":
        """The same below another prefix."""

        def wrap(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(prefix + name.removeprefix(start) for name in names)

        return _Names(wrap(self.sources), wrap(self.outs), wrap(self.outs))


class _Renaming:
    """From the entries of a list to those that name the same in the output."""

    def __init__(
        self, checkpoint: Checkpoint, plan: CutPlan, where: str, *, in_part: bool
    ) -> None:
        """``in_part``: whether vLLM looks for skipped modules in parts of names."""
        arch, self._where = checkpoint.arch, where
        self._matcher = Matcher(where)
        second = Way.PART if in_part else Way.TARGET
        self._readings = {way: (way,) for way in Way} | {Way.SKIP: (Way.SKIP, second)}
        pairs = module_pairs(checkpoint, plan)
        in_vllm = tuple(pairs)
        for old, new in arch.vllm_names:
            in_vllm = tuple(name.replace(old, new) for name in in_vllm)
        self._names = _Names(tuple(pairs.values()), tuple(pairs), in_vllm)
        # Modules that leave: entries may name them and then mean nothing any more.
        before = {name.rpartition(".")[0] for name in checkpoint.stored_names}
        self._gone = before - set(pairs.values())
        self._same = self._names.sources == self._names.outs and not self._gone
        self._start = arch.layer_prefix.partition("layers.")[0]
        left = [layer for layer in plan.layers if layer.action != "drop-block"]
        self._layers = {str(layer.layer): str(at) for at, layer in enumerate(left)}
        self._experts = {
            str(layer.layer): {str(old): str(at) for at, old in enumerate(layer.keep)}
            for layer in left
            if checkpoint.layers[layer.layer].has_moe
        }

    def entries(self, entries: Sequence[str], key: str) -> list[str]:
        """The entries of a list, or one key of ``dynamic``, in the output."""
        # Nothing moved or left, so not even odd entries need an interpretation.
        if self._same:
            return list(entries)
        found = [new for entry in entries for new in self._entry(entry, KEYS[key])]
        return list(dict.fromkeys(found))

    def _entry(self, entry: str, way: Way) -> list[str]:
        if not _is_pattern(entry, way) and self._is_alone(entry, way):
            out = self._names.out_of.get(entry)
            return [] if out is None else [out]
        names, readings = self._spelled(entry, way), self._readings[way]
        wanted = [self._met([entry], names.sources, each) for each in readings]
        # Numbers changed if that means the same, else untouched, else spelled out.
        for candidate in (*self._by_numbers(entry), [entry]):
            if all(
                self._met(candidate, names.outs, each) == named
                for each, named in zip(readings, wanted, strict=True)
            ) and self._in_vllm(candidate, way, names, wanted[0]):
                return candidate
        if way is Way.RULE:
            return _as_rule(entry, names, wanted[0])
        return self._listed(entry, names, wanted, readings)

    def _is_alone(self, entry: str, way: Way) -> bool:
        """Whether it is a module's name, and readers would take it for no other's."""
        out = self._names.out_of.get(entry)
        if out is None and entry not in self._gone:
            return False
        # Readers by start of name would take it for every longer name too.
        sources, outs = self._names.sorted
        return way is Way.TARGET or (
            _starting(entry, sources) <= {entry}
            and (out is None or _starting(out, outs) == {out})
        )

    def _spelled(self, entry: str, way: Way) -> _Names:
        """Names as a pattern has them: perhaps as parts of another model."""
        plain = re.fullmatch(r"[\w.]*", entry) is not None
        if plain or any(self._met([entry], self._names.sources, way)):
            return self._names
        told = entry.partition("layers")[0].removeprefix(PATTERN).replace("\\", "")
        for prefix in (told.lstrip("^.*+-:"), *WRAPPERS):
            names = self._names.wrapped(self._start, prefix)
            if any(self._met([entry], names.sources, way)):
                return names
        return self._names

    def _by_numbers(self, entry: str) -> Iterator[list[str]]:
        """The entry with the numbers of the output, if it has numbers; [] if gone."""
        maps, layer, at = list(self._experts.values()), LAYER.search(entry), 0
        if layer is not None:
            old, at = layer[2], layer.start(2)
            if old not in self._layers:
                yield []
                return
            entry = entry[:at] + self._layers[old] + entry[layer.end(2) :]
            maps = [self._experts[old]] if old in self._experts else []
        expert = EXPERT.search(entry, at)
        if expert is not None and maps:
            # Without a layer the expert is meant in every one.
            found = {each.get(expert[2]) for each in maps}
            number = found.pop()
            if found:  # layers disagree
                return
            if number is None:
                yield []
                return
            entry = entry[: expert.start(2)] + number + entry[expert.end(2) :]
        yield [entry]

    def _met(
        self, entries: Sequence[str], names: Sequence[str], way: Way
    ) -> list[bool]:
        tests = [self._matcher.test(entry, way) for entry in entries]
        return [any(test(name) for test in tests) for name in names]

    def _in_vllm(
        self, candidate: Sequence[str], way: Way, names: _Names, wanted: list[bool]
    ) -> bool:
        """Whether vLLM understands it: it translates names, but no patterns."""
        patterns = [one for one in candidate if _is_pattern(one, way)]
        if not patterns or names.in_vllm == names.outs or not any(wanted):
            return True
        return self._met(patterns, names.in_vllm, way) == wanted

    def _listed(
        self,
        entry: str,
        names: _Names,
        wanted: Sequence[list[bool]],
        readings: Sequence[Way],
    ) -> list[str]:
        """What an entry names, one by one."""
        by_all, patterns, parts = [], [], []
        for out, *named in zip(names.outs, *wanted, strict=True):
            if all(named):
                by_all.append(out)
            elif named[0]:
                patterns.append(re.escape(out))
            elif any(named):
                # By a part of its name alone: neither its start nor its end.
                parts.append(out.partition(".")[2][:-1])
        if patterns:
            by_all.append(f"(?:{'|'.join(patterns)})$")
        for each, named in zip(readings, wanted, strict=True):
            if self._met([*by_all, *parts], names.outs, each) != named:
                raise PlanError(
                    f"{self._where}: {CONFIG_KEY}: what {entry[:100]!r} names cannot "
                    "be said of what the plan leaves. Name the modules one by one."
                )
        if readings == (Way.TARGET,):
            # Not all that vLLM calls differently does it translate.
            named_in_vllm = zip(names.in_vllm, wanted[0], strict=True)
            by_all += [name for name, is_named in named_in_vllm if is_named]
        return list(dict.fromkeys([*by_all, *parts]))


def _as_rule(entry: str, names: _Names, named: list[bool]) -> list[str]:
    """A key of ``dynamic`` that meets exactly what another met, in vLLM too."""
    outs = zip(names.outs, names.in_vllm, named, strict=True)
    met = dict.fromkeys(name for *both, is_met in outs if is_met for name in both)
    # Of GPTQ's dynamic: '-:' leaves modules dense, '+:' overrides their settings.
    sign = entry[:2] if entry[:2] in SIGNS else ""
    return [f"{sign}(?:{'|'.join(map(re.escape, met))})$"] if met else []


def _is_pattern(entry: str, way: Way) -> bool:
    return way is Way.RULE or (way is Way.TARGET and entry.startswith(PATTERN))


def _starting(start: str, names: Sequence[str]) -> set[str]:
    """Those of sorted names that start so."""
    found = set()
    # In sorted order names of one start are neighbors.
    for at in range(bisect_left(names, start), len(names)):
        if not names[at].startswith(start):
            break
        found.add(names[at])
    return found
