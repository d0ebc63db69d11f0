"""Reading and writing checkpoints: index and headers, lazy reads, planned shards."""
