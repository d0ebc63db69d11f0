"""The gateway in front of vLLM servers, and the pages that both of them show.

In reading order: ``settings``; ``app``, the gateway's own routes; ``proxy``, which
passes ``/v1`` on, with ``request_body``, ``backends`` (which are up, and which models
they serve), ``backend_client`` (requests to one) and ``response_body``; ``api_error``,
what the gateway answers by itself; ``access``, who may use it; ``http_protocol``, what
uvicorn is bounded by; ``run``, its start and its end.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("moe-prune-gateway")
