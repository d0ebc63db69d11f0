"""The model card of the output: front matter, what was removed, how to serve it."""

from typing import Any

import yaml

from ..checkpoint.index import is_inside
from ..checkpoint.open import Checkpoint
from ..decide.cut_plan import CutPlan
from ..decide.quantize import form_of
from .achieved import Achieved

INHERITED = ("license", "license_name", "license_link", "language")


def model_card(
    checkpoint: Checkpoint, plan: CutPlan, result: Achieved, architecture: str
) -> str:
    """README.md of the output."""
    from huggingface_hub import ModelCardData

    name = checkpoint.origin.name
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "pruned", "expert-pruning", "vllm"],
    }
    # base_model must be a Hub id; a local folder's name is none.
    if checkpoint.origin.revision is not None:
        fields["base_model"] = name
    data = ModelCardData(**fields, **_inherited(checkpoint))
    plugin = architecture == checkpoint.arch.pruned_architecture
    if plugin:
        needs = (
            "Its layers differ, so vLLM needs the plugin (`pip install "
            "vllm-moe-prune`), which it picks up by itself. Without the plugin loading "
            "fails on purpose."
        )
    elif not checkpoint.arch.stock_vllm:
        needs = (
            "vLLM has dropped this family; the plugin (`pip install vllm-moe-prune`) "
            "brings it back, and vLLM picks it up by itself."
        )
    elif plan.is_quantized or checkpoint.form is not None:
        needs = (
            "Its layers are uniform: unmodified vLLM loads it where it has a kernel "
            "for experts so quantized. Elsewhere on CPUs the plugin (`pip install "
            "vllm-moe-prune`) dequantizes them while they load."
        )
    else:
        needs = "Its layers are uniform: unmodified vLLM and transformers load it."
    quantized = ""
    if plan.is_quantized:
        how = f"{plan.quantize.method.upper()}: {form_of(plan.quantize).words}"
        quantized = f"\nExperts are quantized by {how}."
    rows = "\n".join(
        f"| {layer.layer} | {layer.experts_before} | {layer.experts_after} "
        f"| {layer.action} | {layer.sparsity:.1%} |"
        for layer in result.layers
    )
    return f"""---
{data.to_yaml()}
---

# {name}, pruned with vllm-moe-prune

Recipe `{plan.recipe.name}`: {result.expert_sparsity:.1%} of the expert parameters and
{result.total_sparsity:.1%} of all parameters of `{name}` removed or zeroed
({result.parameters_before:,} parameters before, {result.parameters_after:,} after,
{result.zeros:,} of them zero).{quantized}
Source fingerprint `{plan.model.fingerprint[:16]}`,
revision `{plan.model.revision or "local"}`.

## Serve

{needs}

```
vllm serve <this folder>
```

## Made by

```
vllm-moe-prune cut {name} --plan plan.json -o <this folder>
```

`plan.json` holds every decision, `moe_prune.yaml` the recipe, `expert_remap.json` what
became of every expert, `provenance.json` the calibration text's hash and the counts.

## What was removed

| layer | experts before | after | action | sparsity of its experts |
|---|---|---|---|---|
{rows}
"""


def source_card(checkpoint: Checkpoint) -> str | None:
    """The text of the input's own README.md; None: it has none, or a link elsewhere."""
    path = checkpoint.folder / "README.md"
    if not path.is_file() or not is_inside(checkpoint.folder, path):
        return None
    return path.read_text("utf-8", errors="replace")


def _inherited(checkpoint: Checkpoint) -> dict[str, Any]:
    """Licence and language of the source's own card, if it has a readable one."""
    from huggingface_hub import ModelCard

    text = source_card(checkpoint)
    if text is None:
        return {}
    try:
        source: dict[str, Any] = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    except (ValueError, RecursionError, yaml.YAMLError):
        # Front matter that is no YAML, or no mapping; there is nothing to inherit.
        return {}
    return {key: source[key] for key in INHERITED if source.get(key)}
