"""Packed experts taken apart for vLLM, dense and compressed. E experts."""

import pytest
import torch
from torch import Tensor

from vllm_moe_prune.errors import CheckpointError
from vllm_moe_prune.kernels.bitmask import Bitmask, check, pack, unpack
from vllm_moe_prune.plugin.load.packed import one_by_one

EXPERTS, HIDDEN, WIDTH = 3, 16, 24
MOE = "model.layers.1.mlp."
NAMES = ("w1", "w3", "w2")


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Half of every group of two is zero; all of expert 0's."""
    made = {}
    for name, shape in (
        ("gate_up_proj", (EXPERTS, 2 * WIDTH, HIDDEN)),
        ("down_proj", (EXPERTS, HIDDEN, WIDTH)),
    ):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        tensor[..., ::2] = 0
        tensor[0] = 0
        made[f"{MOE}experts.{name}"] = tensor.bfloat16()
    return made


def in_parts(
    tensors: dict[str, Tensor], group: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """As files hold them: the rows of all experts, one after the other."""
    parts = {}
    for name, tensor in tensors.items():
        packed = pack(tensor.flatten(0, 1), group)
        parts[f"{name}.mask"] = packed.mask_RB.unflatten(0, tensor.shape[:2])
        parts[f"{name}.values"] = packed.values
        if packed.offsets_R1 is not None:
            parts[f"{name}.offsets"] = packed.offsets_R1
    return parts


def matrices(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every expert has."""
    gate_up = tensors[f"{MOE}experts.gate_up_proj"]
    down = tensors[f"{MOE}experts.down_proj"]
    found = {}
    for expert in range(EXPERTS):
        each = f"{MOE}experts.{expert}."
        gate, up = gate_up[expert].chunk(2)
        found |= {each + "w1": gate, each + "w3": up, each + "w2": down[expert]}
    return found


def test_dense_ones_are_sliced_and_others_pass(tensors: dict[str, Tensor]) -> None:
    router = (f"{MOE}gate.weight", torch.zeros(EXPERTS, HIDDEN))
    found = dict(one_by_one([router, *tensors.items()], *NAMES))
    assert found.pop(router[0]) is router[1]
    expected = matrices(tensors)
    assert found.keys() == {f"{name}.weight" for name in expected}
    for name, matrix in expected.items():
        assert torch.equal(found[f"{name}.weight"], matrix)


@pytest.mark.parametrize("group", [None, (1, 2)])
def test_compressed_ones_are_what_each_expert_would_be(
    tensors: dict[str, Tensor], group: tuple[int, int] | None
) -> None:
    parts = in_parts(tensors, group)
    found = dict(one_by_one(reversed(parts.items()), *NAMES))
    expected = matrices(tensors)
    for name, matrix in expected.items():
        packed = Bitmask(
            found.pop(f"{name}.mask"),
            found.pop(f"{name}.values"),
            found.pop(f"{name}.offsets", None),
        )
        check(packed, (matrix.shape[0], matrix.shape[1]), name)
        assert torch.equal(unpack(packed), matrix)
    assert not found


def test_parts_are_brought_from_the_device_they_come_on(
    tensors: dict[str, Tensor],
) -> None:
    """Meta stands for a GPU: nothing can be brought from there."""
    name, mask = f"{MOE}experts.down_proj.mask", torch.empty(0, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):
        list(one_by_one([(name, mask)], *NAMES))


def test_missing_and_misshapen_parts_are_refused(tensors: dict[str, Tensor]) -> None:
    name = f"{MOE}experts.down_proj"
    for part, says in (("mask", "no mask"), ("offsets", "no offsets")):
        parts = in_parts(tensors)
        del parts[f"{name}.{part}"]
        with pytest.raises(CheckpointError, match=says):
            list(one_by_one(parts.items(), *NAMES))
    for part, damage in (
        ("mask", lambda t: t.flatten(0, 1)),
        ("offsets", lambda t: t[1:]),
        ("values", lambda t: t.repeat(9)),
    ):
        parts = in_parts(tensors)
        parts[f"{name}.{part}"] = damage(parts[f"{name}.{part}"])
        with pytest.raises(CheckpointError, match="down_proj"):
            list(one_by_one(parts.items(), *NAMES))
