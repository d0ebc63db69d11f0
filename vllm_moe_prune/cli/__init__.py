"""The command line: parse, call the pipeline, draw. No decisions are made here."""

import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__
from ..errors import Interrupted, MoePruneError, said_by
from . import choose, gateway, judge, prune, recover, serve
from .flags import flag

# Typer keeps click's exceptions to itself; this one is for wrong command lines.
UsageError: Any = typer.BadParameter.__base__
NAME = "vllm-moe-prune"

app = typer.Typer(
    name=NAME,
    help="Prune Mixture-of-Experts checkpoints and serve them with vLLM.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vllm-moe-prune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[bool, flag("Show tracebacks of errors.", "--debug")] = False,
) -> None:
    if debug:
        os.environ["MOE_PRUNE_DEBUG"] = "1"


PANELS: dict[str, dict[str, Any]] = {
    "Prune": {
        "inspect": prune.inspect,
        "run": prune.run,
        "measure": prune.measure,
        "plan": prune.plan,
        "cut": prune.cut,
        "convert": prune.convert,
        "recover": recover.recover,
    },
    "Choose": {
        "recipes": choose.recipes,
        "recommend": choose.recommend,
        "tune": choose.tune,
    },
    "Check": {
        "verify": prune.verify,
        "report": serve.report,
        "eval": judge.evaluate,
        "compare": judge.compare,
        "speed": judge.speed,
    },
    "Serve": {"serve": serve.serve},
}
"""The commands as ``--help`` groups them; ``add_gateway`` adds the last one."""
# What serve does not know goes on to vLLM.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

for panel, commands in PANELS.items():
    for name, command in commands.items():
        settings = PASS_ON if name == "serve" else None
        app.command(name, rich_help_panel=panel, context_settings=settings)(command)
gateway.add_gateway(app, panel="Serve")


def main() -> None:
    """Entry point: what is refused becomes one line and status 2."""
    try:
        arguments = sys.argv[1:] or ["--help"]
        status = app(arguments, prog_name=NAME, standalone_mode=False) or 0
    except UsageError as error:
        command = error.ctx.command_path if error.ctx else NAME
        said = error.format_message()
        stop = "" if said.endswith((".", "?")) else "."
        _fail("error", f"{said}{stop} See `{command} --help`.", 2)
    except (MoePruneError, OSError) as error:
        if os.environ.get("MOE_PRUNE_DEBUG"):
            raise
        interrupted = isinstance(error, Interrupted)
        label, status = ("interrupted", 130) if interrupted else ("error", 2)
        _fail(label, said_by(error), status)
    if status == 130:  # Typer's word for a Ctrl-C that nobody caught
        _fail("interrupted", "nothing was changed.", status)
    sys.exit(status)


def _fail(label: str, message: str, status: int) -> NoReturn:
    """One line on stderr; what a hostile file had printed stays harmless."""
    line = "".join(sign if sign.isprintable() else " " for sign in message)
    sys.stderr.write(f"{label}: {line}\n")
    sys.exit(status)
