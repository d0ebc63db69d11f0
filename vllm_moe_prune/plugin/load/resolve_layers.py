"""From a vLLM configuration to the checked layers a model class builds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...archs.spec import MoeArch, RouterRule
from ...checkpoint.config_values import router_rule
from ...checkpoint.remap import CONFIG_BLOCK, FILE_NAME, ExpertRemap, parse_remap
from ...errors import ServeError
from .. import LOAD_FORMAT
from ..compat import refuse_without_kernel, wants_local_ids
from .served_layer import ServedLayer, served_layers
from .verify_remap import local_folder, verify_folder

TABLE_KEY = "table"
"""Where the loader puts the table of a checkpoint that exists in memory only."""


def read_layers(vllm_config: Any, arch: MoeArch) -> tuple[ServedLayer, ...]:
    """Verify what is about to be served and describe its layers.

    Raises:
        MoePruneError: The checkpoint contradicts its remap table, or vLLM was asked for
            something that a pruned model cannot do.
    """
    model_config = vllm_config.model_config
    refuse_without_kernel(model_config.hf_config.to_dict(), model_config.model)
    remap = None
    # Only the loader may say so: a checkpoint must not vouch for its own table.
    if vllm_config.load_config.load_format == LOAD_FORMAT:
        remap = _in_memory_table(model_config)
    if remap is None:
        remap = verify_folder(
            local_folder(
                model_config.model,
                model_config.revision,
                vllm_config.load_config.download_dir,
            )
        )
    layers = served_layers(
        model_config.hf_config,
        remap,
        arch,
        rule_of(model_config, arch),
        model_config.model,
    )
    check_parallel(
        vllm_config.parallel_config, layers, local_ids=wants_local_ids(vllm_config)
    )
    return layers


def rule_of(model_config: Any, arch: MoeArch) -> RouterRule:
    """How routers decide, by the configuration that vLLM runs with.

    Raises:
        CheckpointError: Naming a key whose value no router could follow.
    """
    return router_rule(arch, model_config.hf_config.to_dict(), Path(model_config.model))


def _in_memory_table(model_config: Any) -> ExpertRemap | None:
    block = getattr(model_config.hf_config, CONFIG_BLOCK, None)
    if not isinstance(block, dict) or TABLE_KEY not in block:
        return None
    # Through the parser of files, which checks that the table is consistent.
    table = json.dumps(block[TABLE_KEY]).encode()
    return parse_remap(table, Path(model_config.model) / FILE_NAME)


def check_parallel(
    parallel_config: Any, layers: Sequence[ServedLayer], *, local_ids: bool
) -> None:
    """Refuse what vLLM would do wrongly with layers that differ.

    Args:
        parallel_config: vLLM's.
        layers: The layers of the model.
        local_ids: Whether routing itself has to turn expert ids into local ones.

    Raises:
        ServeError: Naming the flag and the layer that is in its way.
    """
    moe_layers = [layer for layer in layers if layer.has_moe]
    if not moe_layers:
        raise ServeError("no layer has experts left; serve the model as a dense one.")
    fewest = min(moe_layers, key=lambda layer: layer.experts)
    most = max(moe_layers, key=lambda layer: layer.experts)
    if parallel_config.enable_eplb and fewest.experts != most.experts:
        raise ServeError(
            f"--enable-eplb needs equally many experts in every layer, but layer "
            f"{fewest.index} has {fewest.experts} and layer {most.index} has "
            f"{most.experts}. Leave it out, or prune with 'budget: per-layer'."
        )
    own = [layer.index for layer in moe_layers if not layer.rows_are_experts]
    if parallel_config.enable_eplb and own:
        raise ServeError(
            f"--enable-eplb needs router rows that are experts, in equal groups, which "
            f"they are not in layer {own[0]}. Leave it out, or prune with "
            "'routing: drop' and 'groups: equal'."
        )
    if not parallel_config.enable_expert_parallel:
        return
    if parallel_config.enable_ep_weight_filter:
        raise ServeError(
            "--enable-ep-weight-filter splits experts as if every layer had the same; "
            "leave it out for a pruned checkpoint."
        )
    if local_ids and parallel_config.data_parallel_size > 1:
        # Tokens would reach other processes with ids that mean nothing there.
        raise ServeError(
            "--enable-expert-parallel together with --data-parallel-size does not work "
            "in vLLM on CPUs. Use one of them."
        )
    # vLLM's expert-parallel group spans these three (parallel_state.py).
    ranks = (
        parallel_config.tensor_parallel_size
        * parallel_config.data_parallel_size
        * parallel_config.prefill_context_parallel_size
    )
    if ranks > fewest.experts:
        raise ServeError(
            f"--enable-expert-parallel over {ranks} ranks, but layer {fewest.index} "
            f"has only {fewest.experts} experts. Use at most as many ranks as experts, "
            "or tensor parallelism alone."
        )
