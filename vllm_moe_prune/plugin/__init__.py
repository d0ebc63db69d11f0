"""The vLLM plugin: serves pruned checkpoints with plain ``vllm serve``.

Entry point ``vllm.general_plugins: moe_prune = vllm_moe_prune.plugin:register``. vLLM
calls ``register`` once in every process; nothing here imports vLLM or torch before
that, and the model classes are named by string so that vLLM imports them when needed.

    compat.py   supported vLLM versions, vLLM's quirks
    symbols/    what of vLLM's the plugin uses, and whether it is there
    launch.py   the ``vllm serve`` command line of ``vllm-moe-prune serve``
    models/     one file per family: vLLM's classes with other constructors
    load/       what each layer holds, checks against the remap table, pruning on load,
                the tokenizer that the files say
    quant/      experts stored without zeros or in few bits: loading them, running them
    watch/      routing load, and routes in vLLM's server (``vllm.endpoint_plugins``)
"""

import logging
from functools import cache
from typing import Any

log = logging.getLogger(__name__)

LOAD_FORMAT = "moe_prune"
FUSED_MOE = "vllm.model_executor.layers.fused_moe"


@cache  # vLLM may call a plugin more than once in a process
def register() -> None:
    """Tell vLLM about architectures, configurations and the pruning loader.

    Raises:
        ServeError: The installed vLLM is too old.
    """
    from .. import configs
    from ..archs import find_arch, supported
    from .compat import (
        allow_amx,
        allow_uneven_mla,
        check_version,
        mend_cpu_rotary,
        missing_symbols,
    )

    check_version()
    # Other models are served as without us; ours are then unknown to vLLM.
    if (why := missing_symbols()) is not None:
        log.error(why)
        return
    allow_amx()
    allow_uneven_mla()
    configs.register()

    from vllm import ModelRegistry
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.platforms import current_platform

    from ..checkpoint.compressed import METHOD
    from ..checkpoint.quantized_tensors import METHOD as QUANTIZED
    from .load.lazy_register import quantization, when_imported

    when_imported("vllm.model_executor.layers.rotary_embedding", mend_cpu_rotary)
    when_imported("vllm.model_executor.model_loader", _register_loader)
    when_imported(f"{FUSED_MOE}.routed_experts", _check_stock_classes)
    when_imported("vllm.tokenizers.hf", _tokenize_by_files)

    for model_type in supported():
        arch = find_arch(model_type, __name__)
        names = [arch.pruned_architecture]
        # Originals too where vLLM has no class of its own, as for Arctic.
        if not arch.stock_vllm:
            names.append(arch.stock_architecture)
        for name in names:
            ModelRegistry.register_model(name, f"{__name__}.models.{model_type}:{name}")
    register_quantization_config(METHOD)(quantization(_experts_without_zeros))
    register_quantization_config(QUANTIZED)(quantization(_quantized_experts))
    # In place of vLLM's own config of that name; on GPUs that one stays.
    if current_platform.is_cpu():
        register_quantization_config("fp8")(quantization(_block_fp8))


def _register_loader() -> None:
    from vllm.model_executor.model_loader import register_model_loader

    from .load.loader import PruningLoader

    register_model_loader(LOAD_FORMAT)(PruningLoader)


def _check_stock_classes() -> None:
    from vllm.model_executor.custom_op import op_registry_oot

    # vLLM asserts that a layer is registered once: a second would stop the server.
    if "RoutedExperts" in op_registry_oot:
        log.warning(
            "another plugin brings a layer RoutedExperts, so pruned checkpoints that "
            "vLLM's own classes serve are not verified: run `vllm-moe-prune verify`."
        )
        return
    from .load import stock_experts  # noqa: F401


def _tokenize_by_files() -> None:
    from .load.tokenize_by_files import go_by_files

    go_by_files()


def _experts_without_zeros() -> type[Any]:
    from .quant.sparse_moe import MoePruneConfig

    return MoePruneConfig


def _quantized_experts() -> type[Any]:
    from .quant.quantized_moe import FallbackConfig

    return FallbackConfig


def _block_fp8() -> type[Any]:
    from .quant.fp8_moe import FallbackFp8Config

    return FallbackFp8Config
