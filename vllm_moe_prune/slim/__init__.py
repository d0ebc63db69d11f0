"""Weight methods: zeroing and rounding, tensor in and tensor out. No files."""
