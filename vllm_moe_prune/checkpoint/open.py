"""A checkpoint seen through its family's table: layers, experts, sizes.

Works on original checkpoints and on those this tool has already cut: the layer views
come from config.json's ``per_layer_config`` and the remap table.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..archs import find_arch
from ..archs.spec import Layout, MoeArch
from ..errors import CheckpointError, RemapError
from .compressed import CONFIG_KEY, Storage, dense_view
from .index import TensorInfo, fingerprint
from .remap import ExpertRemap, check_against_shapes, load_remap

FLOATS = ("BF16", "F16", "F32")
# Sizes that every family calls the same; where they are given, they must be sizes.
SIZES = (
    "max_position_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from, as recorded in plans and provenance."""

    name: str
    revision: str | None


@dataclass(frozen=True)
class Layer:
    """One decoder layer as the checkpoint holds it."""

    index: int
    num_experts: int
    """Experts with weights; 0 where there is no MoE sublayer."""
    top_k: int
    width: int
    has_moe: bool
    dropped: bool = False
    """The MoE sublayer and its norm were removed by an earlier cut."""
    redirect: tuple[int | None, ...] | None = None
    """Router row -> expert, where the router still has rows of removed experts."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; nothing but headers and routers has been read."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    origin: Origin
    arch: MoeArch
    layout: Layout
    layers: tuple[Layer, ...]
    remap: ExpertRemap | None
    storage: Storage | None = None
    """How expert weights are stored; None: dense. ``config`` and ``tensors`` are those
    of the dense form in either case."""

    @property
    def moe_layers(self) -> list[Layer]:
        """The layers that have experts."""
        return [layer for layer in self.layers if layer.has_moe]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model; see ``index.fingerprint``."""
        routers = [self.layout.router.name(layer.index) for layer in self.moe_layers]
        return fingerprint(self.config, self.tensors, routers)

    @cached_property
    def expert_parameters(self) -> int:
        """Number of parameters in all experts (routers not counted)."""
        return sum(
            self.tensors[name].numel
            for layer in self.moe_layers
            for name in self.expert_names(layer)
        )

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(info.numel for info in self.tensors.values())

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors in their dense form, headers not counted."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes that all tensors take in the files."""
        return sum(info.stored_bytes for info in self.tensors.values())

    def expert_names(self, layer: Layer) -> list[str]:
        """Names of every expert tensor of a layer."""
        return [
            rule.name(layer.index, expert)
            for rule in self.layout.experts
            for expert in (range(layer.num_experts) if rule.per_expert else (None,))
        ]

    def layer_names(self, index: int) -> list[str]:
        """Names of every tensor of a decoder layer, in file order."""
        return [name for name in self.tensors if self.arch.layer_of(name) == index]


def build_checkpoint(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    origin: Origin,
) -> Checkpoint:
    """Check config and tensor names against the family's table.

    Raises:
        CheckpointError: Naming the config key, tensor or expert that is wrong.
    """
    where = folder / "config.json"
    arch = find_arch(config.get("model_type"), str(where))
    config, tensors, storage = dense_view(config, tensors, arch, str(where))
    if (method := config.get(CONFIG_KEY)) is not None:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise CheckpointError(
            f"{where}: the checkpoint is quantised ({name}); only bf16, fp16 and fp32 "
            "weights can be pruned. Start from the unquantised checkpoint."
        )
    for key in ("layers", "hidden", "top_k", "experts", "width"):
        _positive(config, getattr(arch.config, key), where)
    for key in SIZES:
        if config.get(key) is not None:
            _positive(config, key, where)
    if not isinstance(config.get("architectures", []), list):
        raise CheckpointError(f"{where}: architectures is not a list.")
    remap = load_remap(folder, config)
    if remap is not None and remap.model_type != arch.model_type:
        raise RemapError(
            f"{folder}: the remap table is for model_type {remap.model_type!r}, "
            f"config.json says {arch.model_type!r}."
        )
    count = config[arch.config.layers]
    if count > len(tensors):
        raise CheckpointError(
            f"{where}: {arch.config.layers} is {count}, but the checkpoint has only "
            f"{len(tensors)} tensors."
        )
    _check_numbers(arch, tensors)
    _check_lists(config, arch, count, where)
    views = _layer_views(config, count, where)
    layout = _find_layout(arch, tensors, count, folder)
    held = _held_experts(layout, tensors, folder)
    layers = tuple(
        _build_layer(arch, layout, index, view, tensors, held, remap, folder)
        for index, view in enumerate(views)
    )
    if not any(layer.has_moe for layer in layers):
        raise CheckpointError(f"{folder}: no layer has experts; nothing to prune.")
    if remap is not None and len(remap.layers) != count:
        raise CheckpointError(
            f"{folder}: the remap table has {len(remap.layers)} layers, "
            f"config.json {count}."
        )
    beyond = {
        index
        for name in tensors
        if (index := arch.layer_of(name)) is not None and index >= count
    }
    if beyond:
        raise CheckpointError(
            f"{folder}: tensors of layer {min(beyond)} found, but config.json says "
            f"{arch.config.layers} is {count}."
        )
    return Checkpoint(
        folder, config, tensors, origin, arch, layout, layers, remap, storage
    )


def _positive(config: dict[str, Any], key: str, where: Path, least: int = 1) -> int:
    value = config.get(key)
    if key not in config:
        raise CheckpointError(f"{where}: key {key!r} is missing.")
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CheckpointError(
            f"{where}: {key} is {value!r}; expected a whole number of at least {least}."
        )
    return value


def _check_numbers(arch: MoeArch, tensors: dict[str, TensorInfo]) -> None:
    """Refuse names whose numbers only some readers would take for a layer or expert."""
    start, _, _ = arch.layer_prefix.partition("{layer}")
    for name, info in tensors.items():
        if name.startswith(start):
            for part in name.split("."):
                if part.isdecimal() and not _is_plain(part):
                    raise CheckpointError(
                        f"{info.file}: {name[:100]!r}: {part[:20]!r} is not a number "
                        "of a layer or expert."
                    )


def _is_plain(number: str) -> bool:
    """Whether a number is spelt as we would, and short enough to be converted."""
    return len(number) < 10 and number == str(int(number))


def _check_lists(
    config: dict[str, Any], arch: MoeArch, count: int, where: Path
) -> None:
    for key in arch.per_layer_lists:
        values = config.get(key)
        if isinstance(values, list) and len(values) != count:
            raise CheckpointError(
                f"{where}: {key} lists {len(values)} layers, but {arch.config.layers} "
                f"is {count}."
            )


def _layer_views(
    config: dict[str, Any], count: int, where: Path
) -> list[dict[str, Any]]:
    overrides = config.get("per_layer_config")
    if overrides is None:
        overrides = {}
    if not isinstance(overrides, dict):
        raise CheckpointError(f"{where}: per_layer_config is not an object.")
    views = [config] * count
    for key, values in overrides.items():
        if (
            not key.isdecimal()
            or not _is_plain(key)
            or int(key) >= count
            or not isinstance(values, dict)
        ):
            raise CheckpointError(
                f"{where}: per_layer_config[{key!r}] does not describe one of the "
                f"layers 0 to {count - 1}."
            )
        views[int(key)] = config | values
    return views


def _find_layout(
    arch: MoeArch, tensors: dict[str, TensorInfo], count: int, folder: Path
) -> Layout:
    for layout in arch.layouts:
        for index in range(count):
            names = [layout.router.name(index)]
            names += [rule.name(index, 0) for rule in layout.experts]
            if all(name in tensors for name in names):
                return layout
    tried = ", ".join(layout.name for layout in arch.layouts)
    raise CheckpointError(
        f"{folder}: no router and experts found under the names of a "
        f"{arch.model_type} checkpoint (tried {tried})."
    )


def _held_experts(
    layout: Layout, tensors: dict[str, TensorInfo], folder: Path
) -> dict[tuple[int, str], set[int]]:
    """Expert ids per (layer, role) as the tensor names tell, for per-expert layouts."""
    held: dict[tuple[int, str], set[int]] = {}
    patterns = [(rule.role, rule.pattern) for rule in layout.experts if rule.per_expert]
    for name in tensors:
        for role, pattern in patterns:
            if match := pattern.match(name):
                key = int(match["layer"]), role
                held.setdefault(key, set()).add(int(match["expert"]))
    return held


def _build_layer(
    arch: MoeArch,
    layout: Layout,
    index: int,
    view: dict[str, Any],
    tensors: dict[str, TensorInfo],
    held: dict[tuple[int, str], set[int]],
    remap: ExpertRemap | None,
    folder: Path,
) -> Layer:
    where = folder / "config.json"
    entry = remap.layers[index] if remap and index < len(remap.layers) else None
    experts = _positive(view, arch.config.experts, where, least=0)
    top_k = _positive(view, arch.config.top_k, where)
    width = _positive(view, arch.config.width, where)
    if experts == 0:
        dropped = entry is not None and entry.moe_dropped
        return Layer(index, 0, top_k, width, has_moe=False, dropped=dropped)
    router = tensors.get(layout.router.name(index))
    if router is None:
        raise CheckpointError(
            f"{folder}: layer {index}: router {layout.router.name(index)!r} is missing."
        )
    rows = router.shape[0] if len(router.shape) == 2 else 0
    hidden = view[arch.config.hidden]
    if (
        len(router.shape) != 2
        or router.shape[1] != hidden
        or router.dtype not in FLOATS
    ):
        raise CheckpointError(
            f"{router.file}: {router.name}: {router.dtype} of shape "
            f"{list(router.shape)}, expected floats of shape [{experts}, {hidden}] "
            "(E D, from config.json)."
        )
    if experts > rows:
        raise CheckpointError(
            f"{router.file}: {router.name} has {rows} rows, but config.json says "
            f"{arch.config.experts} is {experts}."
        )
    for rule in layout.experts:
        if rule.per_expert:
            found = held.get((index, rule.role), set())
            if missing := sorted(set(range(experts)) - found):
                name = rule.name(index, missing[0])
                raise CheckpointError(
                    f"{folder}: layer {index}: config.json says {experts} experts, but "
                    f"{name!r} is missing ({len(missing)} such tensors)."
                )
            if extra := sorted(found - set(range(experts))):
                raise CheckpointError(
                    f"{folder}: layer {index}: expert {extra[0]} found, but "
                    f"config.json says {arch.config.experts} is {experts}."
                )
        _check_shapes(rule.axes, rule, index, experts, view, tensors, arch)
    if entry is not None and remap is not None:
        check_against_shapes(
            remap, index, experts=experts, router_rows=rows, where=str(folder)
        )
    elif rows != experts:
        raise CheckpointError(
            f"{router.file}: {router.name} has {rows} rows, but the layer has "
            f"{experts} experts."
        )
    if top_k > rows:
        raise CheckpointError(
            f"{where}: layer {index}: {arch.config.top_k} is {top_k}, but the router "
            f"has only {rows} rows."
        )
    redirect = entry.redirect if entry is not None else None
    return Layer(index, experts, top_k, width, has_moe=True, redirect=redirect)


def _check_shapes(
    axes: str,
    rule: Any,
    index: int,
    experts: int,
    view: dict[str, Any],
    tensors: dict[str, TensorInfo],
    arch: MoeArch,
) -> None:
    hidden, width = view[arch.config.hidden], view[arch.config.width]
    sizes = {"E": experts, "D": hidden, "F": width, "2F": 2 * width}
    expected = tuple(sizes[axis] for axis in axes.split())
    dtype = None
    for expert in range(experts) if rule.per_expert else (None,):
        name = rule.name(index, expert)
        info = tensors.get(name)
        if info is None:
            raise CheckpointError(f"layer {index}: {name!r} is missing.")
        if info.shape != expected or info.dtype not in FLOATS:
            raise CheckpointError(
                f"{info.file}: {name}: {info.dtype} of shape {list(info.shape)}, "
                f"expected {'/'.join(FLOATS)} of shape {list(expected)} "
                f"({axes}, from config.json)."
            )
        if info.dtype != (dtype := dtype or info.dtype):
            raise CheckpointError(
                f"{info.file}: {name} is {info.dtype}, the same matrix of expert 0 is "
                f"{dtype}."
            )
