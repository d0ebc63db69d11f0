"""Training after a cut: routers alone, adapters, or every weight; see ``recover.py``."""
