"""The gateway's command, from its own distribution where that is installed."""

import importlib.util
from functools import wraps
from typing import Any

import typer

from ..errors import ServeError

PACKAGE = "moe_prune_gateway"
INSTALL = (
    "the gateway is not installed. Install it with `pip install moe-prune-gateway`, "
    "or with `pip install ./serve` in a clone of this repository."
)


def add_gateway(app: typer.Typer, panel: str) -> None:
    """Add the command of moe-prune-gateway, or one that says how to install it."""
    if importlib.util.find_spec(PACKAGE) is None:
        anything = {"allow_extra_args": True, "ignore_unknown_options": True}
        app.command("gateway", context_settings=anything, rich_help_panel=panel)(
            _not_installed
        )
        return
    # A distribution of its own, imported only where it is installed.
    from moe_prune_gateway.cli import gateway
    from moe_prune_gateway.gateway_error import GatewayError

    # Typer reads the options from the signature, which wraps keeps.
    @wraps(gateway)
    def command(**options: Any) -> None:
        try:
            gateway(**options)
        except GatewayError as error:
            raise ServeError(str(error)) from error

    app.command("gateway", rich_help_panel=panel)(command)


def _not_installed() -> None:
    """Put several vLLM servers behind one address: pip install moe-prune-gateway.

    Example: `vllm-moe-prune gateway --backend full=http://a --backend pruned=http://b`
    """
    raise ServeError(INSTALL)
