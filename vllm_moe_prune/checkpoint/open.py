"""A checkpoint seen through its family's table: layers, experts, sizes."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..archs.spec import Layout, MoeArch, RouterRule
from ..kernels.quantized import Form
from .block_fp8 import SUFFIX, ScaleBlocks
from .compressed import Storage
from .expert_tensors import ExpertTensors, Extra
from .file_state import FileState
from .fingerprint import fingerprint
from .gptq_awq import AutoForm
from .index import TensorInfo
from .layer import Layer
from .quantized_tensors import PartedTensor
from .remap import ExpertRemap
from .substitution import Substitution

__all__ = ["Checkpoint", "Layer", "Origin"]


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint came from, as recorded in plans and provenance."""

    name: str
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint; nothing but headers and routers has been read."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    origin: Origin
    arch: MoeArch
    layout: Layout
    layers: tuple[Layer, ...]
    """Decoder layers, then those that only predict further tokens (MTP)."""
    remap: ExpertRemap | None
    rule: RouterRule
    blocks: ScaleBlocks | None = None
    """Where weights are FP8: the blocks that share a scale."""
    storage: Storage | None = None
    """How expert weights are stored; None: dense. ``config`` and ``tensors`` are those
    of the dense form in either case."""
    form: Form | AutoForm | None = None
    """How weights are quantized; ``tensors`` are dense then too,
    and ``config`` says what the files do."""
    parts: dict[str, TensorInfo] = field(default_factory=dict)
    """What quantized weights are stored in, by name."""
    allow_links: bool = False
    """Whether files may be links that lead out of the folder."""
    experts: ExpertTensors = field(default_factory=ExpertTensors)
    """Which tensors are of which expert."""
    trust_code: bool = False
    """Whether its own code may tokenize, where no file says how."""
    substitution: Substitution | None = None
    """Where removed experts have vectors in their place; ``config`` and ``tensors`` are
    those of the compact form then."""
    foreign: bool = False
    """Whether another tool cut it; ``remap`` says what is known of that."""
    files: tuple[FileState, ...] = ()
    """Its files with sizes and times, as they were when it was opened."""

    @property
    def decoder_layers(self) -> list[Layer]:
        """The layers that every token goes through."""
        return [layer for layer in self.layers if not layer.mtp]

    @property
    def moe_layers(self) -> list[Layer]:
        """The layers that have experts."""
        return [layer for layer in self.layers if layer.has_moe]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the model; see ``checkpoint.fingerprint``."""
        routers = [self.layout.router.name(layer.index) for layer in self.moe_layers]
        stored = [self.stored(name) for name in sorted(self.stored_names)]
        return fingerprint(self.config, self.tensors, routers, stored)

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
        """Number of parameters of the whole model; scales are none."""
        return sum(
            info.numel for name, info in self.tensors.items() if not self.is_scale(name)
        )

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors in their dense form, headers not counted."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes that all tensors take in the files."""
        return sum(info.stored_bytes for info in self.tensors.values())

    def stored(self, name: str) -> TensorInfo:
        """A tensor as it is copied: a part of a quantized one, or the tensor itself."""
        return self.parts.get(name) or self.tensors[name]

    @property
    def stored_names(self) -> set[str]:
        """The names of all tensors that a cut copies or compares."""
        quantized = {
            name
            for name, info in self.tensors.items()
            if isinstance(info, PartedTensor)
        }
        return (self.tensors.keys() - quantized) | self.parts.keys()

    def is_scale(self, name: str) -> bool:
        """Whether there is a tensor of this name that holds the scales of another."""
        return names_scale(name, self.tensors, self.blocks is not None)

    def extras(self, layer: Layer) -> list[Extra]:
        """What every expert of a layer has beside its matrices."""
        return sorted(self.experts.extras.get(layer.index, {}))

    def expert_names(self, layer: Layer) -> list[str]:
        """Names of every expert tensor of a layer."""
        return [
            rule.name(layer.index, expert)
            for rule in self.layout.experts
            for expert in (range(layer.num_experts) if rule.per_expert else (None,))
        ]

    def layer_names(self, index: int | None) -> list[str]:
        """Names of every tensor of a layer (None: of no layer), in file order."""
        return self._names_by_layer.get(index, [])

    @cached_property
    def _names_by_layer(self) -> dict[int | None, list[str]]:
        """Sorted out once: a model has tens of thousands of names."""
        found: dict[int | None, list[str]] = {}
        for name in self.tensors:
            found.setdefault(self.arch.layer_of(name), []).append(name)
        return found


def names_scale(name: str, tensors: dict[str, TensorInfo], scaled: bool) -> bool:
    """Whether a tensor holds the scales of another; ``scaled``: of FP8 in blocks."""
    return (
        scaled
        and name.endswith(SUFFIX)
        and name in tensors
        # The suffix alone proves nothing: the weight must be there too.
        and name.removesuffix(SUFFIX) in tensors
    )
