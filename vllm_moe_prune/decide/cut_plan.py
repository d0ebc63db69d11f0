"""The plan: every decision as data, made by ``decide`` and executed by ``cut``.

Indices are those of the *input* checkpoint. A plan is meant to be read, diffed and
edited by hand, so everything about it is checked again before it is executed.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field, JsonValue, ValidationError, field_validator

from ..checkpoint.layer_hashes import WeightHashes
from ..errors import PlanError
from ..files.atomic import REPEAT, write_file, writing
from ..files.json_file import read_json
from ..files.regular import MIB, Kind
from ..recipes.calibration import SourceName
from ..recipes.numbers import Count, Fraction, Fractions, Index, Indices
from ..recipes.old_spelling import current_spelling
from ..recipes.schema import (
    NEEDS_ACTIVATIONS,
    NarrowStage,
    Part,
    QuantizeStage,
    Recipe,
    SlimMethod,
    Spelling,
    Strict,
    first_problem,
    parse_pattern,
)

FORMAT_VERSION: Literal[1] = 1
PLAN = Kind(
    name="plan file",
    max_bytes=64 * MIB,
    error=PlanError,
    absent="no such plan file.",
    remedy="Make it again with `vllm-moe-prune plan`.",
)
Action = Literal["keep", "drop-moe", "drop-moe-keep-norm", "drop-block"]
"""What leaves: nothing whole; the MoE sublayer (shared experts included) with the norm
before it; the MoE alone, so that the block adds its normed input; the whole block."""


class LayerShape(Protocol):
    """What a plan needs to know of one layer of the checkpoint it is for."""

    @property
    def num_experts(self) -> int: ...

    @property
    def top_k(self) -> int: ...

    @property
    def width(self) -> int | None: ...

    @property
    def has_moe(self) -> bool: ...

    @property
    def groups(self) -> tuple[int, ...] | None: ...

    @property
    def group_floor(self) -> int: ...

    @property
    def mtp(self) -> bool: ...


class ModelId(Strict):
    """Which checkpoint a plan was made for."""

    model_type: str
    fingerprint: str
    source: str
    revision: str | None = None


class Measurement(Strict):
    """Where the statistics behind a plan came from."""

    forward_passes: Count = 0
    calibration: dict[str, JsonValue] = Field(default_factory=dict)
    """Source, SHA-256 of the token ids, samples, sequence length, seed."""
    blend: dict[SourceName, Fraction] = Field(default={})
    """Shares of the named sources in the statistics, where they were weighed anew."""
    coverage: dict[SourceName, Fraction] = Field(default={})
    """For each named source the share of what its experts gave (norms of outputs times
    router weights, the mean over layers) that the kept experts gave."""


class LayerPlan(Strict):
    """What happens to one decoder layer of the input."""

    layer: Index
    action: Action = "keep"
    experts: Index
    """Experts in the input (0 for a dense layer or one whose MoE is gone)."""
    keep: Indices
    """Surviving experts as input ids, in their new order."""
    # fail_fast: a hostile plan with millions of wrong items costs one error.
    clusters: Annotated[tuple[Indices, ...], Field(fail_fast=True)] | None = None
    """``clusters[new]`` are the input experts that ``keep[new]`` stands for."""
    unserved: Indices = ()
    """Removed experts whose router rows stay though nobody serves them: what they are
    chosen for is lost. Only with routing redirect; they are in no cluster."""
    reconstruct: bool = False
    """Replace each survivor and its router row by the mean of its cluster."""
    merge_weights: Annotated[tuple[Fractions, ...], Field(fail_fast=True)] | None = None
    """With ``reconstruct``: weights of that mean, as ``clusters`` lists the members;
    they add up to 1 in each cluster. Absent: a plain mean."""
    width: Annotated[Index, Field(ge=1)] | None = None
    """Channels that each survivor keeps; None: all of them."""
    refit: bool = False
    """Refit the down projections of its survivors to the original's hidden states, by
    a ridge that calibration chooses; unless a calibration source would get worse."""
    sparsity: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of zeros to write into each matrix that is slimmed: the layer's surviving
    experts and the other matrices in ``CutPlan.slim_parts``."""

    @property
    def narrows(self) -> bool:
        """Whether experts lose channels."""
        return self.width is not None

    @property
    def drops_moe(self) -> bool:
        """Whether the MoE sublayer leaves and the block stays."""
        return self.action in ("drop-moe", "drop-moe-keep-norm")


class Predicted(Strict):
    """What the output will be, to the byte."""

    tensor_bytes: Count
    """As stored; of ``storage: bitmask`` an upper bound, since weights that are zero
    already are not counted."""
    file_bytes: Count
    """The same with the headers of all files."""
    shards: Count
    expert_parameters: Count
    parameters: Count
    zeros: Count
    """Weights that will be zeroed in what survives."""
    expert_sparsity: Fraction
    """Removed or zeroed expert parameters over expert parameters before."""
    total_sparsity: Fraction
    """Removed or zeroed parameters over all parameters before."""


class CutPlan(Strict):
    """Every decision about one checkpoint."""

    format_version: Literal[1] = FORMAT_VERSION
    tool_version: str
    model: ModelId
    recipe: Recipe
    routing: Literal["drop", "redirect"] = "drop"
    spelling: Spelling = "moe-prune"
    """For whom layers that differ are written: ``stock-vllm`` writes them as expert
    substitution, so that routing drop keeps rows that are never chosen."""
    constants: Literal["zeros", "means"] = "zeros"
    """What unserved experts give there: nothing, or the mean of their outputs."""
    slim: SlimMethod = "none"
    pattern: str = "unstructured"
    """Or ``n:m``: zeros are counted in groups of m neighbors of a row, by each layer's
    own sparsity (with OWL some layers have fewer than m - n of them, some more)."""
    slim_parts: tuple[Part, ...] = ("experts",)
    slim_exclude: tuple[str, ...] = ()
    """Matrices whose name below the layer's prefix contains one of these stay dense."""
    router_weighted: bool = False
    """Wanda's input norms are of inputs times routing weights."""
    compensate: bool = False
    """Down projections make up for zeros in gate and up."""
    quantize: QuantizeStage = QuantizeStage()
    """How the experts that survive, and what else is in its scope, are quantized."""
    narrow: NarrowStage = NarrowStage()
    """How channels are chosen where ``width`` of a layer says that some leave."""
    measurement: Measurement = Measurement()
    weight_hashes: WeightHashes = Field(default={})
    """What the layers were when they were measured; a cut compares what it reads."""
    threshold: float | None = None
    """Merge height up to which clusters were formed (STUN's t), or score up to which
    experts were dropped, if one holds for the whole model."""
    super_experts: dict[Index, Indices] = Field(default={})
    """Layer -> experts that make the massive activations, where ``experts.protect``
    asked for them."""
    layers: Annotated[tuple[LayerPlan, ...], Field(fail_fast=True)]
    predicted: Predicted | None = None

    @property
    def routing_text(self) -> str:
        """What becomes of rows of removed experts, in words."""
        if self.spelling == "moe-prune":
            return self.routing
        if self.routing == "drop":
            return "drop, for stock vLLM: rows that are never chosen"
        return f"rows stay and give {self.constants}, for stock vLLM"

    @property
    def super_text(self) -> str:
        """The super-experts in words."""
        found = (
            f"layer {layer}: {', '.join(map(str, experts))}"
            for layer, experts in self.super_experts.items()
        )
        return "; ".join(found) or "none found"

    @property
    def is_slimmed(self) -> bool:
        """Whether any weight will be zeroed."""
        return self.slim != "none" and any(
            layer.action != "drop-block" and layer.sparsity > 0 for layer in self.layers
        )

    @property
    def changes_shared(self) -> bool:
        """Whether shared experts may be slimmed or quantized."""
        return self.slim_parts != ("experts",) or "shared" in self.quantize.scope

    @property
    def refits(self) -> bool:
        """Whether experts of any layer will be refitted."""
        return any(layer.refit for layer in self.layers)

    @property
    def unrefitted(self) -> "CutPlan":
        """The same without refits."""
        if not self.refits:
            return self
        layers = [layer.model_copy(update={"refit": False}) for layer in self.layers]
        return self.model_copy(update={"layers": tuple(layers)})

    @property
    def forward_passes(self) -> int:
        """Over the calibration text in a cut; refits take one more, of the original."""
        return self.refits + self.needs_activations

    @property
    def group(self) -> int | None:
        """The m of an n:m pattern."""
        found = parse_pattern(self.pattern)
        return None if found is None else found[1]

    @property
    def needs_activations(self) -> bool:
        """Whether executing the plan needs calibration activations."""
        return self.changes_by_data or self.refits

    @property
    def changes_by_data(self) -> bool:
        """Whether zeros, integers or narrowing do, which use every window of it."""
        return self.slims_by_data or self.quantize.needs_activations or self.is_narrowed

    @property
    def slims_by_data(self) -> bool:
        """Whether calibration activations say which weights become zero."""
        return self.slim in NEEDS_ACTIVATIONS and self.is_slimmed

    @property
    def by_data(self) -> str:
        """What needs the activations, for errors."""
        if self.quantize.needs_activations:
            return f"quantizes by {self.quantize.method}"
        if self.slims_by_data:
            return f"slims by {self.slim}"
        return "narrows experts" if self.is_narrowed else "refits experts"

    @property
    def is_narrowed(self) -> bool:
        """Whether experts of any layer lose channels."""
        return any(layer.narrows for layer in self.layers)

    @property
    def is_quantized(self) -> bool:
        """Whether executing the plan quantizes weights."""
        return self.quantize.method != "none"

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, pattern: str) -> str:
        parse_pattern(pattern)
        return pattern


def load_plan(path: Path) -> CutPlan:
    """Read and validate a plan file (structure only; see ``check_plan.py``)."""
    data = read_json(path, PLAN)
    found = data.get("format_version")
    # Before validation, which would blame the fields of another format.
    if found != FORMAT_VERSION:
        raise PlanError(
            f"{path}: plan format {found!r} is not {FORMAT_VERSION}. Install the "
            "version of vllm-moe-prune that wrote it, or plan again."
        )
    try:
        return CutPlan.model_validate(current_spelling(data, str(path)))
    except ValidationError as error:
        raise PlanError(f"{path}: {first_problem(error)}") from error


def save_plan(plan: CutPlan, path: Path) -> None:
    """Write a plan as indented JSON, atomically."""
    with writing(path, REPEAT):
        write_file(path, dump_plan(plan).encode())


def dump_plan(plan: CutPlan) -> str:
    """The plan as the text of plan.json."""
    return json.dumps(plan.model_dump(mode="json"), indent=1) + "\n"


def trimming(plan: CutPlan) -> str:
    """Identifies what stage 1 leaves: equal for plans that differ in zeros only."""
    # Outliers are counted before refits and zeros, which so play no part.
    unslimmed = {"sparsity": 0.0, "refit": False}
    left = [layer.model_copy(update=unslimmed) for layer in plan.layers]
    said = [plan.routing, *(layer.model_dump_json() for layer in left)]
    return hashlib.sha256("\n".join(said).encode()).hexdigest()
