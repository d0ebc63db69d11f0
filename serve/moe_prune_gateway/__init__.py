"""The gateway that stands before vLLM servers, and the pages both of them show.

One pass through the code, in reading order: ``settings`` (what the user asked for),
``app`` (our own routes), ``relay`` (the pass-through of ``/v1``) and what it uses:
``body`` (a request comes in), ``backends`` (where it can go), ``stream`` (the answer
goes out), ``refusals`` (what the gateway itself answers), ``metrics``; ``http`` bounds
what uvicorn accepts, ``run`` starts and drains it.
"""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("moe-prune-gateway")
