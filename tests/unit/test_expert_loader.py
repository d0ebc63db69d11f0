"""Which part of each expert a process keeps, dense or in parts, and what is refused.

The layer here has only what the loader asks of vLLM's: a map of experts and ranks.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_moe_prune.errors import CheckpointError, ServeError
from vllm_moe_prune.kernels import cpu_library
from vllm_moe_prune.kernels.bitmask import pack
from vllm_moe_prune.kernels.blocks import decode
from vllm_moe_prune.plugin.expert_loader import ExpertLoader

HIDDEN, WIDTH, EXPERTS = 32, 48, 3
SHAPES = {"w1": (WIDTH, HIDDEN), "w3": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH)}
Weights = dict[tuple[int, str], Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for expert in range(EXPERTS):
        for shard, shape in SHAPES.items():
            matrix = torch.randn(shape, generator=generator)
            matrix[torch.rand(shape, generator=generator) < 0.5] = 0
            made[expert, shard] = matrix.bfloat16()
    return made


def loader(ranks: int, rank: int, local: dict[int, int]) -> ExpertLoader:
    parallel = SimpleNamespace(tp_size=ranks, tp_rank=rank)
    layer = SimpleNamespace(
        layer_name="model.layers.0.mlp.experts",
        moe_config=SimpleNamespace(moe_parallel_config=parallel),
        _map_global_expert_id_to_local_expert_id=lambda e: local.get(e, -1),
    )
    return ExpertLoader(
        layer,
        experts=len(local),
        hidden=HIDDEN,
        width=WIDTH // ranks,
        dtype=torch.bfloat16,
    )


def feed(target: ExpertLoader, weights: Weights, form: str) -> dict[int, bool]:
    """Every matrix, those of parts in an order that no checkpoint has."""
    taken = {}
    for (expert, shard), matrix in reversed(weights.items()):
        name = "experts.w2_" if shard == "w2" else "experts.w13_"
        parts: dict[str, Any] = {"weight": matrix}
        if form == "parts":
            packed = pack(matrix)
            parts = {"offsets": packed.offsets_R1, "values": packed.values}
            parts["mask"] = packed.mask_RB
        for part, tensor in parts.items():
            taken[expert] = target.load(None, tensor, name + part, shard, expert)
    return taken


@pytest.mark.parametrize("form", ["dense", "parts"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_together_hold_every_expert_once(
    ranks: int, form: str, weights: Weights
) -> None:
    share = WIDTH // ranks
    for rank in range(ranks):
        target = loader(ranks, rank, {e: e for e in range(EXPERTS)})
        assert all(feed(target, weights, form).values())
        w13, w2 = target.finished()
        rows = slice(rank * share, (rank + 1) * share)
        for expert in range(EXPERTS):
            gate, up = decode(w13, expert, 2, (share, HIDDEN))
            (down,) = decode(w2, expert, 1, (HIDDEN, share))
            assert torch.equal(gate, weights[expert, "w1"][rows])
            assert torch.equal(up, weights[expert, "w3"][rows])
            assert torch.equal(down, weights[expert, "w2"][:, rows])


@pytest.mark.parametrize("form", ["dense", "parts"])
def test_experts_of_other_processes_are_left_to_them(
    form: str, weights: Weights
) -> None:
    local = {2: 0, 0: 1}
    target = loader(1, 0, local)
    assert feed(target, weights, form) == {0: True, 1: False, 2: True}
    w13, w2 = target.finished()
    for expert, index in local.items():
        gate, _ = decode(w13, index, 2, (WIDTH, HIDDEN))
        assert torch.equal(gate, weights[expert, "w1"])
        (down,) = decode(w2, index, 1, (HIDDEN, WIDTH))
        assert torch.equal(down, weights[expert, "w2"])


def test_processes_with_some_experts_each_add_up(weights: Weights) -> None:
    x_TD = torch.randn(5, HIDDEN).bfloat16()
    ids_TK = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]], dtype=torch.int32)
    weights_TK = torch.rand(5, 2)
    found = []
    for local in ({0: 0, 1: 1, 2: 2}, {1: 0}, {2: 0, 0: 1}):
        target = loader(1, 0, local)
        feed(target, weights, "dense")
        expert_map = torch.tensor([local.get(e, -1) for e in range(EXPERTS)])
        here_TD = cpu_library.fused_moe(
            x_TD, weights_TK, ids_TK, expert_map, *target.finished(), WIDTH
        )
        found.append(here_TD.float())
    whole_TD, *parts = found
    error = (whole_TD - sum(parts)).abs().max()
    assert error < 0.02 * whole_TD.abs().max()


def test_a_missing_expert_is_noticed(weights: Weights) -> None:
    target = loader(1, 0, {e: e for e in range(EXPERTS)})
    feed(target, {key: weights[key] for key in weights if key[0] != 1}, "dense")
    with pytest.raises(ServeError, match="did not arrive"):
        target.finished()


def test_wrong_shapes_and_contradicting_parts_are_refused(weights: Weights) -> None:
    target = loader(1, 0, {0: 0})
    with pytest.raises(CheckpointError, match="shape"):
        target.load(None, weights[0, "w2"], "experts.w13_weight", "w1", 0)
    packed = pack(weights[0, "w1"])
    target.load(None, packed.values, "experts.w13_values", "w1", 0)
    target.load(None, packed.starts_R1.flip(0), "experts.w13_offsets", "w1", 0)
    with pytest.raises(CheckpointError, match="offsets"):
        target.load(None, packed.mask_RB, "experts.w13_mask", "w1", 0)
