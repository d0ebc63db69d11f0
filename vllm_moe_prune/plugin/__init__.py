"""The vLLM plugin: serves pruned checkpoints with plain ``vllm serve``.

Entry point ``vllm.general_plugins: moe_prune = vllm_moe_prune.plugin:register``. vLLM
calls ``register`` once in every process; nothing here imports vLLM or torch before
that, and the model classes are named by string so that vLLM imports them when needed.

    compat.py    supported vLLM versions, vLLM's quirks
    deferred.py  told to vLLM now, imported when it is needed
    symbols/     every symbol of vLLM's that we use
    served.py    from vLLM's configuration to checked layers; flags that are refused
    layers.py    what each decoder layer holds, from config.json and the remap table
    routing.py   routing over router rows that are not experts, or in uneven groups
    absent.py    stands where a sublayer was dropped
    verify.py    is the checkpoint what its remap table says? (headers only)
    tally.py     the same question, asked of the weights as they are loaded
    models/      one file per family: vLLM's classes with other constructors
    loader.py    ``--load-format moe_prune``: prune the original while loading
    sparse_moe.py     the quantization method ``moe_prune``: experts without zeros
    arriving.py       expert matrices as vLLM hands them over
    expert_loader.py  makes blocks of them
    packed.py         packed experts, dense and compressed, one by one
    sparse_op.py      the custom op that runs a layer of them
    quantized_moe.py    who runs quantized experts on a CPU
    expert_parts.py     what comes in parts: integers and scales
    integer_moe.py      int4 and int8 experts by our kernel; integer_op.py its op
    dequantized_moe.py  made plain while loading, where no kernel fits
    watch.py          counting routed tokens: its switch, and what is said of it
    routing_load.py   the layer that counts, and what workers tell
    load_op.py        the custom op that counts
    endpoint.py       routes in vLLM's server (``vllm.endpoint_plugins``)
"""

from functools import cache
from typing import Any

LOAD_FORMAT = "moe_prune"


@cache  # vLLM may call a plugin more than once in a process
def register() -> None:
    """Tell vLLM about architectures, configurations and the pruning loader.

    Raises:
        ServeError: The installed vLLM is too old.
    """
    from .. import configs
    from ..archs import find_arch, supported
    from .compat import allow_amx, allow_uneven_mla, check_version, mend_cpu_rotary

    check_version()
    allow_amx()
    allow_uneven_mla()
    configs.register()

    from vllm import ModelRegistry
    from vllm.model_executor.layers.quantization import register_quantization_config

    from ..checkpoint.compressed import METHOD
    from ..checkpoint.quantized_tensors import METHOD as QUANTIZED
    from .load.lazy_register import quantization, when_imported

    when_imported("vllm.model_executor.layers.rotary_embedding", mend_cpu_rotary)
    when_imported("vllm.model_executor.model_loader", _register_loader)

    for model_type in supported():
        arch = find_arch(model_type, __name__)
        names = [arch.pruned_architecture]
        if not arch.stock_vllm:
            names.append(arch.stock_architecture)
        for name in names:
            ModelRegistry.register_model(name, f"{__name__}.models.{model_type}:{name}")
    register_quantization_config(METHOD)(quantization(_experts_without_zeros))
    register_quantization_config(QUANTIZED)(quantization(_quantized_experts))


def _register_loader() -> None:
    from vllm.model_executor.model_loader import register_model_loader

    from .load.loader import PruningLoader

    register_model_loader(LOAD_FORMAT)(PruningLoader)


def _experts_without_zeros() -> type[Any]:
    from .quant.sparse_moe import MoePruneConfig

    return MoePruneConfig


def _quantized_experts() -> type[Any]:
    from .quant.quantized_moe import FallbackConfig

    return FallbackConfig
