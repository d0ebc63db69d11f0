"""What works for each family, as its table says it."""

from collections.abc import Iterator
from dataclasses import dataclass

from . import ALIAS_CHECKPOINTS, ALIASES, find_arch, known
from .spec import Evidence, MoeArch

MEANING: dict[Evidence, str] = {
    "transformers": "the calibration forward gives transformers' loss",
    "float64": "pruned = original with experts barred, in plain float64 torch",
    "vLLM's class": "uniform plans likewise, in vLLM's own class",
    "plugin": "uneven plans, dropped sublayers and blocks, by the plugin",
    "two ranks": "the same, shared by two processes (TP or EP)",
}
"""What was tested, in words."""


@dataclass(frozen=True, kw_only=True)
class FamilySupport:
    """One ``model_type``: what serves it, what is refused, what is tested."""

    model_type: str
    alias_of: str | None
    """The family whose table it has."""
    checkpoints: str
    """Published ones, in words."""
    uniform: tuple[str, ...]
    """What loads plans that leave every layer as many experts, beside the plugin."""
    plugin: str
    """The plugin's class, which serves every plan."""
    stock_vllm: str | None
    """Routings of uneven layers that ``--for stock-vllm`` spells; None: none."""
    refused: tuple[str, ...]
    tested: tuple[Evidence, ...]
    """What the tests of the table compare; aliases have the table's."""


def family_support() -> list[FamilySupport]:
    """Every family that is read, sorted by ``model_type``."""
    return [_support(model_type) for model_type in known()]


def _support(model_type: str) -> FamilySupport:
    arch, alias = find_arch(model_type, "families"), ALIASES.get(model_type)
    # Classes of another family serve it only for attention and norms.
    own = f".models.{model_type}." in arch.hf_config
    loads = {"transformers": own, "vLLM": arch.stock_vllm}
    return FamilySupport(
        model_type=model_type,
        alias_of=alias,
        checkpoints=ALIAS_CHECKPOINTS[model_type] if alias else arch.checkpoints,
        uniform=tuple(name for name, there in loads.items() if there),
        plugin=arch.pruned_architecture,
        stock_vllm=_spelled(arch),
        refused=tuple(_refused(arch)),
        tested=arch.tested,
    )


def _spelled(arch: MoeArch) -> str | None:
    """As ``cut/spell.py`` does it."""
    if not arch.stock_vllm:
        return None
    drop = "drop, " if arch.layouts[0].rule("router_bias") else ""
    return f"{drop}mean, preserve"


def _refused(arch: MoeArch) -> Iterator[str]:
    for key in arch.empty_lists:
        yield f"`{key}` that is set"
    if not arch.stock_vllm:
        yield "`--for stock-vllm`"
    elif arch.layouts[0].rule("router_bias") is None:
        yield "`--for stock-vllm` with `routing: drop`"
    if arch.config.mtp_layers is not None:
        yield "sensitivity of MTP layers (`layers.mtp: drop`)"
