"""The vLLM we stand on: versions and quirks; the only file that compares versions."""

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoint.compressed import METHOD
from ..checkpoint.gptq_awq import read_auto_form
from ..errors import ServeError

OLDEST = "0.32"
TESTED = ("0.32.0", "0.33.0")
"""Releases whose sources CI or `make substitution` compares with ``symbols``."""
MOST_NAMED = 3


def check_version() -> None:
    """Refuse a vLLM older than the oldest supported one.

    Raises:
        ServeError: Naming the version found and the one needed.
    """
    from packaging.version import InvalidVersion, Version
    from vllm import __version__ as found

    try:
        supported = Version(found) >= Version(OLDEST)
    except InvalidVersion as error:
        raise ServeError(
            f"vLLM calls itself {found!r}; a release from {OLDEST} on is needed."
        ) from error
    if not supported:
        raise ServeError(
            f"vLLM {found} is installed, but vllm-moe-prune needs {OLDEST} or newer. "
            "Upgrade vLLM, or set VLLM_PLUGINS to leave this plugin out."
        )


def missing_symbols(version: str | None = None) -> str | None:
    """What a vLLM that was not tested lacks of what the plugin uses, in one line.

    Sources are read, about a second's work, and nothing is imported; for releases that
    were tested nothing is read.

    Args:
        version: The release installed; None: what vLLM says.
    """
    from packaging.version import Version

    installed = version
    if installed is None:
        import vllm

        installed = vllm.__version__
    if Version(installed).public in TESTED:
        return None
    from .symbols import SYMBOLS
    from .symbols.sources import problem

    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parents[1]
    found = [what for symbol in SYMBOLS if (what := problem(root, symbol))]
    if not found:
        return None
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return (
        f"vllm-moe-prune was tested with vLLM {' and '.join(TESTED)}; {installed} is "
        f"installed, where {'; '.join(found[:MOST_NAMED])}{more}. Pruned checkpoints "
        "that need the plugin are not served. Upgrade vllm-moe-prune, or install a "
        "tested vLLM."
    )


SUBSTITUTION = "model_executor/layers/fused_moe/expert_substitution.py"
NOT_SUBSTITUTED = (
    "--enable-expert-parallel",
    "--data-parallel-size",
    "-dp",
    "--enable-eplb",
    "--enable-lora",
)
"""Flags with which vLLM refuses expert substitution."""


WITHOUT_VECTORS = (
    "If all of them are zero, `vllm-moe-prune convert IN OUT` writes the form that the "
    "plugin serves; means of outputs need vLLM itself."
)


def refuse_substitution(where: str, flags: Sequence[str] = ()) -> None:
    """Refuse a checkpoint whose removed experts have vectors where vLLM would not.

    Older releases ignore the key, and compute with memory that nothing was loaded into.

    Args:
        where: What to call the checkpoint.
        flags: Of vLLM's command line.

    Raises:
        ServeError: Saying what to do.
    """
    spec = find_spec("vllm")
    package = Path(spec.origin).parent if spec and spec.origin else None
    # None: another environment's vLLM will be run.
    if package is not None and not (package / SUBSTITUTION).is_file():
        raise ServeError(
            f"{where}: removed experts have vectors in their place "
            "(approximate_experts), which only vLLM from 0.33 on reads. Upgrade "
            f"vLLM. {WITHOUT_VECTORS}"
        )
    given = {flag.partition("=")[0] for flag in flags}
    if found := sorted(given & {*NOT_SUBSTITUTED}):
        raise ServeError(
            f"{where}: vLLM serves removed experts that have vectors in their place "
            f"without {found[0]} only. Leave it out. {WITHOUT_VECTORS}"
        )


def is_cpu_build() -> bool:
    """Whether the vLLM of this environment is one for CPUs, as vLLM itself tells."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False


def has_amx() -> bool:
    """Whether this processor has AMX tiles, which many of vLLM's CPU kernels need."""
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def allow_amx() -> None:
    """Ask the kernel for this process's AMX tiles, where the processor has them.

    Linux kills a process that uses tiles without having asked. vLLM's CPU attention
    uses them as soon as it sees them, and only some of its paths ask first.
    """
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and has_amx():
        torch.cpu._init_amx()


def lacks_router(*, sigmoid: bool, grouped: bool) -> bool:
    """Whether vLLM asserts instead of choosing experts: sigmoids on CPUs, no groups."""
    from vllm.platforms import current_platform

    return sigmoid and not grouped and current_platform.is_cpu()


def refuse_without_kernel(config: Mapping[str, Any], where: str) -> None:
    """Refuse 4-bit experts in GPTQ's or AWQ's own layout where nothing runs them.

    Args:
        config: config.json.
        where: What to call the checkpoint.

    Raises:
        ServeError: vLLM's kernels do not fit this CPU; there are none of ours.
    """
    form = read_auto_form(config, where)
    if form is None:
        return
    from vllm.platforms import current_platform

    zen = find_spec("zentorch") is not None  # with kernels of its own, for AMD's
    if current_platform.is_cpu() and not has_amx() and not zen:
        raise ServeError(
            f"{where}: experts in {form.method.upper()}'s own layout are run by vLLM's "
            "kernels, which on CPUs need AMX; this processor has none. Serve it on a "
            "GPU or another CPU, or start from a checkpoint that is not quantized or "
            "that compressed-tensors quantized."
        )


def allow_uneven_mla() -> None:
    """Let checkpoints of ours with latent attention have layers that differ.

    vLLM refuses them because it may have to repair the global configuration, and layers
    would get the repair each on a copy. Here the global one is repaired first. Others'
    checkpoints are refused as before.
    """
    from vllm.config.model_arch import ModelArchitectureConfig
    from vllm.transformers_utils.model_arch_config_convertor import (
        MODEL_ARCH_CONFIG_CONVERTORS,
        ModelArchConfigConvertorBase,
    )

    from ..archs import find_arch, known
    from ..archs.spec import LATENT_ATTENTION

    class UnevenMlaConvertor(ModelArchConfigConvertorBase):
        def convert(self, supports_multimodal: bool = True) -> ModelArchitectureConfig:
            configs = self.get_per_layer_hf_configs()
            arch = find_arch(self.hf_config.model_type, __name__)
            ours = arch.pruned_architecture in self.get_architectures()
            if configs is None or not ours:
                return super().convert(supports_multimodal)
            # For its side effect: it may patch qk_rope_head_dim of the config in place.
            self.get_head_size()
            return ModelArchitectureConfig.from_layers(
                [
                    # With the revision, unlike vLLM's: patching reads config.json.
                    type(self)(*layer, self.revision).convert_layer(supports_multimodal)
                    for layer in configs
                ]
            )

    for model_type in known():
        if find_arch(model_type, __name__).attention is LATENT_ATTENTION:
            # A converter of vLLM's own would know more than ours.
            MODEL_ARCH_CONFIG_CONVERTORS.setdefault(model_type, UnevenMlaConvertor)


def mend_cpu_rotary() -> None:
    """Let latent attention on CPUs rotate all heads, not the first alone.

    vLLM's CPU kernel takes queries [T, H, size] for one head, without a word, and
    latent attention passes just that. Its plain torch code is right.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return

    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    @RotaryEmbedding.register_oot(name="RotaryEmbedding")
    class AllHeadsRotaryEmbedding(RotaryEmbedding):
        def forward_cpu(self, positions: Any, query: Any, key: Any = None) -> Any:
            flat = query.dim() == 2
            forward = super().forward_cpu if flat else self.forward_native
            return forward(positions, query, key)


def is_16_bit(dtype: Any) -> bool:
    """Whether vLLM's CPU kernels for quantized weights take activations of a dtype."""
    return bool(dtype.is_floating_point and dtype.itemsize == 2)


def chosen_experts(choose: Callable[[], Any], layer: Any) -> tuple[Any, str]:
    """vLLM's own method for routed experts; None, and why it has no kernel for them.

    Args:
        choose: Asks vLLM for it.
        layer: Of vLLM's, for which it is asked.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.platforms import current_platform

    try:
        method = choose()
    except (NotImplementedError, ValueError) as error:  # as most of its choosers say it
        return None, str(error)
    if not current_platform.is_cpu():
        return method, ""
    # Its chooser for FP8 on CPUs chooses nothing, without a word.
    # Methods without the attribute count as having a kernel.
    if getattr(method, "experts_cls", method) is None:
        return None, "it has no kernel for such scales"
    if isinstance(method, UnquantizedFusedMoEMethod):
        return method, ""
    if layer.use_ep:
        return None, "its kernels know all experts or none"
    if not is_16_bit(layer.moe_config.in_dtype):
        return None, "its kernels take 16-bit activations only"
    return method, ""


def wants_local_ids(vllm_config: Any) -> bool:
    """Whether the MoE kernel ignores the expert map, so that routing must apply it.

    vLLM's CPU kernel indexes the experts of its own process with global ids: under
    expert parallelism it reads past their end. Our own kernels apply the map; that of
    integers is chosen layer by layer, so those that have it take global ids after all.
    """
    from vllm.platforms import current_platform

    quant_config = vllm_config.quant_config
    ours = quant_config is not None and quant_config.get_name() == METHOD
    return bool(
        current_platform.is_cpu()
        and vllm_config.parallel_config.enable_expert_parallel
        and not ours
    )
