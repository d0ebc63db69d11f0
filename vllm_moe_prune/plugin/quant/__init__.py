"""Expert weights that vLLM serves compressed or quantized."""
