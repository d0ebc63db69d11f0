"""Keys and values of recipes and plans that earlier versions spelled differently."""

import logging
from typing import Any

log = logging.getLogger(__name__)

KEYS = {"quantise": "quantize"}
VALUES = {("cluster_by", "behaviour"): "behavior"}


def current_spelling(data: object, where: str) -> object:
    """The same data in today's spelling; one log line names each old word.

    Args:
        data: What was read from a file; anything but mappings passes unchanged.
        where: The file, for the log.
    """
    if not isinstance(data, dict):
        return data
    current: dict[Any, Any] = {}
    for key, value in data.items():
        name = KEYS.get(key, key) if isinstance(key, str) else key
        if name != key and name in data:
            name = key  # both: validation refuses the old one
        elif name != key:
            log.warning("%s: %s is now spelled %s.", where, key, name)
        if isinstance(value, str) and (name, value) in VALUES:
            value = VALUES[name, value]
        current[name] = current_spelling(value, where)
    return current
