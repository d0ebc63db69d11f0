"""Whether torchrun started this process; without PyTorch, so that it is fast to ask."""

import os


def launched() -> bool:
    """Whether it is one of several."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and "TORCHELASTIC_RUN_ID" in os.environ


def who_speaks() -> str:
    """What a line begins with, so that it is known which of several processes it is
    of."""
    return f"rank {os.environ.get('RANK')}: " if launched() else ""


def local_rank() -> int | None:
    """Which of the processes on this machine it is; None: it is alone."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else None
