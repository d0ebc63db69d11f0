"""Kernels for CUDA devices in Triton, on the layout of ``kernels/blocks.py``.

Without a device they run under TRITON_INTERPRET=1, on CPU tensors; see docs/gpu.md.
"""
