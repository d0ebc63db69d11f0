"""Runs the command line in forked children, with every import done and a fault armed.

Started as ``python -m tests.faults.server`` with the shim preloaded. One request per
line on stdin, one answer per line on stdout, both JSON; a request names the arguments,
the folder to run in and the fault.
"""

import ctypes
import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
from pathlib import Path
from typing import Any

import typer

import vllm_moe_prune
from vllm_moe_prune import cli

LEFT_OUT = (
    "vllm_moe_prune.plugin",
    "vllm_moe_prune.kernels._",
    "vllm_moe_prune.__main__",
)
OTHERS = (
    "compressed_tensors.quantization.lifecycle.forward",
    "compressed_tensors.quantization.utils",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "peft",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.tokenization_mistral_common",
)
LIMIT_S = 120


def serve() -> None:
    names = [
        module.name
        for module in pkgutil.walk_packages(
            vllm_moe_prune.__path__, "vllm_moe_prune.", onerror=print
        )
    ]
    for name in (*names, *OTHERS):
        if not name.startswith(LEFT_OUT):
            importlib.import_module(name)
    # Built once; what is there need not be gone through by each child's collector.
    cli.app = typer.main.get_command(cli.app)
    gc.collect()
    gc.freeze()
    answer({"ready": True})
    for line in sys.stdin:
        answer({"status": run(json.loads(line))})


def answer(message: dict[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def run(request: dict[str, Any]) -> int:
    """The exit status of the command; negative: the signal that killed it."""
    child = os.fork()
    if child == 0:
        _be_the_command(request)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _be_the_command(request: dict[str, Any]) -> None:
    status = 99
    try:
        signal.alarm(LIMIT_S)
        os.chdir(request["folder"])
        said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.argv = ["vllm-moe-prune", *request["arguments"]]
        fault = request["fault"]
        shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
        shim.fault_arm(
            str(Path(request["folder"]).resolve()).encode(),
            log,
            fault["mode"],
            fault["errno"],
            fault["kind"].encode(),
            fault["path"].encode(),
            ctypes.c_long(fault["nth"]),
        )
        cli.main()
        status = 0
    except SystemExit as error:
        status = (
            error.code if isinstance(error.code, int) else 0 if not error.code else 1
        )
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
