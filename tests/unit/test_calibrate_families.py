"""The streaming forward of each family against transformers' own, or plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.reference_families import FamilyReference
from tests.streamed import hidden_states, streamed_loss
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.calibrate.accumulate import measure
from vllm_moe_prune.calibrate.data import TokenReader, Tokens
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import run_layer
from vllm_moe_prune.checkpoint.reader import read_tensor
from vllm_moe_prune.checkpoint.source import open_checkpoint


@pytest.fixture(scope="module")
def tokens_ST() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 512, (3, 48), generator=generator)


@torch.no_grad()
def transformers_loss(folder: Path, tokens_ST: torch.Tensor, dtype: str) -> float:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    )
    return float(model.eval()(tokens_ST, labels=tokens_ST).loss)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2": ("deepseek_v2", {}),
    "v2-lite": (
        "deepseek_v2",
        {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    ),
    "v2-query-lora": ("deepseek_v2", {"q_lora_rank": 24, "first_k_dense_replace": 2}),
    "olmoe": ("olmoe", {}),
    # Not a field of these families, whose attention sees everything.
    "olmoe-stray-window": ("olmoe", {"sliding_window": 8}),
    "v3-stray-window": ("deepseek_v3", {"sliding_window": 8}),
    "qwen3-window": (
        "qwen3_moe",
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
    ),
    "glm4": ("glm4_moe", {}),
    "glm4-lite": ("glm4_moe_lite", {}),
    "glm4-lite-saved": (
        "glm4_moe_lite",
        {
            "mlp_layer_types": ["sparse", "dense", "sparse"],
            "first_k_dense_replace": None,
        },
    ),
    "glm4-norms-groups": (
        "glm4_moe",
        {"use_qk_norm": True, "n_group": 2, "routed_scaling_factor": 2.5},
    ),
    "m2": ("minimax_m2", {}),
    "m2-packed": ("minimax_m2", {"layout": "mlp.packed", "heads": 4, "kv_heads": 2}),
    "qwen2": ("qwen2_moe", {}),
    "qwen2-every-second": (
        "qwen2_moe",
        {"decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "qwen3": ("qwen3_moe", {}),
    "qwen3-every-second": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "v3": ("deepseek_v3", {}),
    "v3-two-shared": ("deepseek_v3", {"n_shared_experts": 2, "q_lora_rank": None}),
    "v3-not-normalized": ("deepseek_v3", {"norm_topk_prob": False}),
    "moonlight": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "v3-packed": ("deepseek_v3", {"layout": "mlp.packed"}),
    "v3-yarn": (
        "deepseek_v3",
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            }
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_is_that_of_transformers(
    variant: str, tmp_path: Path, tokens_ST: torch.Tensor
) -> None:
    model_type, options = VARIANTS[variant]
    folder = tiny_checkpoint(
        tmp_path, model_type=model_type, dtype="float32", shards=1, layers=3, **options
    )
    reference = transformers_loss(folder, tokens_ST, "float32")
    assert abs(reference - torch.tensor(512.0).log()) > 0.1
    assert streamed_loss(folder, tokens_ST).mean == pytest.approx(reference, rel=1e-5)


OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "arctic": ("arctic", {}),
    "arctic-every-second": ("arctic", {"moe_layer_frequency": 2, "layers": 4}),
    "arctic-not-parallel": ("arctic", {"parallel_attn_mlp_res": False}),
    "arctic-top-1": ("arctic", {"top_k": 1}),
    "v1": ("deepseek", {}),
    "v1-normalized": ("deepseek", {"norm_topk_prob": True, "kv_heads": 2}),
    "v1-every-second": ("deepseek", {"moe_layer_freq": 2, "layers": 4}),
    # transformers' V2 never normalizes, vLLM and the published code do.
    "v2": ("deepseek_v2", {}),
    "v2-normalized": ("deepseek_v2", {"norm_topk_prob": True}),
    "v3": ("deepseek_v3", {}),
    "v3-fp8": ("deepseek_v3", {"fp8": (16, 32)}),
    "qwen3-fp8": ("qwen3_moe", {"fp8": (16, 32)}),
    "qwen2": ("qwen2_moe", {}),
    "m2-fp8": ("minimax_m2", {"fp8": (16, 32)}),
    "k2-fp8": ("kimi_k2", {"fp8": (16, 32)}),
}


@pytest.mark.parametrize("variant", OWN)
def test_the_loss_is_that_of_plain_float64(
    variant: str, tmp_path: Path, tokens_ST: torch.Tensor
) -> None:
    model_type, options = OWN[variant]
    options = {"layers": 3, "shards": 1, "dtype": "float32"} | options
    folder = tiny_checkpoint(tmp_path, model_type=model_type, **options)
    ids_ST = tokens_ST[:2, :24]  # the reference takes one token at a time
    reference = FamilyReference(folder).loss(ids_ST)
    assert streamed_loss(folder, ids_ST).mean == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "glm4_moe_lite"])
def test_an_mtp_layer_predicts_as_plain_float64_does(
    family: str, tmp_path: Path, tokens_ST: torch.Tensor
) -> None:
    folder = tiny_checkpoint(
        tmp_path,
        model_type=family,
        layers=2,
        dtype="float32",
        num_nextn_predict_layers=1,
    )
    ids_ST = tokens_ST[:2, :24]
    checkpoint = open_checkpoint(folder)
    model = StreamingModel(checkpoint)
    hidden_STD = hidden_states(model, ids_ST)
    assert model.forward_passes == 1
    hidden_STD = model.further(2, hidden_STD, ids_ST)
    assert hidden_STD.shape[1] == ids_ST.shape[1] - 1
    run_layer(model, 2, hidden_STD)
    weights = {
        name: read_tensor(checkpoint.tensors[f"model.layers.2.shared_head.{name}"])
        for name in ("norm.weight", "head.weight")
    }
    scale = (hidden_STD.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    logits = hidden_STD * scale * weights["norm.weight"] @ weights["head.weight"].T
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids_ST[:, 2:].flatten()
    )
    expected = FamilyReference(folder).mtp_loss(ids_ST)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert model.forward_passes == 1


def test_an_mtp_layer_is_measured_in_the_same_pass(tmp_path: Path) -> None:
    folder = tiny_checkpoint(
        tmp_path, model_type="deepseek_v3", layers=2, num_nextn_predict_layers=1
    )
    ids_ST = torch.randint(3, 512, (4, 32))
    stats = measure(
        open_checkpoint(folder),
        tokens=Tokens(ids_ST=ids_ST, source="random", sha256="0" * 64),
        fields=frozenset({"weighted_norm_sum_E", "block_cosine_HH", "block_tokens"}),
    )
    assert stats.forward_passes == 1
    assert sorted(stats.layers) == [1, 2]
    assert float(stats.layers[1].tokens) == 4 * 32
    # The last token of a sequence has none behind it.
    assert float(stats.layers[2].tokens) == 4 * 31
    assert stats.layers[2].routed_E.sum() == 4 * 31 * 4
    assert stats.layers[2].weighted_norm_sum_E.sum() > 0
    assert stats.block_cosine_HH.shape == (3, 3)


def test_a_family_that_transformers_lacks_reads_text_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint(tmp_path, model_type="deepseek", layers=2)
    text = tiny_text(tmp_path, characters=2000)
    reader = TokenReader(open_checkpoint(folder), str(text))
    assert len(reader.read(64)) == 64
    assert capfd.readouterr().err == ""
