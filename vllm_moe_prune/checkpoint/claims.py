"""What config.json claims, compared with the headers when a checkpoint is opened.

Sizes that nothing else looks at (vocabulary, heads, norms) and whether matrices are
quantized as ``quantization_config`` says. Readers believe config.json: what it says
wrongly they allocate, or read as something else.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from ..archs.spec import ATTENTION, LATENT_ATTENTION, MOE_NORM
from ..errors import CheckpointError
from .block_fp8 import DTYPE as FP8
from .config_values import positive
from .dense_parts import dense_parts
from .index import TensorInfo
from .module_names import CONFIG_KEY, Claims
from .quantized_tensors import PartedTensor

if TYPE_CHECKING:
    from .open import Checkpoint, Layer

log = logging.getLogger(__name__)

NORMS = ("input_layernorm", MOE_NORM)
HEADS, VOCABULARY = "num_attention_heads", "vocab_size"


def check_claims(checkpoint: "Checkpoint") -> None:
    """Compare config.json with names, types and shapes of the tensors that are there.

    Raises:
        CheckpointError: Naming the tensor, and the key that says otherwise.
    """
    _check_sizes(checkpoint)
    for layer in checkpoint.moe_layers:
        _check_alike(checkpoint, layer)
    _check_quantized(checkpoint)


def _check_sizes(checkpoint: "Checkpoint") -> None:
    arch, config = checkpoint.arch, checkpoint.config
    hidden, vocabulary = config[arch.config.hidden], config.get(VOCABULARY)
    table = {"D": arch.config.hidden, "vocabulary": VOCABULARY}
    sizes = _attention_sizes(checkpoint) | {"D": hidden, "vocabulary": vocabulary}
    keys = _attention_keys(checkpoint) | table
    expected = [
        (arch.embedding, "vocabulary D"),
        (arch.head, "vocabulary D"),
        (arch.final_norm, "D"),
    ]
    for layer in checkpoint.layers:
        prefix = arch.layer_prefix.format(layer=layer.index)
        expected += [(f"{prefix}{norm}.weight", "D") for norm in NORMS]
        expected += [
            (f"{prefix}{ATTENTION}{name}.weight", axes)
            for name, axes in arch.attention.items()
        ]
    for name, axes in expected:
        info = checkpoint.tensors.get(name)
        # Absent for a reason: a tied head, or a query projection this MLA lacks.
        if info is None:
            continue
        # None: config.json leaves this axis open.
        wanted = [sizes.get(axis) for axis in axes.split()]
        wrong = len(info.shape) != len(wanted) or any(
            size not in (None, found)
            for size, found in zip(wanted, info.shape, strict=False)
        )
        if wrong:
            said = ", ".join(dict.fromkeys(keys.get(a, "") for a in axes.split()))
            raise CheckpointError(
                f"{info.file}: {name} has shape {list(info.shape)}, but by config.json "
                f"({said}) it has {[size or '?' for size in wanted]}. Correct the key "
                "that is wrong, or download the checkpoint again."
            )


def _attention_sizes(checkpoint: "Checkpoint") -> dict[str, int | None]:
    """Sizes of the axes of attention; those that config.json leaves open are not in."""
    config = checkpoint.config
    found: dict[str, int | None] = {}

    def size(key: str) -> int | None:
        if config.get(key) is None:
            return None
        return positive(config, key, checkpoint.folder / "config.json")

    def product(*factors: int | None) -> int | None:
        # filter is for the type checker: None is ruled out, and no factor is 0.
        return None if None in factors else math.prod(filter(None, factors))

    heads = size(HEADS)
    if checkpoint.arch.attention is LATENT_ATTENTION:
        plain, rope = size("qk_nope_head_dim"), size("qk_rope_head_dim")
        latent, value = size("kv_lora_rank"), size("v_head_dim")
        # V2-Lite has no q_lora_rank: A stays open, and q_proj is checked by Q.
        found |= {"A": size("q_lora_rank"), "L": latent, "V": product(heads, value)}
        if plain is not None and rope is not None:
            found["Q"] = product(heads, plain + rope)
        if plain is not None and value is not None:
            found["NV"] = product(heads, plain + value)
        if latent is not None and rope is not None:
            found["LR"] = latent + rope
    else:
        head = size("head_dim")
        # What transformers computes where config.json has no head_dim.
        if head is None and heads is not None:
            head = config[checkpoint.arch.config.hidden] // heads
        found |= {
            "Q": product(heads, head),
            "K": product(size("num_key_value_heads"), head),
        }
    return found


def _attention_keys(checkpoint: "Checkpoint") -> dict[str, str]:
    """The keys of config.json that say how long an axis of attention is."""
    if checkpoint.arch.attention is LATENT_ATTENTION:
        return {
            "A": "q_lora_rank",
            "L": "kv_lora_rank",
            "LR": "kv_lora_rank + qk_rope_head_dim",
            "Q": f"{HEADS} x (qk_nope_head_dim + qk_rope_head_dim)",
            "V": f"{HEADS} x v_head_dim",
            "NV": f"{HEADS} x (qk_nope_head_dim + v_head_dim)",
        }
    hidden = checkpoint.arch.config.hidden
    named = checkpoint.config.get("head_dim") is not None
    head = "head_dim" if named else f"{hidden} / {HEADS}"
    return {"Q": f"{HEADS} x {head}", "K": f"num_key_value_heads x {head}"}


def is_quantized(info: TensorInfo) -> bool:
    """Whether a matrix is stored in fewer bits than the model computes with."""
    return isinstance(info, PartedTensor) or info.dtype == FP8


def _stored(info: TensorInfo) -> str:
    """How a matrix is stored, in words."""
    if isinstance(info, PartedTensor):
        return f"in parts ({', '.join(info.parts)})"
    return f"as {info.dtype}"


def _check_alike(checkpoint: "Checkpoint", layer: "Layer") -> None:
    """Refuse experts of one layer that are quantized in part: kernels take them all."""
    infos = [checkpoint.tensors[name] for name in checkpoint.expert_names(layer)]
    first = infos[0]
    for info in infos:
        if is_quantized(info) != is_quantized(first):
            raise CheckpointError(
                f"{info.file}: {info.name} is stored {_stored(info)}, but "
                f"{first.name} {_stored(first)}. Experts of one layer must be stored "
                "alike; quantize all of them, or none."
            )


def _check_quantized(checkpoint: "Checkpoint") -> None:
    where = f"{checkpoint.folder / 'config.json'}"
    block = checkpoint.config.get(CONFIG_KEY)
    quantized = [info for info in checkpoint.tensors.values() if is_quantized(info)]
    if not isinstance(block, Mapping):
        for info in quantized:
            raise CheckpointError(
                f"{info.file}: {info.name} is stored {_stored(info)}, but {where} has "
                f"no {CONFIG_KEY}. Take that block over from the original config.json."
            )
        return
    claims = Claims(block, where)
    if not quantized:
        raise CheckpointError(
            f"{where}: {CONFIG_KEY} says {block.get('quant_method')}, but no tensor is "
            f"quantized: the block is left over. Delete {CONFIG_KEY} from config.json."
        )
    odd: list[str] = []
    for name, expert in _linears(checkpoint):
        found = checkpoint.tensors.get(name)
        if found is None:
            continue
        stored = is_quantized(found)
        if claims.agree(name.removesuffix(".weight"), quantized=stored, expert=expert):
            continue
        says = "is not quantized" if stored else "is quantized"
        said = (
            f"{found.file}: {name} is stored {_stored(found)}, but {CONFIG_KEY} of "
            f"{where} says that it {says}"
        )
        if expert and not stored:
            raise CheckpointError(
                f"{said}. Correct its list of modules ({_list_of(block)}), or save the "
                "model again."
            )
        odd.append(said)
    # One line for all of them: each layer has the same matrices.
    if odd:
        more = f" ({len(odd)} such matrices)" if len(odd) > 1 else ""
        warn_once(f"{odd[0]}{more}. A server that believes it cannot load the model.")


@cache
def warn_once(text: str) -> None:
    """Say it, however often a checkpoint is opened."""
    log.warning("%s", text)


def _linears(checkpoint: "Checkpoint") -> Iterator[tuple[str, bool]]:
    """Matrices that every reader makes linear layers of; whether they are experts'."""
    arch = checkpoint.arch
    for layer in checkpoint.layers:
        prefix = arch.layer_prefix.format(layer=layer.index)
        for name in arch.attention:
            yield f"{prefix}{ATTENTION}{name}.weight", False
        for part in dense_parts(checkpoint, layer):
            for name in part.mlp.names:
                yield prefix + name, False
        # Packed experts are parameters of one module, not linear layers of their own.
        if layer.has_moe and all(rule.per_expert for rule in checkpoint.layout.experts):
            for name in checkpoint.expert_names(layer):
                yield name, True


def _list_of(block: Mapping[str, Any]) -> str:
    method = block.get("quant_method")
    named = {"compressed-tensors": "ignore", "gptq": "dynamic"}
    return named.get(str(method), "modules_to_not_convert")
