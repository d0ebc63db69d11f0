"""Starting the gateway, and ending it without losing in-flight requests."""

import copy
import logging
import resource
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from .app import create_app
from .gateway_error import GatewayError
from .http_protocol import bounded_protocol
from .settings import GatewaySettings

log = logging.getLogger(__name__)

# Longer than load balancers and clients keep idle connections, so that they close them.
KEEP_ALIVE_S = 75
BACKLOG = 2048


def run_gateway(settings: GatewaySettings) -> NoReturn:
    """Serve until a signal; then wait for in-flight requests and exit with status 0.

    Raises:
        GatewayError: The address is taken or does not exist.
    """
    # Here, so that a taken port is our error of one line; uvicorn would log and exit.
    listener = _listen(settings.host, settings.port)
    _raise_open_files()
    config = uvicorn.Config(
        create_app(settings),
        http=bounded_protocol(settings.client_timeout_s),
        # bounded_protocol declines every offer to upgrade.
        ws="none",
        lifespan="on",
        log_config=_logging(),
        access_log=False,
        proxy_headers=False,  # client addresses are not used
        server_header=False,
        headers=[("x-content-type-options", "nosniff")],
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.drain_s,
        backlog=BACKLOG,
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info(
        "gateway on http://%s:%d for %s", shown, port, ", ".join(settings.backends)
    )
    if not settings.api_keys and not settings.is_local:
        log.warning(
            "no API key is set: any program that reaches this address can use it"
        )
    # uvicorn repeats the signal once it has drained; that is a proper end, not a fault.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    uvicorn.Server(config).run(sockets=[listener])
    sys.exit(0)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise GatewayError(
            f"cannot listen on {host}, port {port}: {error.strerror}. "
            "Choose others with --host and --port."
        ) from error


def _raise_open_files() -> None:
    """Every stream takes two files; the usual limit of 1024 is for 500 of them."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _logging() -> dict[str, object]:
    """uvicorn's way of logging, for us too."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["loggers"]["moe_prune_gateway"] = {
        "handlers": ["default"],
        "level": "INFO",
    }
    return config
