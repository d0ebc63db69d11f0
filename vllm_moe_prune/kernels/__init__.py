"""Compressed expert weights: the format, a torch reference, and the fused kernels."""
