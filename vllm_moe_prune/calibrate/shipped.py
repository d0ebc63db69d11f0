"""The text that calibrates where none was named, shipped with the package."""

from importlib import resources
from pathlib import Path

from ..recipes.calibration import NamedText

FILES = {
    "prose": "prose.txt",
    "code": "code.txt",
    "chat": "chat.jsonl",
    "maths": "maths.txt",
    "languages": "languages.txt",
}
SHIPPED = "text shipped with vllm-moe-prune"
"""What provenance calls it."""
NOTE = (
    f"no --calibration: the {SHIPPED} is used ({', '.join(FILES)}). Text like what the "
    "model will serve protects more of it: --calibration FILE."
)
KEPT_APART = 5
"""One in so many windows of each source, at most, is held out."""


def shipped_texts() -> tuple[NamedText, ...]:
    """Its sources."""
    folder = Path(str(resources.files(__package__))) / "texts"
    return tuple(NamedText(name, str(folder / file)) for name, file in FILES.items())


def fitting(windows: int, samples: int, heldout: int) -> tuple[int, int]:
    """How many windows of a source calibrate and how many are held out: what was asked
    for, or what there is.

    Args:
        windows: There are.
        samples: Asked for.
        heldout: Asked for besides.
    """
    apart = min(heldout, max(1, windows // KEPT_APART))
    return min(samples, windows - apart), apart
