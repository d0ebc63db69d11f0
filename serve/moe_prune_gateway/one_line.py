"""Text of others for the log."""

LONGEST = 300


def one_line(said: object) -> str:
    """What an exception says, a backend's words perhaps, so that it forges no line."""
    text = str(said)[:LONGEST]
    return "".join(sign if sign.isprintable() else " " for sign in text)
