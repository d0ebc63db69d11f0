"""``python -m moe_prune_gateway``."""

from .cli import main

main()
