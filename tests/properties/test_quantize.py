"""Every quantizer equals its definition, written down again value by value.

R rows, D columns.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_moe_prune.errors import CalibrationError, CheckpointError
from vllm_moe_prune.kernels.quantized import (
    PACKED,
    SCALE,
    SHAPE,
    ZERO,
    Form,
    Quantized,
    dequantize,
    pack,
    unpack,
)
from vllm_moe_prune.slim import awq
from vllm_moe_prune.slim.gptq import gptq
from vllm_moe_prune.slim.rtn import rtn

SEEDS = st.integers(0, 10**6)
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
INT4 = st.builds(
    Form, st.just("int4"), st.sampled_from([32, 64, 128]), zero_point=st.booleans()
)
FORMS = INT4 | st.sampled_from([Form("int8"), Form("fp8", 128), Form("fp8")])
CODES = np.array([code for code in range(256) if code & 0x7F != 0x7F])
E4M3 = torch.tensor(CODES, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(seed: int, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different sizes, one group of zeros, one without a sign change."""
    weight = random(seed, rows, cols) * torch.logspace(-2, 1, rows)[:, None]
    weight[0, :32] = 0
    weight[-1] = weight[-1].abs()
    return weight.to(dtype)


def nearest_e4m3(values: np.ndarray) -> np.ndarray:
    """Of the two nearest the one with the even code, as IEEE rounds."""
    distance = np.abs(values.astype(np.float64)[..., None] - E4M3)
    nearest = distance == distance.min(-1, keepdims=True)
    return E4M3[(nearest * (2 - CODES % 2)).argmax(-1)]


def naive(weight_RD: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, scales and zero points of rounding to nearest, group by group."""
    rows, cols = weight_RD.shape
    high = form.group_size if form.is_blocked else 1
    wide = form.group_size or cols
    values = torch.zeros(rows, cols)
    scales = torch.zeros(-(-rows // high), -(-cols // wide), dtype=weight_RD.dtype)
    zeros = torch.zeros(scales.shape, dtype=torch.int8) if form.zero_point else None
    for down in range(scales.shape[0]):
        for across in range(scales.shape[1]):
            part = (
                slice(down * high, (down + 1) * high),
                slice(across * wide, (across + 1) * wide),
            )
            group = weight_RD[part].float().numpy()
            low, most = min(group.min(), 0), max(group.max(), 0)
            most = most if most > low else np.float32(torch.finfo(torch.float32).eps)
            size = np.float32(max(-low, most))
            shift = 0.0
            if form.bits == "fp8":
                scale = size / np.float32(448)
            elif form.bits == "int8":
                scale = size / np.float32(127.5)
            elif form.zero_point:
                scale = np.float32(most - low) / np.float32(15)
            else:
                scale = size / np.float32(7.5)
            if zeros is not None:
                shift = float(np.rint(np.clip(-8 - np.float32(low) / scale, -8, 7)))
                zeros[down, across] = int(shift)
            scales[down, across] = float(scale)
            if scales[down, across] == 0:  # too small for float16
                scales[down, across] = 2.0**-24
            kept = np.float32(scales[down, across].float().item())
            scaled = group / kept
            if form.bits == "fp8":
                rounded = nearest_e4m3(scaled)
            else:
                least = -128 if form.bits == "int8" else -8
                rounded = np.clip(np.rint(scaled + shift), least, -least - 1)
            values[part] = torch.from_numpy(rounded.astype(np.float32))
    return values, scales, zeros


@settings(max_examples=60)
@given(seed=SEEDS, form=FORMS, dtype=DTYPES, blocks=st.integers(1, 2))
def test_rounding_to_nearest(
    seed: int, form: Form, dtype: torch.dtype, blocks: int
) -> None:
    rows, cols = (130 if form.is_blocked else 8), 128 * blocks
    weight_RD = weights(seed, rows, cols, dtype)
    found = rtn(weight_RD, form)
    values, scales, zeros = naive(weight_RD, form)
    assert found.scales.scale_RG.dtype == dtype
    assert torch.equal(found.scales.scale_RG, scales)
    assert torch.equal(found.values_RC.float(), values)
    if zeros is None:
        assert found.scales.zero_RG is None
    else:
        assert found.scales.zero_RG is not None
        assert torch.equal(found.scales.zero_RG, zeros)


@settings(max_examples=40)
@given(seed=SEEDS, form=FORMS, dtype=DTYPES)
def test_what_is_stored_is_what_was_quantized(
    seed: int, form: Form, dtype: torch.dtype
) -> None:
    weight_RD = weights(seed, 128, 256, dtype)
    matrix = rtn(weight_RD, form)
    stored = pack(matrix, form)
    kinds = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    wanted = form.parts(128, 256, kinds[dtype])
    assert list(stored) == list(wanted)
    assert [tuple(part.shape) for part in stored.values()] == [
        shape for _, shape in wanted.values()
    ]
    again = unpack(stored, form)
    values, (scale, zero) = matrix
    assert torch.equal(again.values_RC.float(), values.float())
    high = form.group_size if form.is_blocked else 1
    wide = form.group_size or 256
    for row, col in ((0, 0), (5, 33), (127, 255)):
        at = row // high, col // wide
        shift = 0 if zero is None else int(zero[at])
        expected = (float(values[row, col]) - shift) * float(scale[at])
        dense = dequantize(again, form, dtype)[row, col]
        assert dense == torch.tensor(expected).to(dtype)
    error = (dequantize(again, form, torch.float32) - weight_RD.float()).abs()
    steps = scale.float().repeat_interleave(high, 0).repeat_interleave(wide, 1)
    # Half a step, a step where the symmetric range clips; e4m3's steps grow to 32.
    assert (error <= (33 if form.bits == "fp8" else 1.01) * steps).all()


@given(seed=SEEDS)
def test_int4_is_packed_from_the_low_bits_up(seed: int) -> None:
    form = Form("int4", 32, zero_point=True)
    matrix = rtn(weights(seed, 16, 64, torch.bfloat16), form)
    stored = pack(matrix, form)
    values, (_, zero) = matrix
    assert stored[SHAPE].tolist() == [16, 64]
    for row, word in ((0, 0), (15, 7)):
        nibbles = [(int(stored[PACKED][row, word]) >> 4 * at) & 15 for at in range(8)]
        assert nibbles == [int(values[row, 8 * word + at]) + 8 for at in range(8)]
    assert zero is not None
    nibbles = [(int(stored[ZERO][1, 1]) >> 4 * at) & 15 for at in range(8)]
    assert nibbles == [int(zero[8 + at, 1]) + 8 for at in range(8)]
    assert stored[SCALE].shape == (16, 2)


def round_column(
    column_R: Tensor, scale_R: Tensor, zero_R: Tensor
) -> tuple[Tensor, Tensor]:
    values = (column_R / scale_R + zero_R).clamp(-8, 7).round()
    return values, (values - zero_R) * scale_R


def naive_gptq(
    weight_RD: Tensor, hessian_DD: Tensor, form: Form, *, act_order: bool
) -> tuple[Tensor, Tensor]:
    """Optimal brain quantization of all rows in one order, an inverse for each step.

    Returns:
        Values and scales.
    """
    weight = weight_RD.double().clone()
    hessian = hessian_DD.double().clone()
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean()
    hessian += torch.diag(torch.where(live, 0.01 * mean, mean))
    size = form.group_size or weight.shape[1]
    values = torch.zeros_like(weight)
    fixed = rtn(weight_RD, form).scales
    scales = fixed.scale_RG.clone()
    zeros = torch.zeros_like(scales) if fixed.zero_RG is None else fixed.zero_RG.clone()
    order = list(range(weight.shape[1]))
    if act_order:
        order.sort(key=lambda at: (-float(hessian_DD[at, at]), at))
    left = list(order)
    for at in order:
        group = at // size
        if at % size == 0 and not act_order:
            now = weight[:, at : at + size].to(torch.float64)
            found = rtn(now.to(torch.float64), form).scales
            scales[:, group] = found.scale_RG[:, 0].to(scales.dtype)
            if found.zero_RG is not None:
                zeros[:, group] = found.zero_RG[:, 0]
        inverse = torch.linalg.inv(hessian[left][:, left])
        here = left.index(at)
        values[:, at], nearest = round_column(
            weight[:, at], scales[:, group].double(), zeros[:, group].double()
        )
        error = (weight[:, at] - nearest) / inverse[here, here]
        weight[:, left] -= error[:, None] * inverse[here]
        left.remove(at)
    return values, scales


@pytest.mark.slow
@settings(max_examples=8)
@given(
    seed=SEEDS,
    size=st.sampled_from([32, 64, 128]),
    zero_point=st.booleans(),
    act_order=st.booleans(),
    dead=st.integers(0, 2),
)
def test_gptq_is_optimal_brain_quantization(
    seed: int, size: int, zero_point: bool, act_order: bool, dead: int
) -> None:
    form = Form("int4", size, zero_point)
    weight_RD = random(seed, 6, 256).double()
    x_ND = random(seed + 1, 400, 256).double() * torch.logspace(-1, 1, 256)
    x_ND[:, 64:192] += x_ND[:, :128]
    x_ND[:, :dead] = 0
    hessian_DD = x_ND.T @ x_ND
    found = gptq(weight_RD, hessian_DD, form, act_order=act_order)
    values, scales = naive_gptq(weight_RD, hessian_DD, form, act_order=act_order)
    assert torch.equal(found.values_RC.double(), values)
    torch.testing.assert_close(found.scales.scale_RG, scales)


@settings(max_examples=10)
@given(seed=SEEDS, act_order=st.booleans(), dtype=DTYPES)
def test_gptq_loses_less_than_rounding(
    seed: int, act_order: bool, dtype: torch.dtype
) -> None:
    form = Form("int4", 128)
    weight_RD = random(seed, 32, 256).to(dtype)
    x_ND = random(seed + 1, 600, 256) @ random(seed + 2, 256, 256)
    found = gptq(weight_RD, x_ND.T @ x_ND, form, act_order=act_order)
    losses = [
        (x_ND @ (dequantize(each, form, dtype) - weight_RD).float().T).square().sum()
        for each in (found, rtn(weight_RD, form))
    ]
    assert losses[0] < 0.7 * losses[1]


def test_gptq_without_inputs_is_rounding() -> None:
    form = Form("int4", 32, zero_point=True)
    weight_RD = random(0, 8, 64).bfloat16()
    found = gptq(weight_RD, torch.zeros(64, 64), form, act_order=True)
    assert pairs_equal(found, rtn(weight_RD, form))


def pairs_equal(one: Quantized, two: Quantized) -> bool:
    zeros = [matrix.scales.zero_RG for matrix in (one, two)]
    same = torch.equal(one.values_RC, two.values_RC)
    same &= torch.equal(one.scales.scale_RG, two.scales.scale_RG)
    if zeros[0] is None or zeros[1] is None:
        return same and zeros[0] is zeros[1]
    return same and torch.equal(zeros[0], zeros[1])


def test_what_cannot_be_quantized_is_refused() -> None:
    form = Form("int4", 32)
    weight_RD = random(0, 8, 64)
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        gptq(weight_RD, torch.full((64, 64), math.inf), form)
    weight_RD[3, 5] = math.nan
    for quantize in (rtn, lambda w, f: gptq(w, torch.eye(64), f)):
        with pytest.raises(CheckpointError, match="NaN or infinite weights"):
            quantize(weight_RD, form)


@settings(max_examples=25)
@given(seed=SEEDS, zero_point=st.booleans(), spread=st.floats(0.0, 3.0))
def test_awq_takes_the_scale_with_the_least_error(
    seed: int, zero_point: bool, spread: float
) -> None:
    form = Form("int4", 64, zero_point)
    weight_RD = random(seed, 16, 128).bfloat16()
    x_nD = random(seed + 1, 40, 128) * torch.exp2(spread * random(seed + 2, 128))
    mean_D = x_nD.abs().mean(0)
    losses, scales = [], []
    for step in range(20):
        power = [float(mean) ** (step / 20) for mean in mean_D]
        middle = math.sqrt(max(power) * min(power))
        scale = [2.0 ** round(math.log2(each / middle)) for each in power]
        scale_D = torch.tensor([min(256.0, max(1 / 256, each)) for each in scale])
        scaled_RD = (weight_RD.float() * scale_D).bfloat16()
        rounded_RD = dequantize(rtn(scaled_RD, form), form, torch.bfloat16)
        error_RD = weight_RD.double() - rounded_RD.double() / scale_D.double()
        losses.append(float((x_nD.double() @ error_RD.T).square().sum()))
        scales.append(scale_D)
    tried = awq.candidates(mean_D)
    for scale_D, expected_D in zip(tried, scales, strict=True):
        assert torch.equal(scale_D, expected_D)
    found_A = awq.errors(weight_RD, x_nD, tried, form)
    torch.testing.assert_close(
        found_A, torch.tensor(losses, dtype=torch.float64), rtol=1e-4, atol=0
    )
    chosen_D = awq.best(tried, found_A)
    assert torch.equal(chosen_D, scales[int(np.argmin(losses))])
    assert min(losses) <= losses[0]


def test_awq_scales_are_exact_in_bfloat16() -> None:
    weight_RD = random(0, 64, 128).bfloat16()
    scale_D = awq.candidates(random(1, 128).abs() * 10)[-1]
    assert torch.equal(awq.scaled(weight_RD, scale_D) / scale_D, weight_RD.float())
    assert awq.sampled(torch.arange(2000)).tolist()[-1] == 1999
    assert len(awq.sampled(torch.arange(2000))) == awq.SAMPLED_TOKENS
    assert awq.sampled(torch.arange(3)).tolist() == [0, 1, 2]
