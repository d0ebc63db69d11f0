"""Executing a plan: one streaming pass from the input checkpoint to the output."""
