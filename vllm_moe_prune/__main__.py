"""``python -m vllm_moe_prune``."""

from .cli import main

main()
