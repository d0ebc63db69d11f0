"""``--load-format moe_prune``: prune an original checkpoint while vLLM loads it.

    vllm serve ORIGINAL --load-format moe_prune \
        --model-loader-extra-config '{"plan": "/path/plan.json"}'

A plan is tried in the time it takes to load the model, and nothing is written. The
tensors are those that ``cut`` would write, built one at a time from the same list.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ...checkpoint.config_values import FLOATS
from ...checkpoint.module_names import CONFIG_KEY
from ...checkpoint.open import Checkpoint
from ...checkpoint.remap import CONFIG_BLOCK
from ...checkpoint.source import open_checkpoint
from ...cut.build_remap import build_remap
from ...cut.config import pruned_config
from ...cut.copy import build_tensor
from ...cut.slice import OutputTensor, output_tensors
from ...decide.check_plan import check_plan
from ...decide.cut_plan import CutPlan, load_plan
from ...errors import PlanError, ServeError
from ...slim.magnitude import magnitude
from .resolve_layers import TABLE_KEY
from .verify_remap import local_folder

EXAMPLE = """--model-loader-extra-config '{"plan": "/path/plan.json"}'"""


class PruningLoader(BaseModelLoader):
    """Loads what ``cut`` would have written, without writing it."""

    def __init__(self, load_config: LoadConfig) -> None:
        """The extra config must name the plan, and nothing else."""
        super().__init__(load_config)
        extra: Any = load_config.model_loader_extra_config
        plan = extra.get("plan") if isinstance(extra, dict) else None
        if not isinstance(plan, str) or len(extra) != 1:
            raise ServeError(f"--load-format moe_prune needs {EXAMPLE}; got {extra!r}.")
        self.plan_path = Path(plan)

    def download_model(self, model_config: ModelConfig) -> None:
        """Bring the original into the local Hub cache if it is not a folder."""
        self._folder(model_config)

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """Turn the configuration into the pruned model's, then load as usual."""
        _prune_config(model_config, *self.open(model_config))
        if getattr(model_config.hf_config, CONFIG_KEY, None) is not None:
            # vLLM has read the lists of modules already, by their old names.
            vllm_config.quant_config = VllmConfig.get_quantization_config(
                model_config, vllm_config.load_config
            )
        model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Stream the pruned tensors into the model."""
        load: Any = model.load_weights
        # Headers again: vLLM's load_model calls this with the model only.
        load(pruned_weights(*self.open(model_config)))

    def _folder(self, model_config: ModelConfig) -> Path:
        return local_folder(
            model_config.model, model_config.revision, self.load_config.download_dir
        )

    def open(self, model_config: ModelConfig) -> tuple[Checkpoint, CutPlan]:
        """The original's headers and the plan, which must fit it."""
        checkpoint = open_checkpoint(self._folder(model_config), allow_links=True)
        plan = load_plan(self.plan_path)
        where = str(self.plan_path)
        check_plan(plan, checkpoint.layers, checkpoint.fingerprint, where)
        if plan.needs_activations:
            raise PlanError(
                f"{where}: {plan.by_data}, which needs calibration activations. "
                "Run `vllm-moe-prune cut` and serve what it writes, or plan with "
                "slimming by magnitude or none, and without narrow."
            )
        if plan.is_quantized:
            raise PlanError(
                f"{where}: quantizes experts, which is not done while loading. Run "
                "`vllm-moe-prune cut` and serve what it writes."
            )
        return checkpoint, plan


def _prune_config(
    model_config: ModelConfig, checkpoint: Checkpoint, plan: CutPlan
) -> None:
    """Set on vLLM's configuration what ``cut`` would have written to config.json.

    Only what the plan changes is set, so that ``--hf-overrides`` stay in force.
    """
    remap = build_remap(checkpoint, plan)
    before, after = checkpoint.config, pruned_config(checkpoint, plan, remap)
    after["architectures"] = [checkpoint.arch.pruned_architecture]
    after[CONFIG_BLOCK] |= {TABLE_KEY: remap.model_dump(mode="json")}
    hf_config = model_config.hf_config
    hf_config.per_layer_config = None
    for key, value in after.items():
        apart = key in ("per_layer_config", CONFIG_KEY)
        if not apart and before.get(key) != value:
            setattr(hf_config, key, value)
    if (block := _quantization(checkpoint, plan, after)) is not None:
        setattr(hf_config, CONFIG_KEY, block)
    # Last, since transformers checks it against the number of layers.
    hf_config.per_layer_config = after.get("per_layer_config")
    model_config.model_arch_config = model_config.get_model_arch_config()


def _quantization(
    checkpoint: Checkpoint, plan: CutPlan, after: dict[str, Any]
) -> dict[str, Any] | None:
    """The block that vLLM is to read, whose lists name the modules of the output."""
    block: dict[str, Any] | None = after.get(CONFIG_KEY)
    storage = checkpoint.storage
    if storage is not None:
        # Dropped blocks renumber the layers behind them.
        left = [one.layer for one in plan.layers if one.action != "drop-block"]
        dense = [new for new, old in enumerate(left) if old in storage.dense_layers]
        restored = storage.dense_config.model_copy(update={CONFIG_KEY: block})
        changes = {"dense_layers": tuple(dense), "dense_config": restored}
        return storage.model_copy(update=changes).model_dump(mode="json")
    if block is None:
        return None
    # Without a list, vLLM makes one of the files, which have the names of the input.
    key = {"gptq": "modules_in_block_to_quantize", "awq": "modules_to_not_convert"}.get(
        block["quant_method"], ""
    )
    if not key or block.get(key):
        return block
    modules: dict[str, bool] = {}
    for tensor in output_tensors(checkpoint, plan):
        module = tensor.name.rpartition(".")[0]
        modules[module] = modules.get(module, False) or tensor.dtype not in FLOATS
    # GPTQ lists what is quantized, AWQ what is not.
    wanted = block["quant_method"] == "gptq"
    return block | {key: [name for name, is_in in modules.items() if is_in == wanted]}


def pruned_weights(
    checkpoint: Checkpoint, plan: CutPlan
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the pruned checkpoint, one at a time."""
    for output in output_tensors(checkpoint, plan):
        yield output.name, _slim(build_tensor(checkpoint, output), output)


def _slim(tensor: torch.Tensor, output: OutputTensor) -> torch.Tensor:
    """Zero each matrix of each expert by itself, as ``cut`` does."""
    if output.sparsity == 0.0:
        return tensor
    # Gate and up are two matrices to `cut`, each with zeros of its own number.
    parts = 2 if output.role == "gate_up" else 1
    matrices = tensor.unbind() if tensor.dim() == 3 else (tensor,)
    slimmed = [
        torch.cat([magnitude(part, output.sparsity) for part in matrix.chunk(parts)])
        for matrix in matrices
    ]
    return torch.stack(slimmed).view_as(tensor)
