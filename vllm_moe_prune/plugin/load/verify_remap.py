"""Is a pruned checkpoint what its remap table says? Answered from headers alone.

The plugin's model classes ask before they allocate a byte, ``stock_experts`` where
vLLM's own class builds a uniform one, ``vllm-moe-prune serve`` before it starts vLLM.
No vLLM in here.
"""

from pathlib import Path

from ...checkpoint.index import INDEX_NAME
from ...checkpoint.open import Checkpoint
from ...checkpoint.remap import ExpertRemap
from ...checkpoint.source import UNWANTED, WANTED, open_checkpoint
from ...errors import CheckpointError, RemapError, ServeError


def local_folder(
    model: str, revision: str | None, download_dir: str | None = None
) -> Path:
    """The folder of what the user asked vLLM to serve, a path or a Hub id.

    Offline, vLLM has already put the snapshot's path in place of a Hub id. Online, the
    snapshot is completed here, in the cache from which vLLM will load it.

    Raises:
        ServeError: Neither a folder nor something the Hub has.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot = snapshot_download(
            model,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        # The Hub's errors run over several lines; the first says what failed.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ServeError(
            f"{model}: not a folder, and not available from the Hub: {reason}"
        ) from error
    return Path(snapshot)


def verify_folder(folder: Path) -> ExpertRemap:
    """Check every router and expert tensor of a pruned checkpoint against its table.

    Raises:
        RemapError: The table is missing, altered or contradicts config or weights.
        CheckpointError: A tensor is missing, misshapen, twice there or too many.
    """
    # vLLM follows links wherever they lead.
    checkpoint = open_checkpoint(folder, allow_links=True)
    if checkpoint.remap is None:
        raise RemapError(
            f"{folder / 'config.json'}: has no 'moe_prune' block, so this checkpoint "
            "was not written by vllm-moe-prune and cannot be verified."
        )
    if checkpoint.remap.model_type != checkpoint.arch.model_type:
        raise RemapError(
            f"{folder}: the remap table is for model_type "
            f"{checkpoint.remap.model_type!r}, config.json says "
            f"{checkpoint.arch.model_type!r}."
        )
    check_beside_config(checkpoint)
    _check_strays(checkpoint)
    _check_leftovers(checkpoint, checkpoint.remap)
    return checkpoint.remap


def check_beside_config(checkpoint: Checkpoint) -> None:
    """Refuse shards in a folder below: vLLM looks beside config.json only.

    Raises:
        CheckpointError: Naming a shard.
    """
    for path in _files(checkpoint):
        if path.parent != checkpoint.folder:
            raise CheckpointError(
                f"{path}: vLLM reads only weights beside config.json. Move the files "
                "there and name them so in the index, or write the checkpoint anew: "
                f"vllm-moe-prune convert {checkpoint.folder} OUT --storage dense"
            )


def _files(checkpoint: Checkpoint) -> list[Path]:
    infos = [*checkpoint.tensors.values(), *checkpoint.parts.values()]
    return sorted({info.file for info in infos})


def _check_strays(checkpoint: Checkpoint) -> None:
    """Refuse weights that vLLM would load besides ours, or instead of them.

    Without an index it takes every file there is, and ``consolidated*`` in any case.
    """
    folder, known = checkpoint.folder, set(_files(checkpoint))
    indexed = (folder / INDEX_NAME).is_file()
    for path in sorted(folder.glob("*.safetensors")):
        wanted = not indexed or path.name.startswith("consolidated")
        if wanted and path not in known:
            raise CheckpointError(
                f"{path}: is no part of this checkpoint, but vLLM would load it. "
                "Move it away."
            )


def _check_leftovers(checkpoint: Checkpoint, remap: ExpertRemap) -> None:
    arch = checkpoint.arch
    for layer, entry in zip(checkpoint.layers, remap.all_layers, strict=True):
        if layer.has_moe != entry.moe:
            state = "has experts" if layer.has_moe else "has no experts"
            raise RemapError(
                f"{checkpoint.folder}: layer {layer.index} {state} in config.json, but "
                "not in the remap table, or the other way round."
            )
        if not entry.moe_dropped:
            continue
        for name in checkpoint.layer_names(layer.index):
            stays = entry.norm_kept and arch.is_moe_norm(name, layer.index)
            if arch.is_moe_member(name, layer.index) and not stays:
                raise CheckpointError(
                    f"{checkpoint.folder}: layer {layer.index}: the remap table says "
                    f"its MoE sublayer was dropped, but {name!r} is still there."
                )
