"""Prune Mixture-of-Experts checkpoints and serve them with vLLM."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("vllm-moe-prune")
