"""The command ``moe-prune-gateway``, which ``vllm-moe-prune gateway`` is too."""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from . import __version__
from .gateway_error import GatewayError

NAME = "moe-prune-gateway"
# Typer keeps click's exceptions to itself; this one is for wrong command lines.
UsageError: Any = typer.BadParameter.__base__


def flag(help_text: str, *names: str) -> Any:
    """An option."""
    return typer.Option(*names, help=help_text)


def gateway(
    backend: Annotated[
        list[str] | None,
        flag("NAME=URL of a vLLM server; repeatable. Variable: MOE_PRUNE_BACKENDS."),
    ] = None,
    host: Annotated[
        str | None, flag("Address to listen on. Default: 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, flag("Port to listen on. Default: 8080.")] = None,
    api_key_file: Annotated[
        Path | None,
        flag("File of accepted API keys, one per line. Variable: MOE_PRUNE_API_KEYS."),
    ] = None,
    max_body_mib: Annotated[
        int | None, flag("Maximum request body in MiB. Default: 32.")
    ] = None,
    max_concurrent: Annotated[
        int | None, flag("In-flight requests per backend. Default: 1024.")
    ] = None,
    read_timeout_s: Annotated[
        float | None, flag("Read timeout of a backend in seconds. Default: 600.")
    ] = None,
    drain_s: Annotated[
        int | None,
        flag("Seconds for in-flight requests to end after SIGTERM. Default: 30."),
    ] = None,
    dry_run: Annotated[
        bool, flag("Print the settings as JSON and exit.", "--dry-run")
    ] = False,
) -> None:
    """Put several vLLM servers behind one address, e.g. original and pruned.

    Each option is also a variable (MOE_PRUNE_PORT); see docs/serving/gateway.md.

    Example: `vllm-moe-prune gateway --backend full=http://a --backend pruned=http://b`
    """
    from .settings import load_settings, parse_backends

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
    # Only now: --help and --dry-run need no web server.
    from .run import run_gateway

    run_gateway(settings)


app = typer.Typer(
    name=NAME,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(gateway)


def main() -> None:
    """Entry point: what is refused becomes one line and status 2."""
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        typer.echo(f"{NAME} {__version__}")
        sys.exit(0)
    try:
        status = app(arguments, prog_name=NAME, standalone_mode=False) or 0
    except UsageError as error:
        _fail(f"{error.format_message()} See `{NAME} --help`.")
    except GatewayError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}." if error.filename else str(error))
    sys.exit(status)


def _fail(message: str) -> NoReturn:
    line = "".join(sign if sign.isprintable() else " " for sign in message)
    sys.stderr.write(f"error: {line}\n")
    sys.exit(2)
