"""The error that the gateway raises on purpose."""


class GatewayError(Exception):
    """One line that says what is wrong, where, and what to do; exit status 2."""
