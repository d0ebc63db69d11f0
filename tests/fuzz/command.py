"""A command line in this process, and what it may do with a bad input."""

import contextlib
import io
import shlex
import sys
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import typer

from vllm_moe_prune import cli

UNEXPECTED = ("error: internal error", "error: out of memory")
"""How the line begins where the tool has met what it did not expect."""


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    status: object
    stdout: str
    stderr: str

    @property
    def fault(self) -> str | None:
        """What is wrong with that; None: it succeeded, or refused as it should."""
        if self.status == 0:
            return None
        if self.status != 2:
            return f"status {self.status}"
        if self.stderr.startswith(UNEXPECTED):
            return "unexpected"
        line = self.stderr.removesuffix("\n")
        if not line.startswith("error: ") or not line.isprintable():
            return "not one line"
        return None


@cache
def _built_app() -> object:
    return typer.main.get_command(cli.app)


def run_command(command: str) -> Ran:
    """Run it as the console script would; what escapes from ``main`` is a fault too."""
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        patch.object(sys, "argv", ["vllm-moe-prune", *shlex.split(command)]),
        patch.object(cli, "app", _built_app()),
    ):
        try:
            cli.main()
        except SystemExit as done:
            status = done.code
        except Exception as error:
            import traceback

            where = traceback.extract_tb(error.__traceback__)[-1]
            status = f"{type(error).__name__} at {where.filename}:{where.lineno}"
            traceback.print_exc(file=err)
    return Ran(status, out.getvalue(), err.getvalue())
