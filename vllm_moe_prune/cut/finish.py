"""Everything of the output that is not weights: config, remap, provenance, card.

All of it is a function of input, plan and tool version, so that a resumed run writes
the same bytes; elapsed time and peak memory are reported by the command instead.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from ..calibrate.data import Tokens
from ..calibrate.stats import Stats
from ..calibrate.stats_file import save_stats
from ..calibrate.text import name_of
from ..checkpoint.open import Checkpoint
from ..checkpoint.remap import FILE_NAME, dump_remap
from ..checkpoint.writer import ShardPlan, index_json, index_needed
from ..decide.cut_plan import CutPlan, dump_plan
from ..errors import CheckpointError
from ..files.atomic import write_file
from ..files.json_file import read_json
from ..files.regular import MIB, Kind
from ..recipes.calibration import with_texts
from .achieved import Achieved, achieved
from .build_remap import build_remap
from .card import model_card
from .channels import write_channels
from .config import pruned_config
from .layer_record import LayerRecord, RefitRecord
from .output import STATS_FILE, copy_companions
from .renumbered_config import renumbered

PROVENANCE = Kind(
    name="provenance.json",
    max_bytes=64 * MIB,
    error=CheckpointError,
    absent="missing. A pruned checkpoint has one; copy the folder again.",
    remedy="Copy the folder again, or repeat the cut.",
)
REFIT = TypeAdapter(RefitRecord)
QUANTIZE_FILES = ("quantize_config.json", "quant_config.json")
QUANTIZE_FILE = Kind(
    name="quantization config", max_bytes=16 * MIB, error=CheckpointError
)


def write_companions(
    checkpoint: Checkpoint,
    plan: CutPlan,
    folder: Path,
    shards: Sequence[ShardPlan],
    records: Sequence[LayerRecord],
    tokens: Tokens | None,
    stats: Stats | None,
    result: Achieved,
) -> None:
    """Complete a folder whose shards are all written; config.json comes last."""
    corrected = (
        *copy_companions(checkpoint, folder),
        *_renumber_copies(checkpoint, plan, folder),
    )
    plan = _without_paths(plan)
    remap = build_remap(checkpoint, plan)
    config = pruned_config(checkpoint, plan, remap)
    history = provenance(checkpoint, plan, result, tokens)
    if corrected:
        history["corrected_files"] = sorted(corrected)
    history["source_bytes"] = checkpoint.stored_bytes
    history["weight_powers"] = [_powers(record) for record in records]
    if plan.refits:
        history["refit"] = [
            {"layer": record.layer, **asdict(record.refit)}
            for record in records
            if record.refit is not None
        ]
    if stats is not None:
        path = folder / STATS_FILE
        path.parent.mkdir(exist_ok=True)
        save_stats(stats, path)
    write_channels(folder, records)
    if name := index_needed(shards):
        write_file(folder / name, index_json(shards, result.parameters_after))
    write_file(folder / FILE_NAME, dump_remap(remap))
    write_file(folder / "plan.json", dump_plan(plan).encode())
    # Defaults too: a later version may have others.
    recipe = plan.recipe.model_dump(mode="json")
    text = yaml.safe_dump(recipe, sort_keys=False)
    write_file(folder / "moe_prune.yaml", text.encode())
    _write_json(folder / "provenance.json", history)
    card = model_card(
        checkpoint,
        plan,
        result,
        config["architectures"][0],
        tensor_bytes=sum(sum(shard.sizes.values()) for shard in shards),
        calibration=history["calibration"] or plan.measurement.calibration,
    )
    write_file(folder / "README.md", card.encode())
    # A folder without config.json is taken for no checkpoint.
    _write_json(folder / "config.json", config)


def _renumber_copies(checkpoint: Checkpoint, plan: CutPlan, folder: Path) -> list[str]:
    """Rewrite the files in which GPTQ's and AWQ's tools repeat their block."""
    changed = []
    for name in QUANTIZE_FILES:
        path = folder / name
        if path.is_file():
            block = read_json(path, QUANTIZE_FILE)
            renamed = renumbered(checkpoint, plan, block)
            if renamed != block:
                _write_json(path, renamed)
                changed.append(name)
    return changed


def _without_paths(plan: CutPlan) -> CutPlan:
    """The plan with the names of calibration files for their paths, which are
    private."""
    asked = plan.recipe.calibration
    calibration = asked.model_copy(
        update={
            "source": with_texts(asked.source, name_of),
            "heldout_source": with_texts(asked.heldout_source, name_of),
        }
    )
    recipe = plan.recipe.model_copy(update={"calibration": calibration})
    return plan.model_copy(update={"recipe": recipe})


def provenance(
    checkpoint: Checkpoint,
    plan: CutPlan,
    result: Achieved,
    tokens: Tokens | None,
) -> dict[str, Any]:
    """Where the output came from and what was done to it."""
    data: dict[str, Any] = {
        "tool_version": plan.tool_version,
        "source": plan.model.model_dump(mode="json"),
        "recipe": plan.recipe.model_dump(mode="json"),
        "measurement": plan.measurement.model_dump(mode="json"),
        "calibration": tokens.describe() if tokens is not None else None,
        "forward_passes": {
            "measure": plan.measurement.forward_passes,
            "cut": plan.forward_passes,
        },
        "sparsity_asked": plan.recipe.total_sparsity,
        "sparsity_achieved": result.as_dict(),
    }
    if further := [layer for layer in checkpoint.layers if layer.mtp]:
        data["mtp_layers"] = {
            "before": len(further),
            "after": sum(
                plan.layers[layer.index].action != "drop-block" for layer in further
            ),
        }
    earlier = checkpoint.folder / "provenance.json"
    if checkpoint.remap is not None and earlier.is_file():
        # Nested, so that an output of several cuts tells of each.
        data["earlier"] = read_json(earlier, PROVENANCE)
    return data


def read_records(
    checkpoint: Checkpoint, plan: CutPlan, out: Path
) -> tuple[tuple[LayerRecord, ...], Achieved]:
    """What a finished cut did to each slimmed layer, and achieved.

    Raises:
        CheckpointError: Its provenance is damaged.
    """
    history = read_json(out / "provenance.json", PROVENANCE)
    try:
        # Shares in it are rounded, so only counts are read; achieved() divides again.
        counts = {
            layer["layer"]: layer for layer in history["sparsity_achieved"]["layers"]
        }
        refits = {
            fields["layer"]: REFIT.validate_python(
                {"ridge": fields["ridge"], "sources": fields["sources"]}
            )
            for fields in history.get("refit", [])
        }
        records = tuple(
            LayerRecord(
                layer=powers["layer"],
                zeros=counts[powers["layer"]]["zeros"],
                dense_zeros=counts[powers["layer"]]["dense_zeros"],
                unseen=counts[powers["layer"]]["unseen_experts"],
                trimmed_powers_5=powers["trimmed"],
                slimmed_powers_5=powers["slimmed"],
                refit=refits.get(powers["layer"]),
            )
            for powers in history["weight_powers"]
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{out / 'provenance.json'}: is damaged: {error!r}. Make the output again "
            "with --overwrite."
        ) from error
    return records, achieved(checkpoint, plan, records)


def _powers(record: LayerRecord) -> dict[str, Any]:
    """Sums behind the kurtosis of a slimmed layer, without digits that are noise."""
    return {
        "layer": record.layer,
        "trimmed": [float(f"{total:.9g}") for total in record.trimmed_powers_5],
        "slimmed": [float(f"{total:.9g}") for total in record.slimmed_powers_5],
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_file(path, (json.dumps(data, indent=2) + "\n").encode())
