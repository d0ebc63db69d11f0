"""Training after a cut: routers alone, adapters, or all weights; see ``recover.py``."""
