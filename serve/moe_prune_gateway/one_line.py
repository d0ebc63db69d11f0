"""Untrusted text for the log."""

LONGEST = 300


def one_line(said: object) -> str:
    """Text for one line of the log: short, without line breaks."""
    text = str(said)[:LONGEST]
    return "".join(sign if sign.isprintable() else " " for sign in text)
