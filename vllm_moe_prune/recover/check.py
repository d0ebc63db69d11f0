"""What a recovery refuses before any work is done."""

from ..checkpoint.fingerprint import difference
from ..checkpoint.open import Checkpoint
from ..errors import CheckpointError, RecipeError, RemapError, require_extra
from .options import Training


def check_recovery(
    checkpoint: Checkpoint, original: Checkpoint | None, training: Training
) -> None:
    """Refuse what cannot be trained, before any work is done.

    Raises:
        RecipeError: The original is missing or not wanted.
        MissingExtra: A package that training needs.
        RemapError: The original is not what the checkpoint was cut from.
        CheckpointError: The weights are stored in a way that training cannot change.
    """
    if checkpoint.substitution is not None:
        raise CheckpointError(
            f"{checkpoint.folder}: vectors stand for its removed experts. Recover the "
            "form without them: `vllm-moe-prune convert` writes it."
        )
    if training.objective != "text":
        _check_original(checkpoint, original)
    elif original is not None:
        raise RecipeError(
            f"--source is what --method router learns from, layer by layer; --method "
            f"{training.method} learns from the text, or from --teacher."
        )
    if training.objective == "layers":
        return
    require_extra(
        "recover", ("peft", "accelerate"), "--method lora and full, and --teacher"
    )
    if training.method == "router":
        return
    if checkpoint.form is not None or checkpoint.blocks is not None:
        raise CheckpointError(
            f"{checkpoint.folder}: its weights are quantized, which only "
            "--method router can do with. Recover before quantizing."
        )


def _check_original(checkpoint: Checkpoint, original: Checkpoint | None) -> None:
    if original is None:
        raise RecipeError(
            "--method router learns from the model before the cut: name it with "
            "--source (layer by layer) or --teacher (its next-token distribution)."
        )
    if checkpoint.remap is None:
        raise RemapError(
            f"{checkpoint.folder}: config.json has no moe_prune block; this is not an "
            "output of vllm-moe-prune, so there is nothing to recover."
        )
    source = checkpoint.remap.source
    if other := difference(source.fingerprint, original.fingerprint):
        raise RemapError(
            f"{original.folder}: is not the checkpoint that {checkpoint.folder} was "
            f"cut from, which is {source.name}: {other}."
        )
