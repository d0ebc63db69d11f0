"""Plans for tiny Arctics and DeepSeeks, and what pruned ones should say.

E experts, V vocabulary, T tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.engine import TOKENS, VOCAB, Loads
from tests.reference import DROP_BLOCK, DROP_MOE, Cuts, Ids, LayerCut, write_plan
from tests.reference_families import FamilyReference, Removed
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan

# The other CPU kernels for latent attention are for bfloat16 only.
MLA = {"attention_backend": "CPU_MLA"}
ENGINE = {
    "arctic": {},
    "deepseek": {},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "kimi_k2": MLA,
    "glm4_moe": {},
    "glm4_moe_lite": MLA,
    "minimax_m2": {},
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
}
STOCK = "DeepseekV3ForCausalLM"
OURS = {
    "arctic": "MoePruneArcticForCausalLM",
    "deepseek": "MoePruneDeepseekForCausalLM",
    "deepseek_v2": "MoePruneDeepseekV2ForCausalLM",
    "deepseek_v3": "MoePruneDeepseekV3ForCausalLM",
    "kimi_k2": "MoePruneDeepseekV3ForCausalLM",
    "glm4_moe": "MoePruneGlm4MoeForCausalLM",
    "glm4_moe_lite": "MoePruneGlm4MoeLiteForCausalLM",
    "minimax_m2": "MoePruneMiniMaxM2ForCausalLM",
    "olmoe": "MoePruneOlmoeForCausalLM",
    "qwen2_moe": "MoePruneQwen2MoeForCausalLM",
    "qwen3_moe": "MoePruneQwen3MoeForCausalLM",
}


@dataclass(frozen=True)
class Case:
    """A family's checkpoint, and a plan for it."""

    family: str
    cuts: Cuts = field(default_factory=dict)
    routing: str = "drop"
    architecture: str | None = None
    """What the output must be called; None: our class."""
    config: Mapping[str, Any] = field(default_factory=dict)
    layout: str | None = None
    """How weights are spelt; None: as on the Hub."""

    @property
    def zeros(self) -> Cuts:
        """What the plan makes zero, and nothing else of it."""
        return {
            layer: LayerCut(sparsity=cut.sparsity)
            for layer, cut in self.cuts.items()
            if cut.sparsity
        }


def keep(*ids: int) -> LayerCut:
    """Drop the other experts."""
    return LayerCut(keep=ids)


def clusters(keep: Ids, *members: Ids) -> LayerCut:
    """Let survivors serve their clusters."""
    return LayerCut(keep=keep, clusters=members)


def halved(cut: LayerCut) -> LayerCut:
    """The same, with half of the weights of each survivor zero."""
    return replace(cut, sparsity=0.5)


# Tiny Arctic and DeepSeek-MoE have 8 experts, top-2; V2 and V3 16 in 4 groups, top-4 of
# the 2 best groups. Layer 0 of a DeepSeek is dense.
EIGHT = clusters((7, 0, 3), (4, 7), (0, 1, 2, 5), (3, 6))
SIXTEEN = clusters(
    (9, 0, 14), (2, 4, 9, 10, 11), (0, 1, 5, 8, 12), (3, 6, 7, 13, 14, 15)
)
EQUAL = keep(0, 1, 3, 4, 5, 6, 9, 10, 11, 12, 13, 14)
UNEVEN = keep(0, 1, 2, 3, 4, 7, 8, 9, 10, 13, 14)
UNSORTED = keep(13, 0, 8, 5, 1, 9, 4, 12)
CASES = {
    "arctic-original": Case("arctic", architecture="ArcticForCausalLM"),
    "arctic-every-other-layer": Case(
        "arctic", {1: keep(0, 2, 5)}, config={"moe_layer_frequency": 2}
    ),
    "arctic-one-after-the-other": Case(
        "arctic",
        {0: DROP_MOE, 2: keep(0, 2, 5), 3: keep(4)},
        config={"parallel_attn_mlp_res": False, "use_residual": False},
    ),
    "arctic-everything": Case(
        "arctic", {0: DROP_MOE, 1: EIGHT, 2: DROP_BLOCK}, "redirect"
    ),
    "deepseek-normalized": Case(
        "deepseek",
        {1: keep(0, 2, 3, 5, 7), 2: DROP_MOE, 3: keep(6, 0, 2)},
        config={"norm_topk_prob": True},
    ),
    "deepseek-everything": Case(
        "deepseek", {0: DROP_BLOCK, 1: DROP_MOE, 2: EIGHT}, "redirect"
    ),
    "v2-uneven-groups": Case("deepseek_v2", {1: EQUAL, 2: UNEVEN, 3: UNSORTED}),
    "v2-everything": Case(
        "deepseek_v2", {1: DROP_MOE, 2: SIXTEEN, 3: DROP_BLOCK}, "redirect"
    ),
    "v3-original": Case("deepseek_v3", architecture=STOCK),
    "v3-equal-groups": Case(
        "deepseek_v3", {1: EQUAL, 2: EQUAL, 3: EQUAL}, architecture=STOCK
    ),
    "v3-uneven-groups": Case(
        "deepseek_v3",
        {1: EQUAL, 2: UNEVEN, 3: UNSORTED},
        layout="mlp.packed",
    ),
    "v3-drops": Case("deepseek_v3", {0: DROP_BLOCK, 1: DROP_MOE, 2: UNEVEN}),
    "v3-redirect": Case("deepseek_v3", {1: SIXTEEN, 3: SIXTEEN}, "redirect"),
    "k2-equal": Case("kimi_k2", {1: UNEVEN, 2: UNEVEN, 3: UNEVEN}, architecture=STOCK),
    # vLLM's OLMoE has this epsilon, whatever config.json says.
    "olmoe-equal": Case(
        "olmoe",
        {layer: keep(0, 2, 3, 5, 7) for layer in range(4)},
        architecture="OlmoeForCausalLM",
        config={"rms_norm_eps": 1e-5},
    ),
    "olmoe-drops": Case(
        "olmoe",
        {0: DROP_MOE, 1: DROP_BLOCK, 2: keep(0, 2, 5), 3: keep(6, 0, 2, 1)},
        config={"rms_norm_eps": 1e-5},
    ),
    "qwen3-equal": Case(
        "qwen3_moe",
        {layer: keep(0, 2, 3, 5, 7) for layer in range(4)},
        architecture="Qwen3MoeForCausalLM",
    ),
    # Layers 0 and 2 are dense.
    "qwen3-everything": Case(
        "qwen3_moe",
        {1: EIGHT, 2: DROP_BLOCK, 3: DROP_MOE, 5: EIGHT},
        "redirect",
        config={"decoder_sparse_step": 2, "layers": 6},
        layout="mlp.packed",
    ),
    "glm4-equal": Case(
        "glm4_moe",
        {layer: keep(0, 2, 3, 5, 7) for layer in range(1, 4)},
        architecture="Glm4MoeForCausalLM",
    ),
    "glm4-drops": Case(
        "glm4_moe",
        {0: DROP_BLOCK, 1: DROP_MOE, 2: keep(0, 2, 5), 3: keep(6, 0, 2, 1)},
        config={"num_nextn_predict_layers": 1},
    ),
    # As GLM-4.5 and 4.6 have it, and groups, which no published one has.
    "glm4-uneven-groups": Case(
        "glm4_moe",
        {1: EQUAL, 2: UNEVEN, 3: UNSORTED},
        config={
            **{"experts": 16, "top_k": 4, "n_group": 4, "topk_group": 2},
            **{"use_qk_norm": True, "routed_scaling_factor": 2.5},
        },
        layout="mlp.packed",
    ),
    "glm4-lite-equal": Case(
        "glm4_moe_lite",
        {0: DROP_BLOCK, **{layer: keep(0, 2, 3, 5, 7) for layer in range(1, 4)}},
        architecture="Glm4MoeLiteForCausalLM",
    ),
    "glm4-lite-everything": Case(
        "glm4_moe_lite",
        {1: EIGHT, 2: DROP_BLOCK, 3: DROP_MOE, 4: EIGHT},
        "redirect",
        config={"layers": 5, "num_nextn_predict_layers": 1},
    ),
    "qwen2-equal": Case(
        "qwen2_moe",
        {layer: keep(0, 2, 3, 5, 7) for layer in range(4)},
        architecture="Qwen2MoeForCausalLM",
    ),
    "qwen2-drops": Case(
        "qwen2_moe",
        {0: DROP_MOE, 1: keep(0, 2, 5), 2: DROP_BLOCK, 3: keep(6, 0, 2, 1)},
    ),
    "m2-drops": Case(
        "minimax_m2",
        {0: DROP_MOE, 1: keep(0, 2, 5), 2: DROP_BLOCK, 3: keep(6, 0, 2, 1)},
        config={"kv_heads": 2},
        layout="mlp.packed",
    ),
    "k2-drops": Case(
        "kimi_k2",
        {0: DROP_BLOCK, 1: DROP_MOE, 2: UNEVEN},
        config={"num_nextn_predict_layers": 1},
    ),
}
# Half of the weights in the experts of layers 1 and 2 become zero; layer 3 stays dense.
HALF = LayerCut(sparsity=0.5)
COMPRESSED = {
    "arctic": Case("arctic", {0: DROP_MOE, 1: halved(keep(0, 2, 5)), 2: HALF}),
    "deepseek": Case("deepseek", {1: halved(EIGHT), 2: HALF}, "redirect"),
    "v2": Case("deepseek_v2", {1: halved(EQUAL), 2: halved(UNEVEN), 3: DROP_BLOCK}),
    "v3": Case("deepseek_v3", {1: halved(UNSORTED), 2: HALF}, layout="mlp.packed"),
}


def make_original(folder: Path, case: Case) -> Path:
    # Stock vLLM takes one epsilon for all norms, transformers 1e-6 for the latent ones.
    options = {"dtype": "float32", "rms_norm_eps": 1e-6, "vocab": VOCAB}
    return tiny_checkpoint(
        folder,
        model_type=case.family,
        layout=case.layout,
        tokenizer=False,
        **(options | dict(case.config)),
    )


def make_plan(original: Path, case: Case) -> Path:
    path, source = original.with_name("plan.json"), open_checkpoint(original)
    slim = "magnitude" if case.zeros else "none"
    return write_plan(path, source, case.cuts, routing=case.routing, slim=slim)


def make_pruned(folder: Path, case: Case) -> tuple[Path, Tensor, Loads]:
    """A pruned checkpoint, what it should say [T, V], and where tokens should go."""
    original = make_original(folder / "original", case)
    reference = make_reference(folder / "reference", case)
    expected_TV = said_by(reference)
    if not case.cuts:
        return original, expected_TV, loads_of(original, reference)
    pruned = folder / "pruned"
    execute_plan(
        open_checkpoint(original), load_plan(make_plan(original, case)), pruned
    )
    return pruned, expected_TV, loads_of(pruned, reference)


def said_by(reference: FamilyReference) -> Tensor:
    """Log-probabilities [T, V], in float64."""
    return reference.logits(torch.tensor([TOKENS]))[0].log_softmax(dim=-1)


def loads_of(folder: Path, reference: FamilyReference) -> Loads:
    """What the reference routed where, by layers and experts of a checkpoint."""
    checkpoint = open_checkpoint(folder)
    loads: Loads = {}
    for layer in checkpoint.decoder_layers:
        if not layer.has_moe:
            continue
        source, kept = layer.index, tuple(range(layer.num_experts))
        if checkpoint.remap is not None:
            entry = checkpoint.remap.layers[layer.index]
            source, kept = entry.original_layer, entry.kept
        loads[layer.index] = [reference.loads[source][expert] for expert in kept]
    return loads


def make_reference(folder: Path, case: Case) -> FamilyReference:
    """The masked original."""
    original = make_original(folder, replace(case, layout=None))
    if case.zeros:
        # Experts are made zero one by one, whatever becomes of the others.
        only_zeros = make_plan(original, replace(case, cuts=case.zeros, routing="drop"))
        original = folder.with_name(f"{folder.name}-zeros")
        execute_plan(open_checkpoint(folder), load_plan(only_zeros), original)
    actions = {layer: each.action for layer, each in case.cuts.items()}
    kept = {
        layer: each.keep
        for layer, each in case.cuts.items()
        if each.keep is not None and each.clusters is None
    }
    served_by = {
        layer: {
            member: survivor
            for survivor, members in zip(each.keep, each.clusters, strict=True)
            for member in members
        }
        for layer, each in case.cuts.items()
        if each.keep is not None and each.clusters is not None
    }
    removed = Removed(
        keep=kept,
        moe=tuple(layer for layer, each in actions.items() if each == "drop-moe"),
        blocks=tuple(layer for layer, each in actions.items() if each == "drop-block"),
        redirect=served_by,
    )
    return FamilyReference(original, removed)
