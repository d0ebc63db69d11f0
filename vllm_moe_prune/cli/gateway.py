"""The command for what stands beside vLLM."""

from pathlib import Path
from typing import Annotated

import typer

from .flags import flag


def gateway(
    backend: Annotated[
        list[str] | None,
        flag("NAME=URL of a vLLM server; repeatable. Or MOE_PRUNE_BACKENDS."),
    ] = None,
    host: Annotated[str | None, flag("Address to listen on; 127.0.0.1.")] = None,
    port: Annotated[int | None, flag("Port to listen on; 8080.")] = None,
    api_key_file: Annotated[
        Path | None,
        flag("Keys that open the gateway, one per line. Or MOE_PRUNE_API_KEYS."),
    ] = None,
    max_body_mib: Annotated[int | None, flag("Largest request body; 32.")] = None,
    max_concurrent: Annotated[
        int | None, flag("Requests on their way per backend; 1024.")
    ] = None,
    read_timeout_s: Annotated[
        float | None, flag("Longest silence of a backend; 600.")
    ] = None,
    drain_s: Annotated[
        int | None, flag("Time for what is on its way, after SIGTERM; 30.")
    ] = None,
    dry_run: Annotated[
        bool, flag("Print the settings as JSON, start nothing.", "--dry-run")
    ] = False,
) -> None:
    """One address for several vLLM servers: original and pruned side by side.

    Options are variables too (MOE_PRUNE_PORT); docs/serving/gateway.md lists them all.

    Example: `vllm-moe-prune gateway --backend full=http://a --backend pruned=http://b`
    """
    from ..serve.needs import check_needs

    check_needs()
    from ..serve.settings import load_settings, parse_backends

    settings = load_settings(
        {
            "backends": parse_backends(backend) if backend else None,
            "host": host,
            "port": port,
            "api_key_file": api_key_file,
            "max_body_mib": max_body_mib,
            "max_concurrent": max_concurrent,
            "read_timeout_s": read_timeout_s,
            "drain_s": drain_s,
        }
    )
    if dry_run:
        typer.echo(settings.model_dump_json(indent=2))
        return
    from ..serve.run import run_gateway

    run_gateway(settings)
