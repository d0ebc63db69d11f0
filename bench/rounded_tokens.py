"""What does it cost in quality to round the inputs of integer experts to int8?

    python bench/rounded_tokens.py examples/demo-* [--json FILE] [--tokens 16384]

The dense model runs by transformers; its experts are quantized by rounding and run by
our CPU kernel, once with tokens as they are (``exact``) and once rounded (the default):
perplexity of each held-out text, all in float32, so that nothing else is rounded.
E experts, F width, D hidden.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_moe_prune.kernels import cpu_library, int_blocks
from vllm_moe_prune.kernels.int_blocks import IntBlocks, Integers
from vllm_moe_prune.kernels.quantized import (
    PACKED,
    PLAIN,
    SCALE,
    Form,
    Quantized,
    pack,
    quantize_by,
    scales_of,
    zeros_of,
)

EXAMPLES = Path(__file__).parent.parent / "examples"
FORMS = (
    *(Form("int4", 32), Form("int4", 128), Form("int4", 128, zero_point=True)),
    Form("int8"),
)
WINDOW = 512


class IntegerExperts(nn.Module):
    """In the place of the experts of transformers' models."""

    def __init__(self, experts: Any, form: Form) -> None:
        """Quantized by rounding.

        Args:
            experts: Has ``gate_up_proj`` [E, 2F, D] and ``down_proj`` [E, D, F].
            form: Of the integers.
        """
        super().__init__()
        self.width = experts.down_proj.shape[2]
        self.dots = cpu_library.EXACT
        pairs = zip(experts.gate_up_proj, experts.down_proj, strict=True)
        made = [
            (_blocks(half.chunk(2), form), _blocks([down], form))
            for half, down in pairs
        ]
        self.w13, self.w2 = (int_blocks.join(part) for part in zip(*made, strict=True))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As transformers calls experts."""
        flat = x.view(-1, x.shape[-1])
        found = cpu_library.fused_moe(
            *(flat, weights, ids, None, self.w13, self.w2, self.width), dots=self.dots
        )
        return found.view(x.shape)


def _blocks(matrices: Any, form: Form) -> IntBlocks:
    bits = 4 if form.bits == "int4" else 8
    sources = []
    for matrix in matrices:
        scales = scales_of(matrix, form, torch.bfloat16)
        values = quantize_by(matrix, scales, form).to(torch.int8)
        parts = pack(Quantized(values, scales), form)
        words = parts[PACKED] if bits == 4 else parts[PLAIN].view(torch.int32)
        sources.append(Integers(words, parts[SCALE], zeros_of(parts, form)))
    return int_blocks.encode(sources, form.group_size or matrices[0].shape[1], bits)


def load(folder: Path) -> Any:
    """The dense model in float32."""
    if json.loads((folder / "config.json").read_text())["model_type"] == "arctic":
        sys.path.insert(0, str(EXAMPLES))
        import arctic_model

        return arctic_model.ArcticForCausalLM.from_pretrained(folder).float().eval()
    config = AutoConfig.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32
    ).eval()


def expert_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where experts are: their parent, and their name there."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(getattr(child, "down_proj", None), nn.Parameter):
                yield module, name


@torch.inference_mode()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Of windows that know nothing of each other."""
    total, count = 0.0, 0
    for window in ids.split(WINDOW):
        if len(window) < 2:
            continue
        logits = model(window[None]).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    return math.exp(total / count)


def main() -> None:
    """Measure and print a line per model, form and text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--tokens", type=int, default=16384, help="of each text")
    options = parser.parse_args()
    rounded = cpu_library.all_dots()[0]
    found = []
    for folder in options.folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = {
            path.stem: torch.tensor(tokenizer(path.read_text("utf-8")).input_ids)
            for path in sorted((EXAMPLES / "heldout").glob("*.txt"))
        }
        for form in FORMS:
            model = load(folder)
            made: list[IntegerExperts] = []
            where = list(expert_modules(model))
            shapes = [getattr(*at).down_proj.shape[1:] for at in where]
            if any(form.misfit(*shape) for shape in shapes):
                continue
            for parent, name in where:
                made.append(IntegerExperts(getattr(parent, name), form))
                setattr(parent, name, made[-1])
            assert made, f"{folder}: no experts found"
            for text, ids in texts.items():
                row = {"model": folder.name, "weights": form.words, "text": text}
                for way, dots in (("exact", cpu_library.EXACT), ("rounded", rounded)):
                    for one in made:
                        one.dots = dots
                    row[way] = perplexity(model, ids[: options.tokens])
                row["cost_percent"] = 100 * (row["rounded"] / row["exact"] - 1)
                found.append(row)
                print(json.dumps(row), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
