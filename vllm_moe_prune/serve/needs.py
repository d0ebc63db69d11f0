"""What the gateway needs beyond the package's own dependencies."""

import importlib.util

from ..errors import ServeError

# The modules of extra `gateway`.
NEEDS = (
    *("fastapi", "httptools", "msgspec", "prometheus_client"),
    *("pydantic_settings", "uvicorn", "uvloop"),
)


def check_needs() -> None:
    """Refuse to start where a library is missing.

    Raises:
        ServeError: It names what is missing, and how to get it.
    """
    missing = [name for name in NEEDS if not importlib.util.find_spec(name)]
    if missing:
        raise ServeError(
            f"the gateway needs {', '.join(missing)}. Install it with "
            "`pip install 'vllm-moe-prune[gateway]'`."
        )
