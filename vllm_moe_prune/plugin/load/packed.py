"""Packed experts on their way into vLLM: one by one, under names that it reads.

``experts.gate_up_proj`` [E, 2F, D] and ``experts.down_proj`` [E, D, F] come dense or in
parts (``kernels.bitmask``, with the rows of all experts one after the other).
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from ...checkpoint.compressed import PARTS
from ...errors import CheckpointError
from ...kernels.bitmask import check_shapes

Weights = Iterable[tuple[str, Tensor]]
NAME = re.compile(
    r"(?P<base>(?P<each>.+\.experts\.)(?P<kind>gate_up_proj|down_proj))"
    rf"(?:\.(?P<part>{'|'.join(PARTS)}))?\Z"
)


def one_by_one(
    weights: Weights, gate: str, up: str, down: str
) -> Iterator[tuple[str, Tensor]]:
    """Weights as they stream in, packed experts taken apart.

    Args:
        weights: Names as in the checkpoint, and tensors.
        gate: What vLLM calls the matrices of one expert.
        up: .
        down: .

    Raises:
        CheckpointError: A part of a compressed tensor is missing or misshapen.
    """
    kinds = {"gate_up_proj": (gate, up), "down_proj": (down,)}
    held: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        match = NAME.match(name)
        if match is None:
            yield name, tensor
            continue
        base, each, roles = match["base"], match["each"], kinds[match["kind"]]
        if match["part"] is None:
            for expert, matrices in enumerate(tensor):
                # [2F, D] holds gate above up.
                pieces = zip(roles, matrices.chunk(len(roles)), strict=True)
                for role, matrix in pieces:
                    yield f"{each}{expert}.{role}.weight", matrix
            continue
        parts = held.setdefault(base, {})
        # A copy: what vLLM hands over may be a view into a file that it will close.
        parts[match["part"]] = tensor.cpu().clone()
        if is_complete(parts):
            del held[base]
            yield from _split(parts, each, roles, base)
    if held:
        base, parts = next(iter(held.items()))
        missing = [part for part in PARTS if part not in parts]
        raise CheckpointError(f"{base}: has no {' and no '.join(missing)}.")


def is_complete(parts: Mapping[str, Tensor]) -> bool:
    """Whether all parts are there; values of three axes have no offsets."""
    fixed = "values" in parts and parts["values"].dim() == 3
    wanted = [part for part in PARTS if part != "offsets" or not fixed]
    return all(part in parts for part in wanted)


def _split(
    parts: Mapping[str, Tensor], each: str, roles: tuple[str, ...], base: str
) -> Iterator[tuple[str, Tensor]]:
    """The parts of every matrix; what they claim is checked where they are used."""
    mask_ERB, values, offsets = parts["mask"], parts["values"], parts.get("offsets")
    if mask_ERB.dim() != 3 or not mask_ERB.shape[1] or mask_ERB.shape[1] % len(roles):
        raise CheckpointError(f"{base}: the mask has shape {list(mask_ERB.shape)}.")
    flat = mask_ERB.flatten(0, 1)
    check_shapes(
        (len(flat), flat.shape[1] * 8),
        tuple(flat.shape),
        tuple(values.shape),
        None if offsets is None else tuple(offsets.shape),
        base,
    )
    rows = mask_ERB.shape[1] // len(roles)
    for matrix in range(len(flat) // rows):
        expert, role = divmod(matrix, len(roles))
        name = f"{each}{expert}.{roles[role]}"
        first, last = matrix * rows, (matrix + 1) * rows
        yield f"{name}.mask", flat[first:last]
        if offsets is None:
            yield f"{name}.values", values[first:last]
        else:
            # Absurd offsets only give slices that the check of the matrix refuses.
            begin, end = int(offsets[first]), int(offsets[last])
            # Counted over the whole tensor; a matrix's own begin at 0.
            yield f"{name}.offsets", offsets[first : last + 1] - begin
            yield f"{name}.values", values[begin:end]
