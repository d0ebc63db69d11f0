"""What each command prints when it is done, as tables or as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...checkpoint.open import Checkpoint
from ...progress import gib, peak_rss_bytes
from .draw import duration, facts, hint, print_json, table, warn

if TYPE_CHECKING:
    from ...calibrate.stats import Stats
    from ...cut.convert import Converted
    from ...cut.execute import CutResult
    from ...cut.verify import Verified
    from ...decide.cut_plan import CutPlan, LayerPlan


DENSE_ZEROS = (
    "zeros stored dense make no file or server smaller or faster; --storage bitmask "
    "leaves them out (faster on CPUs), --for any removes experts instead."
)


def note_dense_zeros(plan: "CutPlan", storage: str | None = None) -> None:
    """Say so where a plan writes zeros that save nothing."""
    if plan.is_slimmed and (storage or plan.recipe.storage) == "dense":
        warn(DENSE_ZEROS)


def show_checkpoint(checkpoint: Checkpoint, as_json: bool) -> None:
    """What ``inspect`` found."""
    moe = checkpoint.moe_layers
    counts = [layer.num_experts for layer in checkpoint.decoder_layers]
    further = [layer.num_experts for layer in checkpoint.layers if layer.mtp]
    dtypes = sorted({info.dtype for info in checkpoint.tensors.values()})
    files = len({info.file for info in checkpoint.tensors.values()})
    stored = "bitmask" if checkpoint.storage else "dense"
    data: dict[str, Any] = {
        "source": checkpoint.origin.name,
        "revision": checkpoint.origin.revision,
        "model_type": checkpoint.arch.model_type,
        "layout": checkpoint.layout.name,
        "layers": len(counts),
        "moe_layers": sum(count > 0 for count in counts),
        "experts_per_layer": counts,
        "experts_per_mtp_layer": further,
        "top_k": max(layer.top_k for layer in moe),
        "dtypes": dtypes,
        "files": files,
        "tensors": len(checkpoint.tensors),
        "tensor_bytes": checkpoint.tensor_bytes,
        "stored": checkpoint.form.bits if checkpoint.form else stored,
        "stored_bytes": checkpoint.stored_bytes,
        "parameters": checkpoint.parameters,
        "expert_parameters": checkpoint.expert_parameters,
        "pruned": checkpoint.remap is not None,
        "routing": checkpoint.remap.routing if checkpoint.remap else "drop",
    }
    if as_json:
        print_json(data)
        return
    share = checkpoint.expert_parameters / checkpoint.parameters
    held = [layer.num_experts for layer in moe]
    facts(
        str(checkpoint.folder),
        [
            ("family", f"{data['model_type']} ({data['layout']})"),
            ("layers", f"{data['layers']}, {data['moe_layers']} with experts"),
            *([("MTP layers", f"{len(further)}")] if further else []),
            ("experts", f"{experts_text(held)} per layer, top-{data['top_k']}"),
            *_groups(checkpoint),
            ("parameters", f"{checkpoint.parameters:,} ({share:.1%} in experts)"),
            ("size", f"{gib(checkpoint.stored_bytes)} in {files} files"),
            *_compression(checkpoint),
            ("dtypes", ", ".join(dtypes)),
            ("already pruned", "yes" if data["pruned"] else "no"),
        ],
    )
    if data["routing"] == "redirect":
        hint("Redirect routing: cut the original again instead of this one.")
        return
    hint(f"Next: vllm-moe-prune run {source_of(checkpoint)} OUT --calibration TEXT")


def _groups(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """How the routers choose among groups, if they do."""
    rule = checkpoint.rule
    if rule.groups == 1:
        return []
    return [("groups", f"{rule.groups}, top-{rule.top_groups}")]


def _compression(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """What storing experts without their zeros saves."""
    if checkpoint.form is not None:
        return [("quantized", checkpoint.form.words)]
    if checkpoint.storage is None:
        return []
    dense, stored = checkpoint.tensor_bytes, checkpoint.stored_bytes
    saved = f"{gib(dense - stored)} of {gib(dense)} ({1 - stored / dense:.1%})"
    return [("zeros not stored", f"saves {saved}")]


def experts_text(counts: Sequence[int]) -> str:
    """``8`` for uniform layers, ``5-8 (mean 6.4)`` for uneven ones."""
    if len(set(counts)) == 1:
        return str(counts[0])
    return f"{min(counts)}-{max(counts)} (mean {sum(counts) / len(counts):.1f})"


def source_of(checkpoint: Checkpoint) -> str:
    """How the next command names a checkpoint."""
    origin = checkpoint.origin
    # A Hub id as it was typed: its folder is one in the cache.
    return str(checkpoint.folder) if origin.revision is None else origin.name


def show_stats(
    checkpoint: Checkpoint, stats: "Stats", path: Path, as_json: bool
) -> None:
    """What ``measure`` collected."""
    data = {
        "stats": str(path),
        "fingerprint": stats.fingerprint,
        "layers": len(stats.layers),
        "forward_passes": stats.forward_passes,
        "calibration": stats.calibration,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if as_json:
        print_json(data)
        return
    facts(
        f"Wrote {path}",
        [
            ("layers with experts", len(stats.layers)),
            ("forward passes", stats.forward_passes),
            ("peak memory", gib(peak_rss_bytes())),
        ],
    )
    source = source_of(checkpoint)
    hint(f"Next: vllm-moe-prune plan {source} --stats {path} -o plan.json")


def show_plan(
    checkpoint: Checkpoint,
    plan: "CutPlan",
    path: Path,
    as_json: bool,
    brief: bool = False,
) -> None:
    """What ``plan`` decided and predicts."""
    predicted = plan.predicted
    assert predicted is not None
    if as_json:
        layers = [
            {
                "layer": layer.layer,
                "action": layer.action,
                "experts_before": layer.experts,
                "experts_after": len(layer.keep),
                "removed": _removed(layer),
                "width": layer.width,
                "sparsity": layer.sparsity,
            }
            for layer in plan.layers
        ]
        print_json(
            {
                "plan": str(path),
                "predicted": predicted.model_dump(),
                "bytes_before": checkpoint.tensor_bytes,
                "layers": layers,
                "super_experts": plan.super_experts,
                "blend": plan.measurement.blend,
                "coverage": plan.measurement.coverage,
            }
        )
        return
    table(
        f"Plan: {plan.recipe.name}",
        ("layer", "experts", "kept", "removed", "zeros"),
        [
            (
                layer.layer,
                layer.experts,
                len(layer.keep) if layer.action == "keep" else layer.action,
                _short(_removed(layer)),
                f"{layer.sparsity:.1%}" if layer.keep else "",
            )
            for layer in plan.layers
        ],
    )
    kept = [len(layer.keep) for layer in plan.layers if layer.keep]
    before = [layer.experts for layer in plan.layers if layer.experts]
    facts(
        "Predicted",
        [
            ("experts per layer", f"{experts_text(before)} -> {experts_text(kept)}"),
            *_super(plan),
            *_widths(checkpoint, plan),
            *_coverage(plan),
            ("sparsity of experts", f"{predicted.expert_sparsity:.2%}"),
            ("of all parameters", f"{predicted.total_sparsity:.2%}"),
            (
                "tensor bytes",
                f"{checkpoint.tensor_bytes:,} -> "
                f"{predicted.tensor_bytes:,} ({gib(predicted.tensor_bytes)})",
            ),
            (
                "files",
                f"{predicted.shards} safetensors, {predicted.file_bytes:,} bytes",
            ),
        ],
    )
    if not brief:
        hint(f"Next: vllm-moe-prune cut {source_of(checkpoint)} --plan {path} -o OUT")


def _super(plan: "CutPlan") -> list[tuple[str, str]]:
    if plan.recipe.experts.protect == "none":
        return []
    return [("super-experts, kept", plan.super_text)]


def _widths(checkpoint: Checkpoint, plan: "CutPlan") -> list[tuple[str, str]]:
    """What narrowing leaves of the experts' channels; nothing where it does not."""
    if not plan.is_narrowed:
        return []
    pairs = list(zip(checkpoint.layers, plan.layers, strict=True))
    before = [layer.width for layer, one in pairs if one.keep]
    after = [one.width or layer.width for layer, one in pairs if one.keep]
    said = f"{experts_text(before)} -> {experts_text(after)}"
    return [("channels per expert", said)]


def _coverage(plan: "CutPlan") -> list[tuple[str, str]]:
    shares = plan.measurement.coverage
    said = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return [("coverage", said)] if said else []


def _removed(layer: "LayerPlan") -> list[int]:
    return sorted(set(range(layer.experts)) - set(layer.keep))


def _short(ids: list[int], most: int = 8) -> str:
    text = " ".join(str(number) for number in ids[:most])
    return text + (f" and {len(ids) - most} more" if len(ids) > most else "")


def show_cut(
    checkpoint: Checkpoint,
    plan: "CutPlan",
    result: "CutResult",
    elapsed_s: float,
    as_json: bool,
) -> None:
    """What ``cut`` or ``run`` did."""
    done = result.achieved
    unseen = {record.layer: record.unseen for record in result.records if record.unseen}
    if as_json:
        print_json(
            {
                "output": str(result.out),
                "file_bytes": result.file_bytes,
                "sparsity": done.as_dict(),
                "unseen_experts": unseen,
                "forward_passes": {
                    "measure": plan.measurement.forward_passes,
                    "cut": result.forward_passes,
                },
                "elapsed_s": round(elapsed_s, 3),
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
        return
    facts(
        f"Wrote {result.out}",
        [
            (
                "size",
                f"{gib(checkpoint.tensor_bytes)} -> {gib(result.file_bytes)}",
            ),
            ("sparsity of experts", f"{done.expert_sparsity:.2%}"),
            ("of all parameters", f"{done.total_sparsity:.2%}"),
            (
                "forward passes",
                f"{plan.measurement.forward_passes} to measure, "
                f"{result.forward_passes} to cut",
            ),
            ("time", duration(elapsed_s)),
            ("peak memory", gib(peak_rss_bytes())),
        ],
    )
    if unseen:
        how = "rounded to nearest" if plan.is_quantized else "pruned by magnitude"
        facts(
            f"Experts that no calibration token reached, {how}",
            [(f"layer {layer}", _short(ids)) for layer, ids in unseen.items()],
        )
        hint("More calibration text would help.")
    hint(f"Next: vllm-moe-prune serve {result.out}")


def show_converted(result: "Converted", as_json: bool) -> None:
    """What ``convert`` wrote."""
    if as_json:
        print_json(
            {
                "output": str(result.out),
                "storage": result.storage,
                "dense_bytes": result.dense_bytes,
                "stored_bytes": result.stored_bytes,
                "file_bytes": result.file_bytes,
                "dense_layers": list(result.dense_layers),
            }
        )
        return
    share = result.stored_bytes / result.dense_bytes
    facts(
        f"Wrote {result.out}",
        [
            ("storage", result.storage),
            ("plain weights", gib(result.dense_bytes)),
            ("as stored", f"{gib(result.stored_bytes)} ({share:.1%})"),
        ],
    )
    if result.dense_layers:
        layers = _short(list(result.dense_layers))
        hint(f"Too few zeros to save bytes, stored dense: layers {layers}")
    hint(f"Next: vllm-moe-prune serve {result.out}")


def show_verified(verified: "Verified", as_json: bool) -> None:
    """What ``verify`` checked."""
    data = {
        "folder": str(verified.folder),
        "ok": True,
        "layers": verified.layers,
        "experts": verified.experts,
        "tensors_compared": verified.tensors_compared,
        "bytes_compared": verified.bytes_compared,
        "zeros": verified.zeros,
        "expert_sparsity": verified.expert_sparsity,
        "total_sparsity": verified.total_sparsity,
        "tensors_hashed": verified.tensors_hashed,
    }
    if as_json:
        print_json(data)
        return
    checked = [
        ("structure", f"{verified.layers} layers, {verified.experts} experts"),
        ("remap table", "agrees with the weights"),
    ]
    if verified.expert_sparsity is not None:
        size = gib(verified.bytes_compared)
        checked += [
            ("tensors", f"{verified.tensors_compared} ({size}) agree with the source"),
            ("sparsity of experts", f"{verified.expert_sparsity:.2%}, recounted"),
            ("of all parameters", f"{verified.total_sparsity:.2%}, recounted"),
        ]
    if verified.tensors_hashed is not None:
        known = f"{verified.tensors_hashed} tensors match their hashes"
    else:
        known = "none kept: this folder was written before they were"
    checked.append(("hashes", known))
    facts(f"Verified {verified.folder}", checked)
    if verified.tensors_hashed is None and verified.expert_sparsity is None:
        hint("No hashes: headers were checked, weights were not.")
    if verified.expert_sparsity is None:
        hint("Pass --source CKPT to compare the weights too.")
