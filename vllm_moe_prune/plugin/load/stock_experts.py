"""A pruned checkpoint is checked too where vLLM's own class serves it: a uniform one.

Our model classes ask before they build a layer. vLLM's ask nothing, but they hold their
experts in a layer that vLLM lets others replace: ours asks before the first is built.
"""

import weakref
from typing import Any

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import (
    RoutedExperts as StockRoutedExperts,
)

from ...archs import find_arch, supported
from ...checkpoint.remap import CONFIG_BLOCK
from ...checkpoint.substitution import KEY
from ..compat import refuse_substitution
from .verify_remap import local_folder, verify_folder


# By this name schemes of compressed-tensors find the layer.
@StockRoutedExperts.register_oot(name="RoutedExperts")
class RoutedExperts(StockRoutedExperts):
    """vLLM's, once the checkpoint is known to be what its remap table says."""

    _checked: weakref.ref[VllmConfig] | None = None
    """The model of which a layer was built last."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM does it.

        Raises:
            MoePruneError: See ``check_stock``.
        """
        vllm_config = get_current_vllm_config()
        # Once per model, not per layer: the check reads the headers of all shards.
        last = RoutedExperts._checked
        if last is None or last() is not vllm_config:
            check_stock(vllm_config)
            RoutedExperts._checked = weakref.ref(vllm_config)
        super().__init__(*args, **kwargs)


def check_stock(vllm_config: VllmConfig) -> None:
    """Verify a pruned checkpoint that is about to be served by a class of vLLM's.

    Raises:
        RemapError: See ``verify_folder``.
        CheckpointError: See ``verify_folder``.
        ServeError: This vLLM would ignore that experts have vectors in their place.
    """
    from vllm.model_executor.model_loader import DefaultModelLoader, get_model_loader

    model_config = vllm_config.model_config
    if model_config is None:
        return  # layers on their own, outside of any engine
    if getattr(model_config.hf_config, KEY, None):
        refuse_substitution(model_config.model)
    if getattr(model_config.hf_config, CONFIG_BLOCK, None) is None:
        return
    ours = {find_arch(each, __name__).pruned_architecture for each in supported()}
    if model_config.architecture in ours:
        return  # the class has asked
    load_config = vllm_config.load_config
    if isinstance(get_model_loader(load_config), DefaultModelLoader):
        # Other loaders read weights from elsewhere, or invent them.
        folder = local_folder(
            model_config.model, model_config.revision, load_config.download_dir
        )
        verify_folder(folder)
