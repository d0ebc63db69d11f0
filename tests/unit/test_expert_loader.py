"""Which part of each expert a process keeps, dense or in parts, and what is refused;
who runs the layer, and where its weights are in the end.

The layer here has only what is asked of vLLM's: a map of experts and ranks.
"""

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_moe_prune.checkpoint.block_fp8 import ScaleBlocks
from vllm_moe_prune.errors import CheckpointError, ServeError
from vllm_moe_prune.kernels import cpu_library
from vllm_moe_prune.kernels.bitmask import pack
from vllm_moe_prune.kernels.blocks import decode
from vllm_moe_prune.plugin.quant import sparse_moe
from vllm_moe_prune.plugin.quant.expert_loader import ExpertLoader
from vllm_moe_prune.plugin.quant.sparse_moe import MoePruneConfig, SparseMoEMethod

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


def a_layer(ranks: int, rank: int, local: dict[int, int]) -> SimpleNamespace:
    parallel = SimpleNamespace(tp_size=ranks, tp_rank=rank)
    return SimpleNamespace(
        layer_name="model.layers.0.mlp.experts",
        moe_config=SimpleNamespace(
            moe_parallel_config=parallel, in_dtype=torch.bfloat16
        ),
        _map_global_expert_id_to_local_expert_id=lambda e: local.get(e, -1),
    )


def loader(ranks: int, rank: int, local: dict[int, int]) -> ExpertLoader:
    return ExpertLoader(
        a_layer(ranks, rank, local),
        experts=len(local),
        hidden=HIDDEN,
        width=WIDTH // ranks,
        dtype=torch.bfloat16,
    )


def form_of(matrix: Tensor, form: str) -> dict[str, Any]:
    """What of a matrix is stored."""
    if form == "dense":
        return {"weight": matrix}
    packed = pack(matrix)
    return {
        "offsets": packed.offsets_R1,
        "values": packed.values,
        "mask": packed.mask_RB,
    }


def feed(target: ExpertLoader, weights: Weights, form: str) -> dict[int, bool]:
    """Every matrix, those of parts in an order that no checkpoint has.

    As in vLLM, with another default device than the host's: what is made on it by
    mistake has no address, as a GPU's would have none for C++.
    """
    taken = {}
    for (expert, shard), matrix in reversed(weights.items()):
        name = "experts.w2_" if shard == "w2" else "experts.w13_"
        parts = form_of(matrix, form)
        with torch.device("meta"):
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
        with torch.device("meta"):
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


FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("form", ["dense", "parts"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_fp8_brings_its_scales_in_any_order(ranks: int, form: str) -> None:
    scaled, hidden, share = ScaleBlocks(32, 64), 96, 64
    shapes = {"w3": (share * ranks, hidden), "w1": (share * ranks, hidden)}
    shapes["w2"] = (hidden, share * ranks)
    weights, scales, dense = {}, {}, {}
    for shard, shape in shapes.items():
        values = torch.randn(shape).masked_fill(torch.rand(shape) >= 0.5, 0.0)
        weights[shard] = values.to(FP8)
        scales[shard] = torch.rand(scaled.scale_shape(shape)) + 0.5
        dense[shard] = scaled.dequantize(weights[shard], scales[shard], torch.float32)
    for rank in range(ranks):
        target = ExpertLoader(
            a_layer(ranks, rank, {0: 0}),
            experts=1,
            hidden=hidden,
            width=share,
            dtype=torch.bfloat16,
            scaled=scaled,
        )
        # Of gate and down the scales come first, of up last.
        for shard, what in zip(
            ("w2", "w1", "w2", "w1", "w3", "w3"), "sswwws", strict=True
        ):
            name = "experts.w2_" if shard == "w2" else "experts.w13_"
            given = {"weight_scale_inv": scales[shard]}
            if what == "w":
                given = form_of(weights[shard], form)
            # As in feed().
            with torch.device("meta"):
                for part, tensor in given.items():
                    target.load(None, tensor, name + part, shard, 0)
        w13, w2 = target.finished()
        assert w13.values.dtype == FP8
        rows = slice(rank * share, (rank + 1) * share)
        gate, up = decode(w13, 0, 2, (share, hidden), torch.float32)
        (down,) = decode(w2, 0, 1, (hidden, share), torch.float32)
        assert torch.equal(gate, dense["w1"][rows])
        assert torch.equal(up, dense["w3"][rows])
        assert torch.equal(down, dense["w2"][:, rows])


def host_bytes() -> int:
    """Of all tensors in the host's memory that somebody holds."""
    # Not subclasses: fakes of other tests have no storage.
    tensors = [one for one in gc.get_objects() if type(one) is Tensor]
    storages = [one.untyped_storage() for one in tensors if one.device.type == "cpu"]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


@pytest.mark.parametrize("form", ["dense", "parts"])
def test_experts_leave_the_host_one_by_one(form: str) -> None:
    """Meta stands for a GPU: what is there takes no memory of the host's."""
    target = ExpertLoader(
        a_layer(1, 0, {e: e for e in range(8)}),
        experts=8,
        hidden=128,
        width=256,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )
    matrix = torch.ones(256, 128, dtype=torch.bfloat16)
    matrix[:, ::2] = 0
    one = 3 * matrix.nbytes
    before, held = host_bytes(), []
    for expert in range(8):
        for shard in ("w1", "w2", "w3"):
            given = matrix.T.contiguous() if shard == "w2" else matrix
            feed(target, {(expert, shard): given}, form)
            del given
            held.append(host_bytes() - before)
    assert max(held) <= one
    assert held[-1] == 0
    assert {each.masks_EBS.device.type for each in target.finished()} == {"meta"}


def test_fp8_that_does_not_divide_or_is_none_is_refused() -> None:
    sizes = {"experts": 1, "hidden": 64, "dtype": torch.bfloat16}
    layer = a_layer(3, 0, {0: 0})
    for width, scaled in ((48, ScaleBlocks(32, 32)), (64, ScaleBlocks(32, 24))):
        with pytest.raises(ServeError, match="cannot be split"):
            ExpertLoader(layer, width=width, scaled=scaled, **sizes)
    target = ExpertLoader(
        a_layer(1, 0, {0: 0}), width=64, scaled=ScaleBlocks(32, 32), **sizes
    )
    name = "experts.w13_weight"
    with pytest.raises(CheckpointError, match=r"is torch\.float32"):
        target.load(None, torch.zeros(64, 64), name, "w1", 0)
    with pytest.raises(CheckpointError, match=r"scales of w1 have shape \[2, 3\]"):
        target.load(None, torch.ones(2, 3), f"{name}_scale_inv", "w1", 0)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int16])
@pytest.mark.parametrize("group", [None, (2, 4)])
def test_values_that_are_no_weights_are_refused(
    dtype: torch.dtype, group: tuple[int, int] | None
) -> None:
    target = loader(1, 0, {0: 0})
    packed = pack(torch.tensor([1.0, 0, 2, 0]).repeat(WIDTH, HIDDEN // 4), group)
    if packed.offsets_R1 is not None:
        target.load(None, packed.offsets_R1, "experts.w13_offsets", "w1", 0)
    target.load(None, packed.values.to(dtype), "experts.w13_values", "w1", 0)
    with pytest.raises(CheckpointError, match=f"w1: values are {dtype}; expected one"):
        target.load(None, packed.mask_RB, "experts.w13_mask", "w1", 0)


def test_parts_are_brought_from_the_device_they_come_on() -> None:
    """Meta stands for a GPU: nothing can be brought from there."""
    mask = torch.empty(0, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):
        loader(1, 0, {0: 0}).load(None, mask, "experts.w13_mask", "w1", 0)


class Layer(torch.nn.Module):
    """What is loaded and then handed on."""

    use_ep = False
    quant_method: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.__dict__ |= vars(a_layer(1, 0, {e: e for e in range(EXPERTS)}))

    def _replace_quant_method(self, method: Any) -> None:
        self.quant_method = method


class Stock:
    """vLLM's method for dense experts."""

    experts_cls: object = "a kernel"

    def __init__(self, moe: Any) -> None:
        self.shapes: list[torch.Size] = []

    def maybe_roundup_sizes(self, hidden: int, width: int, *_: Any) -> tuple[int, int]:
        return hidden, width

    def process_weights_after_loading(self, layer: Layer) -> None:
        self.shapes = [layer.w13_weight.shape, layer.w2_weight.shape]


class Rounding(Stock):
    """As vLLM's for Blackwell: weights must have been made wider."""

    def maybe_roundup_sizes(self, hidden: int, width: int, *_: Any) -> tuple[int, int]:
        return hidden, -(-width // 128) * 128


def refusing(*arguments: Any) -> Any:
    raise ValueError("kernel requires hidden dimensions divisible by 32")


def none(*arguments: Any) -> Any:
    """What vLLM's chooser for FP8 comes up with on a CPU."""
    return SimpleNamespace(experts_cls=None)


def moe_config(**changes: Any) -> SimpleNamespace:
    swiglu = dict.fromkeys(("swiglu_limit", "swiglu_alpha", "swiglu_beta"))
    plain = {"activation": MoEActivation.SILU, "has_bias": False, **swiglu}
    return SimpleNamespace(**(plain | {"in_dtype": torch.bfloat16} | changes))


def processed(
    weights: Weights, device: str = "cpu", moved_to: str | None = None
) -> Layer:
    """A layer after loading; vLLM makes layers on the device where weights belong."""
    layer, method = Layer(), SparseMoEMethod(moe_config())
    with torch.device(device):
        method.create_weights(layer, EXPERTS, HIDDEN, WIDTH, torch.bfloat16)
    feed(layer.moe_prune_loader, weights, "dense")
    if moved_to is not None:
        for name, parameter in dict(layer.named_parameters()).items():
            moved = torch.empty_like(parameter, device=moved_to)
            layer.register_parameter(name, torch.nn.Parameter(moved, False))
    method.process_weights_after_loading(layer)
    return layer


@pytest.fixture
def full(weights: Weights) -> Weights:
    """Without a zero."""
    return {at: torch.where(matrix == 0, 1.0, matrix) for at, matrix in weights.items()}


def test_weights_end_where_vllm_made_the_layer(
    weights: Weights, full: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_moe, "UnquantizedFusedMoEMethod", Stock)
    # --cpu-offload-gb moves parameters away; ours are empty by then.
    buffers = dict(processed(weights, "meta", moved_to="cpu").named_buffers())
    assert {"w13_values", "w2_values"} < buffers.keys()
    assert {buffer.device.type for buffer in buffers.values()} == {"meta"}
    parameters = dict(processed(full, "meta").named_parameters())
    assert parameters.keys() == {"w13_weight", "w2_weight"}
    assert {each.device.type for each in parameters.values()} == {"meta"}


def test_few_zeros_are_vllms_expert_by_expert(
    full: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []
    gate_up: list[weakref.ref[Any]] = []

    def watched(blocks: Any, expert: int, sources: int, *more: Any) -> list[Tensor]:
        assert not any(one() is not None for one in held), "an expert is still dense"
        if sources == 2:
            gate_up[:] = [weakref.ref(blocks)]
        else:
            assert gate_up[0]() is None, "gate and up are held twice"
        found = decode(blocks, expert, sources, *more)
        held.extend(weakref.ref(matrix) for matrix in found)
        return found

    monkeypatch.setattr(sparse_moe, "UnquantizedFusedMoEMethod", Stock)
    monkeypatch.setattr(sparse_moe, "decode", watched)
    layer = processed(full)
    assert layer.quant_method.shapes == [
        (EXPERTS, 2 * WIDTH, HIDDEN),
        (EXPERTS, HIDDEN, WIDTH),
    ]
    for expert in range(EXPERTS):
        gate, up = layer.w13_weight[expert].chunk(2)
        assert torch.equal(gate, full[expert, "w1"])
        assert torch.equal(up, full[expert, "w3"])
        assert torch.equal(layer.w2_weight[expert], full[expert, "w2"])
    assert not list(layer.buffers())


@pytest.mark.parametrize("stock", [refusing, Rounding])
def test_what_vllm_has_no_kernel_for_stays_compressed(
    stock: Any, full: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_moe, "UnquantizedFusedMoEMethod", stock)
    layer = processed(full)
    assert layer.quant_method is None
    assert layer.moe_prune_width == WIDTH
    assert "w13_masks" in dict(layer.named_buffers())


@pytest.mark.parametrize(
    ("stock", "fp8"),
    [(Stock, False), (refusing, False), (Stock, True), (refusing, True), (none, True)],
)
def test_dense_layers_are_vllms_where_it_has_a_kernel(
    stock: Any, fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_moe, "UnquantizedFusedMoEMethod", stock)
    monkeypatch.setattr(sparse_moe.current_platform, "is_cpu", lambda: True)
    layer = object.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.moe_config = moe_config(moe_parallel_config=SimpleNamespace(use_ep=False))
    theirs = SimpleNamespace(get_quant_method=lambda layer, _: stock(layer))
    scaled = ScaleBlocks(128, 128) if fp8 else None
    config = MoePruneConfig(frozenset({1}), theirs if fp8 else None, scaled)
    config.packed_modules_mapping = {}
    method = config.get_quant_method(layer, "model.layers.1.mlp.experts")
    assert type(method) is (Stock if stock is Stock else SparseMoEMethod)
    if stock is not Stock:
        assert method.scaled == scaled


@pytest.mark.parametrize(
    "changes",
    [
        {"swiglu_limit": 7.0},
        {"swiglu_alpha": 1.702},
        {"swiglu_beta": 1.0},
        {"has_bias": True},
        {"activation": MoEActivation.GELU},
    ],
    ids=str,
)
def test_what_the_kernel_does_not_compute_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ServeError, match="not supported, only silu"):
        SparseMoEMethod(moe_config(**changes))
