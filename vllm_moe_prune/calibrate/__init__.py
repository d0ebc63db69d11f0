"""Running a checkpoint layer by layer: text, streaming forward, what is summed."""
