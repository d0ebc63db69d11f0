"""The model card of the output: front matter, what was removed, how to serve it."""

import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml

from ..checkpoint.index import is_inside
from ..checkpoint.open import Checkpoint
from ..decide.cut_plan import CutPlan
from ..decide.quantize import said_of
from ..errors import CheckpointError
from ..files.regular import KIB, MIB, Kind, read_file
from ..files.yaml_file import parse_yaml
from ..progress import gib
from .achieved import Achieved
from .card_places import cell

CARD = Kind(name="model card", max_bytes=16 * MIB, error=CheckpointError)
FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\n---\s*?(?:\n|\Z)", re.DOTALL)
# The source's card is not trusted: bounds on what is parsed and taken over.
MAX_FRONT_MATTER = 64 * KIB
MAX_WORD = 200
INHERITED = ("license", "license_name", "license_link", "language")


def model_card(
    checkpoint: Checkpoint,
    plan: CutPlan,
    result: Achieved,
    architecture: str,
    *,
    tensor_bytes: int,
    calibration: Mapping[str, Any] | None,
) -> str:
    """README.md of the output.

    Args:
        checkpoint: The input.
        plan: What was done.
        result: What came of it.
        architecture: Of the output's config.json.
        tensor_bytes: Size of the output's tensors.
        calibration: What it was calibrated on, as provenance has it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name = checkpoint.origin.name
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "pruned", "expert-pruning", "vllm"],
    }
    # base_model must be a Hub id; a local folder's name is none.
    if checkpoint.origin.revision is not None:
        fields["base_model"] = name
    how = ""
    if plan.is_quantized:
        how = f"{plan.quantize.method.upper()}: {said_of(plan.quantize)}"
    template = resources.files(__package__) / "model_card.md"
    card = ModelCard.from_template(
        ModelCardData(**fields, **_inherited(checkpoint)),
        template_str=template.read_text("utf-8"),
        name=name,
        recipe=plan.recipe.name,
        done=result,
        quantized=how,
        fingerprint=plan.model.fingerprint[:16],
        revision=plan.model.revision or "local",
        serving=_serving(checkpoint, plan, architecture),
        size_before=gib(checkpoint.stored_bytes),
        size_after=gib(tensor_bytes),
        limits=_limits(plan, result, calibration),
        values=yaml.safe_dump(
            plan.recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False
        ).strip(),
        calibration=[
            (cell(key.replace("_", " ")), cell(_said(value)))
            for key, value in (calibration or {}).items()
        ],
    )
    return f"{str(card).rstrip()}\n"


def _serving(checkpoint: Checkpoint, plan: CutPlan, architecture: str) -> str:
    """What a server needs to load the output."""
    if architecture == checkpoint.arch.pruned_architecture:
        if plan.spelling == "stock-vllm":
            return (
                "Its layers differ. Removed experts have vectors in their place "
                "(`approximate_experts`), by which vLLM from 0.33 on serves it without "
                "the plugin: no expert or data parallelism, no quantization of experts."
            )
        return (
            "Its layers differ, so vLLM needs the plugin (`pip install "
            "vllm-moe-prune`), which it picks up by itself. Without the plugin loading "
            "fails on purpose."
        )
    if not checkpoint.arch.stock_vllm:
        return (
            "vLLM has dropped this family; the plugin (`pip install vllm-moe-prune`) "
            "brings it back, and vLLM picks it up by itself."
        )
    if plan.is_quantized or checkpoint.form is not None:
        return (
            "Its layers are uniform: unmodified vLLM loads it where it has a kernel "
            "for experts so quantized. Elsewhere on CPUs the plugin (`pip install "
            "vllm-moe-prune`) dequantizes them while they load."
        )
    return "Its layers are uniform: unmodified vLLM and transformers load it."


def _said(value: object) -> str:
    """A value of provenance as a person reads it."""
    if isinstance(value, list | tuple):
        return "; ".join(map(_said, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(item)}" for key, item in value.items())
    return str(value)


def _limits(
    plan: CutPlan, result: Achieved, calibration: Mapping[str, Any] | None
) -> str:
    """What a user should know before relying on it."""
    said = [
        "Nothing was trained after the cut, unless a section below says so. Perplexity "
        "hides what answers lose: look at loops and at agreement with the original."
    ]
    if calibration:
        said.append(
            "What stays was chosen on the calibration text below; on text unlike it "
            "the model may have lost more."
        )
    if plan.refits:
        said.append(
            "The experts' down projections were refitted on the same text by ridge "
            "regression, where no source of it got worse."
        )
    if unseen := sum(len(layer.unseen) for layer in result.layers):
        said.append(
            f"No calibration token reached {unseen} of its experts: their weights were "
            "chosen by magnitude."
        )
    return " ".join(said)


def source_card(checkpoint: Checkpoint) -> str | None:
    """The text of the input's own README.md; None: it has none, or a link elsewhere."""
    path = checkpoint.folder / "README.md"
    known = checkpoint.allow_links or is_inside(checkpoint.folder, path)
    if not path.is_file() or not known:
        return None
    # A card is prose: a byte that is not UTF-8 must not stop a cut.
    return read_file(path, CARD).decode("utf-8", "replace")


def _inherited(checkpoint: Checkpoint) -> dict[str, Any]:
    """Licence and language of the source's own card, if it has a readable one."""
    front = FRONT_MATTER.match(source_card(checkpoint) or "")
    if front is None or len(front[1]) > MAX_FRONT_MATTER:
        return {}
    try:
        source = parse_yaml(front[1])
    except ValueError:
        # Front matter that is no YAML; there is nothing to inherit.
        return {}
    if not isinstance(source, dict):
        return {}
    return {key: source[key] for key in INHERITED if _is_plain(source.get(key))}


def _is_plain(value: object) -> bool:
    """Whether it is a word, or a list of some, as licences and languages are."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(
        isinstance(word, str) and 0 < len(word) <= MAX_WORD for word in words
    )
