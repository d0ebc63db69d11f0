"""Loading pruned checkpoints into vLLM: layers, checks, pruning while loading."""
