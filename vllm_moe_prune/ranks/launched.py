"""Whether torchrun started this process; without PyTorch, so that it is fast to ask."""

import os


def launched() -> bool:
    """Whether it is one of several."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and "TORCHELASTIC_RUN_ID" in os.environ
