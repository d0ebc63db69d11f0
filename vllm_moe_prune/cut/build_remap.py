"""The remap table of the output, derived from a plan and any earlier table."""

from ..checkpoint.open import Checkpoint, Layer
from ..checkpoint.remap import ExpertRemap, RemapLayer, RemapSource
from ..decide.cut_plan import CutPlan, LayerPlan
from .layer_cut import LayerCut, layer_cuts


def build_remap(checkpoint: Checkpoint, plan: CutPlan) -> ExpertRemap:
    """The table from the *original* experts to the output's, through earlier cuts."""
    earlier = checkpoint.remap
    layers: list[RemapLayer] = []
    dropped = list(earlier.dropped_blocks) if earlier else []
    decoder_layers = 0
    for cut in layer_cuts(checkpoint, plan):
        entry = earlier.all_layers[cut.index] if earlier else _untouched(cut.layer)
        if cut.drops_block:
            # MTP layers are not listed: original_mtp_layers tells how many there were.
            if not cut.layer.mtp:
                dropped.append(entry.original_layer)
            continue
        layers.append(_cut_entry(entry, cut))
        decoder_layers += not cut.layer.mtp
    if earlier:
        # Of the first cut, since every id in the table is one of that original.
        source = earlier.source
        original = earlier.original_layers, earlier.original_mtp_layers
    else:
        decoders = len(checkpoint.decoder_layers)
        original = decoders, len(checkpoint.layers) - decoders
        source = RemapSource(
            name=checkpoint.origin.name,
            revision=checkpoint.origin.revision,
            fingerprint=plan.model.fingerprint,
        )
    return ExpertRemap(
        tool_version=plan.tool_version,
        model_type=checkpoint.arch.model_type,
        source=source,
        routing=plan.routing,
        original_layers=original[0],
        dropped_blocks=tuple(sorted(dropped)),
        layers=tuple(layers[:decoder_layers]),
        original_mtp_layers=original[1],
        mtp_layers=tuple(layers[decoder_layers:]),
    )


def _untouched(layer: Layer) -> RemapLayer:
    experts = tuple(range(layer.num_experts))
    return RemapLayer(
        layer=layer.index,
        original_layer=layer.index,
        moe=layer.has_moe,
        experts_before=layer.num_experts,
        kept=experts,
        router_rows=experts,
        groups=layer.groups,
    )


def _cut_entry(entry: RemapLayer, cut: LayerCut) -> RemapLayer:
    layer_plan = cut.layer_plan
    if not entry.moe or layer_plan.drops_moe:
        return RemapLayer(
            layer=cut.new_index,
            original_layer=entry.original_layer,
            moe=False,
            moe_dropped=entry.moe_dropped or layer_plan.drops_moe,
            norm_kept=entry.norm_kept or layer_plan.action == "drop-moe-keep-norm",
            experts_before=entry.experts_before,
            kept=(),
            router_rows=(),
        )
    # Through the earlier table: the plan's ids are those of its output.
    kept = tuple(entry.kept[expert] for expert in layer_plan.keep)
    router_rows = kept
    redirect: tuple[int | None, ...] | None = None
    if cut.keeps_router:
        router_rows = entry.router_rows
        redirect = cut.redirect
    elif cut.plan.routing == "redirect":
        # Nothing to redirect here, but tables of routing 'redirect' must name targets.
        redirect = tuple(range(len(kept)))
    return RemapLayer(
        layer=cut.new_index,
        original_layer=entry.original_layer,
        moe=True,
        experts_before=entry.experts_before,
        kept=kept,
        router_rows=router_rows,
        redirect=redirect,
        groups=cut.row_groups,
        clusters=_original_clusters(entry, layer_plan),
        reconstructed=entry.reconstructed or layer_plan.reconstruct,
    )


def _original_clusters(
    entry: RemapLayer, layer_plan: LayerPlan
) -> tuple[tuple[int, ...], ...] | None:
    """Clusters in original ids; experts that already stood for others bring them."""
    if layer_plan.clusters is None:
        if entry.clusters is None:
            return None
        return tuple(entry.clusters[expert] for expert in layer_plan.keep)
    # Without earlier clusters each expert stands for itself.
    inner = entry.clusters or tuple((expert,) for expert in entry.kept)
    return tuple(
        tuple(sorted(old for expert in cluster for old in inner[expert]))
        for cluster in layer_plan.clusters
    )
