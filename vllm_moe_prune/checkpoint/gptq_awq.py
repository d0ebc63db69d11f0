"""Checkpoints in the layouts of GPTQ's and AWQ's own tools, read as if they were dense.

A matrix ``NAME.weight`` [R, C] in 4 bits is stored turned: ``NAME.qweight``,
``NAME.qzeros`` and ``NAME.scales`` [G, R], eight values to an int32. GPTQ packs the
inputs of an output, [C / 8, R], and names the group of each input in ``NAME.g_idx``;
AWQ packs outputs, [C, R / 8], in an order of its own. They can be measured and trimmed,
their parts copied; nothing here writes such a layout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from ..errors import CheckpointError
from ..kernels.quantized import PLAIN
from ..recipes.schema import first_problem
from .index import ITEM_BYTES, TensorInfo
from .module_names import CONFIG_KEY
from .quantized_tensors import (
    FLOATS,
    TYPES,
    PartedTensor,
    check_part,
    fold_parts,
    two_axes,
    values_name,
)

QWEIGHT, QZEROS, SCALES, G_IDX = "qweight", "qzeros", "scales", "g_idx"
PARTS = (QWEIGHT, QZEROS, SCALES, G_IDX)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs the four bits at each place of an int32 belong to."""


Lower = BeforeValidator(lambda value: str(value).lower())
"""Other tools write ``GEMM`` where transformers writes ``gemm``, and read either."""


class _Block(BaseModel):
    """What is read of the ``quantization_config`` of either tool."""

    model_config = ConfigDict(extra="ignore", strict=True)

    bits: Annotated[Literal[4], Field(validation_alias=AliasChoices("bits", "w_bit"))]
    group_size: Annotated[
        int,
        Field(ge=-1, validation_alias=AliasChoices("group_size", "q_group_size")),
    ]
    modules_to_not_convert: list[str] | None = None


class _Gptq(_Block):
    checkpoint_format: Annotated[
        Literal["gptq", "gptq_v2"],
        Lower,
        Field(validation_alias=AliasChoices("checkpoint_format", "format")),
    ] = "gptq"
    dynamic: dict[str, Any] | None = None


class _Awq(_Block):
    version: Annotated[
        Literal["gemm"],
        Lower,
        Field(validation_alias=AliasChoices("version", "format")),
    ] = "gemm"


BLOCKS: dict[Any, type[_Gptq] | type[_Awq]] = {"gptq": _Gptq, "awq": _Awq}


@dataclass(frozen=True)
class AutoForm:
    """How such a checkpoint is quantized."""

    method: Literal["gptq", "awq"]
    group_size: int | None
    """Inputs that share a scale; None: all of them."""
    zeros_less_one: bool
    """Whether stored zero points are less by one, as GPTQ's first format has them."""

    bits = "int4"

    @property
    def words(self) -> str:
        """The form as a person says it."""
        shared = f"{self.group_size} of a row" if self.group_size else "a row"
        return f"int4 in the layout of {self.method.upper()}, a scale for {shared}"

    def parts(self, rows: int, cols: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of the tensors that store a matrix; F16 stands for floats."""
        groups = math.ceil(cols / (self.group_size or cols))
        shape = (cols // 8, rows) if self.method == "gptq" else (cols, rows // 8)
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            QWEIGHT: ("I32", shape),
            QZEROS: ("I32", (groups, rows // 8)),
            SCALES: ("F16", (groups, rows)),
        }
        if self.method == "gptq":
            found[G_IDX] = ("I32", (cols,))
        return found


def auto_name(name: str) -> str | None:
    """What a stored tensor counts as: values stand for their matrix, scales not."""
    return values_name(name, QWEIGHT, PARTS)


def read_auto_form(config: Mapping[str, Any], where: str) -> AutoForm | None:
    """How config.json says that weights are quantized; None: in no such layout.

    Raises:
        CheckpointError: It is one of these tools', but not supported.
    """
    block = config.get(CONFIG_KEY)
    method = block.get("quant_method") if isinstance(block, dict) else None
    if method not in ("gptq", "awq"):
        return None
    try:
        found = BLOCKS[method].model_validate(block)
    except ValidationError as error:
        raise CheckpointError(
            f"{where}: {CONFIG_KEY}: {first_problem(error)}. Of GPTQ and AWQ, 4 bits "
            "in their usual layouts can be read."
        ) from error
    if found.group_size == 0:
        raise CheckpointError(f"{where}: {CONFIG_KEY}: group_size is 0.")
    # Both tools write -1 for one group per row.
    size = found.group_size if found.group_size > 0 else None
    less = isinstance(found, _Gptq) and found.checkpoint_format == "gptq"
    return AutoForm(method, size, less)


@dataclass(frozen=True, kw_only=True)
class AutoTensor(PartedTensor):
    """A matrix in one of these layouts."""

    form: AutoForm

    def dense(self) -> torch.Tensor:
        """The matrix as a model computes with it.

        Raises:
            CheckpointError: A scale is not finite, or a group does not exist.
        """
        parts = self.load_parts(SCALES)
        scale_GR, cols = parts[SCALES].float(), self.shape[1]
        # AWQ's groups are neighbors; GPTQ's may be in any order, as g_idx says.
        group_C = torch.arange(cols) // (self.form.group_size or cols)
        if self.form.method == "gptq":
            # GPTQ packs along inputs: turned, so that values unpack along a row.
            values_CR = _nibbles(parts[QWEIGHT].T).T
            zero_GR = _nibbles(parts[QZEROS]) + int(self.form.zeros_less_one)
            group_C = parts[G_IDX].long()
            # Before it indexes: torch would count a negative group from the end.
            if bool(((group_C < 0) | (group_C >= len(scale_GR))).any()):
                raise CheckpointError(
                    f"{self.file}: {self.name}: {G_IDX} names groups that are not "
                    "there."
                )
        else:
            values_CR, zero_GR = _awq(parts[QWEIGHT]), _awq(parts[QZEROS])
        # In fp32 an int4 times an fp16 or bf16 scale is exact, and is rounded once.
        dense_CR = (values_CR - zero_GR[group_C]) * scale_GR[group_C]
        return dense_CR.T.to(TYPES[self.dtype])


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The eight values of each int32 of a row, the low bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    # >> repeats the sign of an int32, which & 15 takes off again.
    return ((packed[:, :, None] >> shifts) & 15).flatten(1)


def _awq(packed: torch.Tensor) -> torch.Tensor:
    """The same in AWQ's order."""
    # argsort inverts the permutation: the place of each output's four bits.
    order = torch.tensor(AWQ_ORDER).argsort()
    values = _nibbles(packed).view(len(packed), -1, 8)
    return values[:, :, order].flatten(1)


def fold_auto(
    tensors: dict[str, TensorInfo], form: AutoForm, dtype: str
) -> dict[str, TensorInfo]:
    """Every tensor under its dense name; types and shapes of all parts are checked.

    Args:
        tensors: What the headers list.
        form: Of what is quantized.
        dtype: The model's, as safetensors spells it.

    Raises:
        CheckpointError: A part is missing, misshapen, or belongs to nothing.
    """

    def fold(base: str, first: TensorInfo) -> TensorInfo:
        return _fold(base, first, tensors, form, dtype)

    return fold_parts(tensors, QWEIGHT, PARTS, fold)


def _fold(
    base: str,
    first: TensorInfo,
    tensors: Mapping[str, TensorInfo],
    form: AutoForm,
    dtype: str,
) -> AutoTensor:
    cols, rows = two_axes(first)
    if form.method == "gptq":
        cols *= 8
    else:
        rows *= 8
    if not rows or not cols:
        raise CheckpointError(f"{first.file}: {first.name}: has no weights.")
    found = {}
    for part, (kind, size) in form.parts(rows, cols).items():
        info = tensors.get(f"{base}.{part}")
        if info is None:
            raise CheckpointError(f"{first.file}: {base + '.' + part!r} is missing.")
        check_part(info, FLOATS if kind == "F16" else (kind,), size)
        found[part] = info
    return AutoTensor(
        name=f"{base}.{PLAIN}",
        dtype=dtype,
        shape=(rows, cols),
        file=first.file,
        # In no one place of the file: read() dequantizes the parts.
        offset=-1,
        nbytes=rows * cols * ITEM_BYTES[dtype],
        parts=found,
        form=form,
    )
