"""Which part of each integer expert a process keeps, and what is refused.

The layer here has only what the loader asks of vLLM's: a map of experts and ranks.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.test_expert_loader import a_layer
from vllm_moe_prune.errors import CheckpointError, ServeError
from vllm_moe_prune.kernels import int_blocks
from vllm_moe_prune.kernels.quantized import (
    PACKED,
    Form,
    Quantized,
    dequantize,
    pack,
    quantize_by,
    scales_of,
)
from vllm_moe_prune.plugin.quant import integer_moe
from vllm_moe_prune.plugin.quant.activations import are_rounded
from vllm_moe_prune.plugin.quant.integer_moe import IntegerMethod, fits
from vllm_moe_prune.plugin.quant.integer_op import integer_moe as run

HIDDEN, WIDTH, EXPERTS = 64, 96, 3
SHAPES = {"w1": (WIDTH, HIDDEN), "w3": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH)}
FORMS = [
    *(Form("int4", 32), Form("int4", 32, zero_point=True)),
    *(Form("int4"), Form("int8")),
]
Expert = dict[str, Quantized]

pytestmark = pytest.mark.skipif(
    not integer_moe.cpu_library.runs_integers(), reason="the kernel needs AVX2"
)


def experts_in(form: Form) -> list[Expert]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(EXPERTS):
        expert = {}
        for shard, shape in SHAPES.items():
            weight = torch.randn(shape, generator=generator) * 0.1
            scales = scales_of(weight, form, torch.float32)
            values = quantize_by(weight, scales, form).to(torch.int8)
            expert[shard] = Quantized(values, scales)
        made.append(expert)
    return made


class Layer(torch.nn.Module):
    """One process's, after loading, as vLLM runs it."""

    def __init__(
        self,
        form: Form,
        experts: list[Expert],
        ranks: int,
        rank: int,
        here: list[int],
        *,
        rounded: bool = False,
    ) -> None:
        super().__init__()
        self.__dict__ |= vars(
            a_layer(ranks, rank, {e: at for at, e in enumerate(here)})
        )
        method = object.__new__(IntegerMethod)
        method.form, method.rounded = form, rounded
        method._parts = tuple(form.parts(8, 8, "BF16"))
        method.create_weights(self, len(here), HIDDEN, WIDTH // ranks, torch.float32)
        for at, expert in enumerate(experts):
            for shard, matrix in expert.items():
                parts = pack(matrix, form)
                # Another default device than the host's, as in vLLM on a GPU.
                with torch.device("meta"):
                    for part, tensor in parts.items():
                        self.moe_prune_loader.load(None, tensor, f"x_{part}", shard, at)
        with torch.device("meta"):
            method.process_weights_after_loading(self)
        self.expert_map = torch.full((len(experts),), -1, dtype=torch.int32)
        self.expert_map[here] = torch.arange(len(here), dtype=torch.int32)

    def run(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        found: Tensor = run(
            *(x_TD, weights_TK, ids_TK, self.expert_map),
            *(self.w13_values, self.w13_scales, self.w13_zeros),
            *(self.w2_values, self.w2_scales, self.w2_zeros),
            *(self.moe_prune_bits, self.moe_prune_width, self.moe_prune_dots),
        )
        return found


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(7, HIDDEN, generator=generator)
    weights_TK = torch.rand(7, 2, generator=generator)
    scores_TE = torch.rand(7, EXPERTS, generator=generator)
    return x_TD, weights_TK, scores_TE.topk(2).indices.to(torch.int32)


def expected(form: Form, experts: list[Expert]) -> Tensor:
    x_TD, weights_TK, ids_TK = inputs()
    out_TD = torch.zeros_like(x_TD)
    for token in range(len(x_TD)):
        for slot in range(2):
            expert = experts[int(ids_TK[token, slot])]
            gate, up, down = (
                dequantize(expert[shard], form, torch.float32)
                for shard in ("w1", "w3", "w2")
            )
            inner = torch.nn.functional.silu(gate @ x_TD[token]) * (up @ x_TD[token])
            out_TD[token] += weights_TK[token, slot] * (down @ inner)
    return out_TD


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.words)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_widths_of_all_processes_add_up(form: Form, ranks: int) -> None:
    experts = experts_in(form)
    layers = [Layer(form, experts, ranks, rank, [0, 1, 2]) for rank in range(ranks)]
    total_TD = sum(layer.run(*inputs()) for layer in layers)
    assert torch.allclose(total_TD, expected(form, experts), atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.words)
@pytest.mark.parametrize("ranks", [1, 3])
def test_tokens_are_rounded_the_same_in_all_processes(form: Form, ranks: int) -> None:
    experts = experts_in(form)
    layers = [
        Layer(form, experts, ranks, rank, [0, 1, 2], rounded=True)
        for rank in range(ranks)
    ]
    assert all(layer.moe_prune_dots for layer in layers)
    total_TD = sum(layer.run(*inputs()) for layer in layers)
    exact_TD = expected(form, experts)
    error = (total_TD - exact_TD).abs().max() / exact_TD.abs().max()
    assert 1e-4 < error < 2e-2
    whole = Layer(form, experts, 1, 0, [0, 1, 2], rounded=True).run(*inputs())
    assert torch.allclose(total_TD, whole, atol=1e-3)


def test_groups_that_a_step_does_not_fit_into_stay_exact() -> None:
    form = FORMS[0]
    experts = experts_in(form)
    layers = [
        Layer(form, experts, 4, rank, [0, 1, 2], rounded=True) for rank in range(4)
    ]
    assert [layer.moe_prune_dots for layer in layers] == [0] * 4
    total_TD = sum(layer.run(*inputs()) for layer in layers)
    assert torch.allclose(total_TD, expected(form, experts), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "dtype", "rounded"),
    [
        ({}, torch.bfloat16, True),
        (object(), torch.float16, True),
        ({}, torch.float32, False),
        ({"moe_prune_activations": "rounded"}, torch.float32, True),
        ({"moe_prune_activations": "exact"}, torch.bfloat16, False),
    ],
)
def test_users_choose_whether_tokens_are_rounded(
    config: Any, dtype: torch.dtype, rounded: bool
) -> None:
    assert are_rounded(SimpleNamespace(additional_config=config), dtype) == rounded


def test_other_words_for_rounding_are_refused() -> None:
    config = SimpleNamespace(additional_config={"moe_prune_activations": 8})
    with pytest.raises(ServeError, match="is 8; use 'rounded' or 'exact'"):
        are_rounded(config, torch.bfloat16)


def test_experts_of_all_processes_add_up() -> None:
    form = FORMS[1]
    experts = experts_in(form)
    layers = [Layer(form, experts, 1, 0, here) for here in ([2], [0, 1])]
    assert [len(layer.w13_values) for layer in layers] == [1, 2]
    total_TD = sum(layer.run(*inputs()) for layer in layers)
    assert torch.allclose(total_TD, expected(form, experts), atol=1e-5)


def test_a_group_may_be_larger_than_any_row() -> None:
    experts = experts_in(Form("int4"))
    huge = Form("int4", 1 << 60)
    layers = [Layer(huge, experts, 2, rank, [0, 1, 2]) for rank in range(2)]
    total_TD = sum(layer.run(*inputs()) for layer in layers)
    assert torch.allclose(total_TD, expected(Form("int4"), experts), atol=1e-5)


def test_they_stay_as_small_as_they_are() -> None:
    layer = Layer(Form("int4", 32), experts_in(Form("int4", 32)), 1, 0, [0, 1, 2])
    held = sum(buffer.nbytes for buffer in layer.buffers())
    weights = EXPERTS * 3 * HIDDEN * WIDTH
    assert held == weights // 2 + weights // 32 * 4
    assert not list(layer.parameters())


def test_an_expert_that_is_missing_or_misshapen_is_named() -> None:
    form = FORMS[0]
    experts = experts_in(form)
    with pytest.raises(ServeError, match=r"expert 2 \(w1\) did not arrive"):
        Layer(form, experts[:2], 1, 0, [0, 1, 2])
    loaded = integer_moe.IntegerLoader(
        a_layer(1, 0, {0: 0}), form, experts=1, hidden=HIDDEN, width=WIDTH
    )
    parts = pack(experts[0]["w1"], form)
    with pytest.raises(CheckpointError, match=r"\[96, 7\], expected \[96, 8\]"):
        loaded.load(None, parts[PACKED][:, 1:], f"x_{PACKED}", "w1", 0)


@pytest.mark.parametrize(
    ("form", "changes", "fit"),
    [
        (Form("int4", 32), {}, True),
        (Form("int8"), {}, True),
        (Form("fp8"), {}, False),
        (Form("int4", 32), {"has_bias": True}, False),
        (Form("int4", 32), {"swiglu_limit": 7.0}, False),
        (Form("int4", 32), {"swiglu_alpha": 1.702}, False),
        (Form("int4", 32), {"intermediate_size_per_partition": 12}, False),
    ],
)
def test_what_the_kernel_runs(form: Form, changes: dict[str, Any], fit: bool) -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    moe = {
        "intermediate_size_per_partition": 64,
        "activation": MoEActivation.SILU,
        "has_bias": False,
        "swiglu_limit": None,
        "swiglu_alpha": None,
        "swiglu_beta": None,
    }
    assert fits(SimpleNamespace(**(moe | changes)), form) == fit


def test_the_op_tells_the_compiler_the_truth() -> None:
    layer = Layer(FORMS[1], experts_in(FORMS[1]), 1, 0, [0, 1, 2])
    blocks = int_blocks.IntBlocks(layer.w13_values, layer.w13_scales, None, 4)
    assert blocks.inputs == HIDDEN
    arguments = (
        *(*inputs(), layer.expert_map),
        *(layer.w13_values, layer.w13_scales, layer.w13_zeros),
        *(layer.w2_values, layer.w2_scales, layer.w2_zeros),
        *(4, WIDTH, 0),
    )
    torch.library.opcheck(run, arguments)
