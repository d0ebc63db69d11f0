"""One decoder layer as config, remap table and tensor headers together describe it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..archs.spec import Layout, MoeArch, RouterRule, TensorRule
from ..errors import CheckpointError, RemapError
from .block_fp8 import DTYPE, ScaleBlocks
from .config_values import FLOATS, positive, whole
from .expert_tensors import ExpertTensors
from .index import TensorInfo
from .quantized_tensors import PartedTensor
from .remap import ExpertRemap, RemapLayer, check_against_shapes


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One decoder layer as the checkpoint holds it."""

    index: int
    num_experts: int
    """Experts with weights; 0 where there is no MoE sublayer."""
    top_k: int
    width: int
    """Channels of each of its experts."""
    has_moe: bool
    shared_width: int = 0
    """Channels of the experts that every token uses, as one MLP."""
    dense_width: int = 0
    """Channels of the MLP that stands where other layers have experts."""
    dropped: bool = False
    """The MoE sublayer was removed by an earlier cut."""
    norm_only: bool = False
    """The norm before it stayed: the block adds its normed input to itself."""
    redirect: tuple[int | None, ...] | None = None
    """Router row -> expert, where the router still has rows of removed experts."""
    groups: tuple[int, ...] | None = None
    """The routing group of each router row; None where all are one group."""
    group_floor: int = 1
    """Fewest experts of a group with which routing keeps its meaning."""
    mtp: bool = False
    """Behind the last layer of the model, predicting further tokens ahead."""


@dataclass(frozen=True, kw_only=True)
class LayerReader:
    """What building the layers of one checkpoint has in common."""

    folder: Path
    arch: MoeArch
    layout: Layout
    tensors: dict[str, TensorInfo]
    experts: ExpertTensors
    remap: ExpertRemap | None
    rule: RouterRule
    blocks: ScaleBlocks | None

    def build(
        self, index: int, view: dict[str, Any], *, dense: bool, mtp: bool
    ) -> Layer:
        """Check one layer; ``view`` is the config as it sees it.

        Raises:
            CheckpointError: Naming the key, tensor or expert that is wrong.
            RemapError: The remap table contradicts the tensors.
        """
        where = self.folder / "config.json"
        keys = self.arch.config
        entry = self._entry(index)
        # 0 is what a cut writes for a layer whose MoE sublayer it dropped.
        experts = positive(view, keys.experts, where, least=0)
        top_k = positive(view, keys.top_k, where)
        width = positive(view, keys.width, where)
        self._check_beside(index, view)
        shared_width, dense_width = self._beside(view)
        has_moe = experts > 0 and not dense
        if not has_moe:
            if dense:
                self._check_dense(index)
            self.experts.check(index, 0, keys.experts, str(self.folder))
            dropped = entry is not None and entry.moe_dropped
            norm_only = entry is not None and entry.norm_kept
            return Layer(
                index=index,
                num_experts=0,
                top_k=top_k,
                width=width,
                has_moe=False,
                shared_width=shared_width,
                dense_width=dense_width,
                dropped=dropped,
                norm_only=norm_only,
                mtp=mtp,
            )
        rows = self._check_router(index, view, experts)
        self._check_experts(index, view, experts)
        if entry is not None:
            check_against_shapes(
                entry, experts=experts, router_rows=rows, where=str(self.folder)
            )
        # Without a remap table nothing explains rows that no expert has.
        elif rows != experts:
            router = self.tensors[self.layout.router.name(index)]
            raise CheckpointError(
                f"{router.file}: {router.name} has {rows} rows, but the layer has "
                f"{experts} experts."
            )
        if top_k > rows:
            raise CheckpointError(
                f"{where}: layer {index}: {keys.top_k} is {top_k}, but the router "
                f"has only {rows} rows."
            )
        return Layer(
            index=index,
            num_experts=experts,
            top_k=top_k,
            width=width,
            has_moe=True,
            shared_width=shared_width,
            dense_width=dense_width,
            redirect=entry.redirect if entry is not None else None,
            groups=self._groups(index, rows, entry),
            group_floor=self.rule.group_floor(top_k) if self.rule.groups > 1 else 1,
            mtp=mtp,
        )

    def _entry(self, index: int) -> RemapLayer | None:
        if self.remap is None:
            return None
        entries = self.remap.all_layers
        return entries[index] if index < len(entries) else None

    def _beside(self, view: dict[str, Any]) -> tuple[int, int]:
        """How wide shared experts are, and the MLP of a layer without experts."""
        arch, where = self.arch, self.folder / "config.json"
        shared = dense = 0
        if arch.shared is not None:
            key = arch.shared_key
            shared = whole(key.read(view), key.name, where, least=0)
            if arch.shared_width is None:
                shared *= view[arch.config.width]
        if arch.dense_mlp is not None:
            dense = positive(view, arch.dense_width, where)
        return shared, dense

    def _check_beside(self, index: int, view: dict[str, Any]) -> None:
        """MLPs beside the experts that config.json does not know would be left out."""
        prefix, arch = self.arch.layer_prefix.format(layer=index), self.arch
        unknown = []
        if arch.shared is not None and not arch.shared_key.read(view):
            unknown.append((arch.shared, arch.shared_key))
        if arch.residual is not None and not arch.residual.present.read(view):
            unknown.append((arch.residual.mlp, arch.residual.present))
        for mlp, key in unknown:
            name = prefix + mlp.names[0]
            if name in self.tensors:
                raise CheckpointError(
                    f"{self.folder}: {name!r} is there, but config.json says "
                    f"{key.name} is {key.read(view)!r}."
                )

    def _check_dense(self, index: int) -> None:
        """A layer that config.json calls dense must not bring experts along."""
        for rule in self.layout.router_parts:
            if rule.name(index) in self.tensors:
                raise CheckpointError(
                    f"{self.folder}: layer {index} has no experts by config.json, but "
                    f"{rule.name(index)!r} is there."
                )

    def _check_router(self, index: int, view: dict[str, Any], experts: int) -> int:
        """The number of the router's rows."""
        hidden = view[self.arch.config.hidden]
        rows = None
        for rule in self.layout.router_parts:
            name = rule.name(index)
            info = self.tensors.get(name)
            if info is None:
                raise CheckpointError(
                    f"{self.folder}: layer {index}: router {name!r} is missing."
                )
            if isinstance(info, PartedTensor):
                raise CheckpointError(
                    f"{info.file}: {info.name}: the router is quantized, so its rows "
                    "cannot leave with their experts. Quantize again without it."
                )
            found = info.shape[0] if info.shape else 0
            rows = found if rows is None else rows
            sizes = {"E": rows, "D": hidden}
            expected = tuple(sizes[axis] for axis in rule.axes.split())
            if info.shape != expected or info.dtype not in FLOATS:
                raise CheckpointError(
                    f"{info.file}: {info.name}: {info.dtype} of shape "
                    f"{list(info.shape)}, expected floats of shape {list(expected)} "
                    f"({rule.axes}, from config.json)."
                )
            # More rows than experts are fine (redirect), fewer never.
            if experts > found:
                raise CheckpointError(
                    f"{info.file}: {info.name} has {found} rows, but config.json says "
                    f"{self.arch.config.experts} is {experts}."
                )
        return rows or 0

    def _check_experts(self, index: int, view: dict[str, Any], experts: int) -> None:
        key = self.arch.config.experts
        self.experts.check(index, experts, key, str(self.folder))
        for rule in self.layout.experts:
            if rule.per_expert:
                found = self.experts.held.get((index, rule.role), set())
                if missing := sorted(set(range(experts)) - found):
                    name = rule.name(index, missing[0])
                    raise CheckpointError(
                        f"{self.folder}: layer {index}: config.json says {experts} "
                        f"experts, but {name!r} is missing ({len(missing)} such "
                        "tensors)."
                    )
            self._check_shapes(rule, index, experts, view)

    def _check_shapes(
        self, rule: TensorRule, index: int, experts: int, view: dict[str, Any]
    ) -> None:
        keys = self.arch.config
        hidden, width = view[keys.hidden], view[keys.width]
        sizes = {"E": experts, "D": hidden, "F": width, "2F": 2 * width}
        expected = tuple(sizes[axis] for axis in rule.axes.split())
        allowed: tuple[str, ...] = FLOATS
        # Blocks with scales are of matrices, which packed experts are not.
        if self.blocks is not None and rule.per_expert:
            allowed = (*FLOATS, DTYPE)
        dtype = None
        for expert in range(experts) if rule.per_expert else (None,):
            name = rule.name(index, expert)
            info = self.tensors.get(name)
            if info is None:
                raise CheckpointError(f"layer {index}: {name!r} is missing.")
            if info.shape != expected or info.dtype not in allowed:
                raise CheckpointError(
                    f"{info.file}: {name}: {info.dtype} of shape {list(info.shape)}, "
                    f"expected {'/'.join(allowed)} of shape {list(expected)} "
                    f"({rule.axes}, from config.json)."
                )
            # The first expert decides: to compute, all are stacked in one tensor.
            if info.dtype != (dtype := dtype or info.dtype):
                raise CheckpointError(
                    f"{info.file}: {name} is {info.dtype}, the same matrix of expert 0 "
                    f"is {dtype}. Save the model again in one dtype: "
                    "model.to(torch.bfloat16).save_pretrained(FOLDER)."
                )

    def _groups(
        self, index: int, rows: int, entry: RemapLayer | None
    ) -> tuple[int, ...] | None:
        """The table's groups, or equal ones in order, as the family defines them."""
        count = self.rule.groups
        if count == 1:
            return None
        named = entry.groups if entry is not None else None
        # Only the remap table may make groups of unequal size.
        if count > rows or (named is None and rows % count):
            raise CheckpointError(
                f"{self.folder}: layer {index}: {rows} router rows do not divide into "
                f"{count} groups ({self.arch.router.groups.name} in config.json)."
            )
        if named is None:
            # Equal and contiguous: floor(row / (rows / count)) without fractions.
            return tuple(row * count // rows for row in range(rows))
        wrong = sorted(set(named) ^ set(range(count)))
        if wrong:
            raise RemapError(
                f"{self.folder}: layer {index}: the remap table must name each of "
                f"the {count} groups, and no other; see {wrong[0]}."
            )
        return named
