"""Pruned Mixtrals in real vLLM engines against the masked original in plain torch.

The original is never changed: the reference bars removed experts from selection, or
runs the representative in their place. What is left between the two is rounding.
V vocabulary, T tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine import TOKENS, VOCAB, Loads, assert_same, served
from tests.reference import (
    DROP_BLOCK,
    DROP_MOE,
    DROP_MOE_KEEP_NORM,
    Cuts,
    LayerCut,
    Reference,
    raw_bytes,
    read_json,
    read_tensors,
    write_plan,
)
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("engines_in_this_process")]

EXPERTS = 8
BF16_MEAN = 0.1
"""Mean difference in bfloat16; vLLM itself shows 0.15 on these models unpruned."""
SINGLES = tuple((expert,) for expert in range(EXPERTS))


@dataclass(frozen=True)
class Case:
    """A plan, the spelling of the weights it is applied to, and what it must name."""

    cuts: Cuts
    layout: str
    routing: str = "drop"
    architecture: str = "MoePruneMixtralForCausalLM"


CASES = {
    "uniform": Case(
        {layer: LayerCut(keep=(6, 1, 4, 3)) for layer in range(4)},
        "block_sparse_moe.w1w2w3",
        architecture="MixtralForCausalLM",
    ),
    "uneven": Case(
        {
            0: LayerCut(keep=(0, 2, 3, 5, 7)),
            1: LayerCut(keep=(4,)),  # fewer than top-k
            3: LayerCut(keep=(6, 0, 2)),
        },
        "block_sparse_moe.gate_up_down",
    ),
    "dropped MoE": Case(
        {0: DROP_MOE, 1: LayerCut(keep=(1, 7)), 3: DROP_MOE_KEEP_NORM},
        "mlp.w1w2w3",
    ),
    "redirect": Case(
        {
            0: LayerCut(keep=(1, 6), clusters=((0, 1, 2, 3), (4, 5, 6, 7))),
            1: LayerCut(keep=(5,), clusters=(tuple(range(8)),)),
            2: LayerCut(keep=tuple(range(8)), clusters=SINGLES),
            3: LayerCut(keep=(7, 0, 3), clusters=((4, 7), (0, 1, 2, 5), (3, 6))),
        },
        "mlp.packed",
        routing="redirect",
    ),
    "everything": Case(
        {
            0: DROP_MOE,
            1: LayerCut(
                keep=(2, 5), clusters=((0, 2, 7), (1, 3, 4, 5, 6)), reconstruct=True
            ),
            2: DROP_BLOCK,
            3: LayerCut(keep=(7, 0, 3), clusters=((4, 7), (0, 1, 2, 5), (3, 6))),
        },
        "block_sparse_moe.packed",
        routing="redirect",
    ),
}
WHILE_LOADING = Case(
    {
        0: LayerCut(
            keep=(2, 5), clusters=((0, 2, 7), (1, 3, 4, 5, 6)), reconstruct=True
        ),
        1: DROP_BLOCK,
        2: DROP_MOE,
        3: LayerCut(keep=(6, 0, 2)),
    },
    "mlp.gate_up_down",
)


def make_original(folder: Path, layout: str, dtype: str = "float32") -> Path:
    return tiny_checkpoint(
        folder,
        layout=layout,
        experts=EXPERTS,
        vocab=VOCAB,
        dtype=dtype,
        tokenizer=False,
    )


def make_pruned(original: Path, case: Case, **plan: str) -> Path:
    out = original.with_name(original.name + "-pruned")
    execute_plan(
        open_checkpoint(original), load_plan(make_plan(original, case, **plan)), out
    )
    return out


def make_plan(original: Path, case: Case, **plan: str) -> Path:
    path = original.with_name(original.name + "-plan.json")
    source = open_checkpoint(original)
    return write_plan(path, source, case.cuts, routing=case.routing, **plan)


def expected(original: Path, case: Case | None = None) -> Tensor:
    """Log-probabilities [T, V] of the masked original, in float64."""
    cuts, routing = (case.cuts, case.routing) if case else ({}, "drop")
    logits_STV = Reference(original, cuts, routing=routing).logits(
        torch.tensor([TOKENS])
    )
    return logits_STV[0].log_softmax(dim=-1)


def expected_loads(original: Path, case: Case) -> Loads:
    """Routed slots of each survivor, by layer of the pruned model."""
    reference = Reference(original, case.cuts, routing=case.routing)
    reference.logits(torch.tensor([TOKENS]))
    cuts = {layer: case.cuts.get(layer, LayerCut()) for layer in reference.layers}
    left = [layer for layer, cut in cuts.items() if cut != DROP_BLOCK]
    loads = {
        new: reference.loads[layer]
        for new, layer in enumerate(left)
        if layer in reference.loads
    }
    assert all(sum(load) % len(TOKENS) == 0 for load in loads.values())
    return loads


@pytest.mark.parametrize("name", CASES)
def test_pruned_checkpoint_computes_what_the_masked_original_does(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    original = make_original(tmp_path / "original", case.layout)
    pruned = make_pruned(original, case)
    assert read_json(pruned / "config.json")["architectures"] == [case.architecture]
    loads: Loads = {}
    found_TV = served(pruned, loads)
    assert_same(found_TV, expected(original, case))
    assert loads == expected_loads(original, case)
    assert (found_TV - expected(original)).abs().max() > 1, "the plan changed nothing"
    if name == "uniform":
        assert_same(found_TV, by_transformers(pruned))


@torch.no_grad()
def by_transformers(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits_TV: Tensor = model(torch.tensor([TOKENS])).logits[0]
    return logits_TV.double().log_softmax(dim=-1)


def test_original_is_pruned_while_loading(tmp_path: Path) -> None:
    original = make_original(tmp_path / "original", WHILE_LOADING.layout)
    plan = make_plan(original, WHILE_LOADING)
    found_TV = served(
        original, load_format="moe_prune", model_loader_extra_config={"plan": str(plan)}
    )
    assert_same(found_TV, expected(original, WHILE_LOADING))


@pytest.mark.parametrize("layout", ["block_sparse_moe.w1w2w3", "mlp.packed"])
def test_pruning_while_loading_gives_the_bytes_that_cut_writes(
    layout: str, tmp_path: Path
) -> None:
    from vllm_moe_prune.plugin.load.loader import pruned_weights

    case = Case(
        {
            layer: LayerCut(
                keep=(2, 5),
                clusters=((0, 2, 7), (1, 3, 4, 5, 6)),
                reconstruct=layer > 1,
                sparsity=0.3,
            )
            for layer in range(4)
        },
        layout,
    )
    original = make_original(tmp_path / "original", layout, "bfloat16")
    written = read_tensors(make_pruned(original, case, slim="magnitude"))
    plan = load_plan(make_plan(original, case, slim="magnitude"))
    loaded = dict(pruned_weights(open_checkpoint(original), plan))
    assert loaded.keys() == written.keys()
    assert all(raw_bytes(loaded[name]) == raw_bytes(written[name]) for name in written)


def test_bfloat16_stays_within_its_own_rounding(tmp_path: Path) -> None:
    """A near-tie of two experts can fall either way, so the mean is what counts."""
    case = CASES["redirect"]
    original = make_original(tmp_path / "original", case.layout, "bfloat16")
    found_TV = served(make_pruned(original, case), dtype="bfloat16")
    assert (found_TV - expected(original, case)).abs().mean().item() < BF16_MEAN
