"""The expert remap table: what became of every expert, shipped in the checkpoint.

``expert_remap.json`` is written by ``cut``, named with its SHA-256 in config.json's
``moe_prune`` block, and checked by the vLLM plugin before a weight is loaded.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from ..errors import RemapError
from ..files.json_file import parse_json
from ..files.regular import MIB, Kind, read_file
from ..recipes.numbers import MOST, repeated
from ..recipes.schema import Strict, first_problem

FILE_NAME = "expert_remap.json"
CONFIG_BLOCK = "moe_prune"
FORMAT_VERSION: Literal[1] = 1
Index = Annotated[int, Field(ge=0, lt=MOST, strict=True)]
# fail_fast: a hostile list gets one error, not one for each id.
Indices = Annotated[tuple[Index, ...], Field(fail_fast=True)]
REMAP = Kind(
    name="remap table",
    max_bytes=64 * MIB,
    error=RemapError,
    absent="missing; a pruned checkpoint cannot be used without it. Copy the whole "
    "folder again.",
    remedy="Copy the folder again, or repeat the cut.",
)


class RemapSource(Strict):
    """The checkpoint the very first cut started from."""

    name: str
    revision: str | None = None
    fingerprint: str


class RemapLayer(Strict):
    """One decoder layer of the pruned checkpoint, in its new order."""

    layer: Index
    """Index in the pruned checkpoint."""
    original_layer: Index
    moe: bool
    """False: no MoE sublayer (dense in the original, or dropped)."""
    moe_dropped: bool = False
    norm_kept: bool = False
    """The norm before a dropped MoE sublayer stayed, and the block adds its normed
    input to itself."""
    experts_before: Index
    kept: Indices
    """``kept[new] = original id``."""
    router_rows: Indices
    """The original expert each router row stands for (equals ``kept`` unless
    redirecting)."""
    redirect: Annotated[tuple[Index | None, ...], Field(fail_fast=True)] | None = None
    """For each router row the new expert that serves it; None: nothing serves it."""
    groups: Indices | None = None
    """For each router row its routing group in the original; None where the family's
    routers know no groups. Equal, contiguous groups are what stock routers assume."""
    clusters: Annotated[tuple[Indices, ...], Field(fail_fast=True)] | None = None
    """``clusters[new]``: the original experts that ``kept[new]`` stands for."""
    reconstructed: bool = False


class ExpertRemap(Strict):
    """The whole table."""

    format_version: Literal[1] = FORMAT_VERSION
    tool_version: str
    model_type: str
    source: RemapSource
    routing: Literal["drop", "redirect"]
    original_layers: Index
    dropped_blocks: Indices = ()
    layers: Annotated[tuple[RemapLayer, ...], Field(fail_fast=True)]
    original_mtp_layers: Index = 0
    mtp_layers: Annotated[tuple[RemapLayer, ...], Field(fail_fast=True)] = ()
    """Layers behind the last one that predict further tokens, in the same terms;
    their indices go on from those of ``layers``."""

    @property
    def all_layers(self) -> tuple[RemapLayer, ...]:
        """Decoder layers, then those that predict further tokens."""
        return self.layers + self.mtp_layers


def dump_remap(remap: ExpertRemap) -> bytes:
    """The exact bytes of ``expert_remap.json``; their SHA-256 goes into config.json."""
    return (json.dumps(remap.model_dump(mode="json"), indent=1) + "\n").encode()


def load_remap(folder: Path, config: dict[str, Any]) -> ExpertRemap | None:
    """The checked remap table of a checkpoint, or None if it was never pruned.

    Args:
        folder: The checkpoint folder.
        config: Its config.json.

    Raises:
        RemapError: The block, the file or its hash is missing or wrong, or the table
            contradicts itself.
    """
    block = config.get(CONFIG_BLOCK)
    if block is None:
        return None
    where = folder / "config.json"
    if not isinstance(block, dict) or not {"remap", "remap_sha256"} <= block.keys():
        raise RemapError(f"{where}: block {CONFIG_BLOCK!r} must name its remap table.")
    if block.get("format_version") != FORMAT_VERSION:
        raise RemapError(
            f"{where}: {CONFIG_BLOCK} format {block.get('format_version')!r} is not "
            f"{FORMAT_VERSION}; install the version of vllm-moe-prune that wrote it."
        )
    # A fixed name: config.json must not lead to a file elsewhere.
    if block["remap"] != FILE_NAME:
        raise RemapError(
            f"{where}: remap table is {block['remap']!r}, expected {FILE_NAME!r}."
        )
    path = folder / FILE_NAME
    data = read_file(path, REMAP)
    digest = hashlib.sha256(data).hexdigest()
    if digest != block["remap_sha256"]:
        raise RemapError(
            f"{path}: SHA-256 is {digest[:12]}..., config.json says "
            f"{str(block['remap_sha256'])[:12]}...; it was changed after the cut. "
            "Copy the folder again, or repeat the cut."
        )
    return parse_remap(data, path)


def parse_remap(data: bytes, where: Path) -> ExpertRemap:
    """Validate the table's bytes and its inner consistency."""
    try:
        remap = ExpertRemap.model_validate(parse_json(data))
    except ValidationError as error:
        raise RemapError(f"{where}: {first_problem(error)}") from error
    except ValueError as error:
        raise RemapError(f"{where}: not valid JSON: {error}. {REMAP.remedy}") from error
    # The default is for tables built here; a file must state its version.
    if "format_version" not in remap.model_fields_set:
        raise RemapError(f"{where}: format_version is missing.")
    for position, layer in enumerate(remap.all_layers):
        at = f"{where}: layer {position}"
        if layer.layer != position:
            raise RemapError(f"{at}: the table says layer {layer.layer}.")
        _check_layer(layer, remap.routing, at)
    return remap


def _check_layer(layer: RemapLayer, routing: str, at: str) -> None:
    if not layer.moe:
        if layer.kept or layer.router_rows or layer.redirect or layer.groups:
            raise RemapError(f"{at}: has no MoE sublayer but lists experts.")
        if layer.norm_kept and not layer.moe_dropped:
            raise RemapError(f"{at}: keeps the norm of a MoE that was not dropped.")
        return
    if layer.moe_dropped or layer.norm_kept:
        raise RemapError(f"{at}: has a MoE sublayer that the table calls dropped.")
    if not layer.kept:
        raise RemapError(f"{at}: keeps no expert.")
    for name, ids in (("kept", layer.kept), ("router_rows", layer.router_rows)):
        outside = sorted({expert for expert in ids if expert >= layer.experts_before})
        if outside:
            raise RemapError(
                f"{at}: {name} names experts {outside}, out of range for "
                f"{layer.experts_before} experts."
            )
        if twice := repeated(ids):
            raise RemapError(f"{at}: {name} names experts {twice} more than once.")
    if layer.clusters is not None:
        _check_clusters(layer, layer.clusters, at)
    if layer.groups is not None and len(layer.groups) != len(layer.router_rows):
        raise RemapError(
            f"{at}: groups must name one group for each of the "
            f"{len(layer.router_rows)} router rows."
        )
    if routing == "drop":
        if layer.redirect is not None or layer.router_rows != layer.kept:
            raise RemapError(f"{at}: routing is 'drop' but router rows are redirected.")
        return
    if layer.redirect is None or len(layer.redirect) != len(layer.router_rows):
        raise RemapError(
            f"{at}: redirect must name one expert for each of the "
            f"{len(layer.router_rows)} router rows."
        )
    # None is a row that nothing serves: no target to check.
    targets = {target for target in layer.redirect if target is not None}
    if outside := sorted(targets - set(range(len(layer.kept)))):
        raise RemapError(
            f"{at}: redirect names new experts {outside}, out of range for "
            f"{len(layer.kept)} kept experts."
        )


def _check_clusters(
    layer: RemapLayer, clusters: tuple[tuple[int, ...], ...], at: str
) -> None:
    if len(clusters) != len(layer.kept):
        raise RemapError(
            f"{at}: {len(clusters)} clusters for {len(layer.kept)} kept experts."
        )
    members = [expert for cluster in clusters for expert in cluster]
    if outside := sorted({each for each in members if each >= layer.experts_before}):
        raise RemapError(
            f"{at}: clusters name experts {outside}, out of range for "
            f"{layer.experts_before} experts."
        )
    if len(set(members)) < len(members):
        raise RemapError(f"{at}: clusters name an expert more than once.")
    for kept, cluster in zip(layer.kept, clusters, strict=True):
        if kept not in cluster:
            raise RemapError(f"{at}: expert {kept} is not in its cluster {cluster}.")


def check_against_shapes(
    entry: RemapLayer, *, experts: int, router_rows: int, where: str
) -> None:
    """Compare one layer of the table with what the weights actually hold.

    Raises:
        RemapError: Naming the experts that are missing or too many.
    """
    layer = entry.layer
    if experts != len(entry.kept):
        missing = list(range(experts, len(entry.kept)))
        problem = f"experts {missing} are missing" if missing else "there are too many"
        raise RemapError(
            f"{where}: layer {layer} has {experts} experts, the remap table lists "
            f"{len(entry.kept)}: {problem}."
        )
    if router_rows != len(entry.router_rows):
        raise RemapError(
            f"{where}: layer {layer} has {router_rows} router rows, the remap table "
            f"lists {len(entry.router_rows)}."
        )
