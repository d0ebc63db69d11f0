"""The command line: parse, call the pipeline, draw. No decisions are made here."""

import os
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer

from .. import __version__
from ..errors import Interrupted, MoePruneError, RanksError, said_by
from ..ranks.launched import launched, who_speaks
from . import choose, gateway, judge, prune, publish, recover, serve
from .flags import flag

# Typer keeps click's exceptions to itself; this one is for wrong command lines.
UsageError: Any = typer.BadParameter.__base__
NAME = "vllm-moe-prune"
MAX_LINE = 4000
SHARED = ("run", "measure", "cut", "tune", "eval")
"""What torchrun can start."""

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
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[bool, flag("Show tracebacks of errors.", "--debug")] = False,
) -> None:
    command = context.invoked_subcommand
    if command not in SHARED and launched():
        raise RanksError(
            f"{command} runs in one process; torchrun is for {', '.join(SHARED)}. "
            "Start it without torchrun."
        )
    if debug:
        # main() handles the errors and has no Typer context to read it from.
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
        "families": choose.families,
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
    "Serve": {"serve": serve.serve, "push": publish.push},
}
"""The commands as ``--help`` groups them; ``add_gateway`` adds the last one."""
# What serve does not know goes on to vLLM, which has short options with an h in them.
PASS_ON = {"ignore_unknown_options": True, "help_option_names": ["--help"]}

for panel, commands in PANELS.items():
    for name, command in commands.items():
        settings = PASS_ON if name == "serve" else None
        app.command(name, rich_help_panel=panel, context_settings=settings)(command)
gateway.add_gateway(app, panel="Serve")


def main() -> None:
    """Entry point: what is refused becomes one line and status 2."""
    if not sys.warnoptions:  # those of libraries are for their callers, not for users
        warnings.simplefilter("ignore")
    try:
        arguments = sys.argv[1:] or ["--help"]
        # standalone_mode would print errors in Typer's way and exit.
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
        # Those of ranks name one themselves.
        who = "" if isinstance(error, RanksError) else who_speaks()
        _fail(label, who + said_by(error), status)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        if os.environ.get("MOE_PRUNE_DEBUG"):
            raise
        _fail("error", who_speaks() + _unexpected(error), 2)
    if status == 130:  # Typer's word for a Ctrl-C that nobody caught
        _fail("interrupted", "nothing was changed.", status)
    sys.exit(status)


def _unexpected(error: BaseException) -> str:
    """What is said of an error that nobody foresaw: a fault of ours, or no memory."""
    if isinstance(error, MemoryError):
        return "out of memory. What is finished is kept; free some, then try again."
    step = error.__traceback__
    # The innermost frame is where it was raised.
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    where = (
        ""
        if step is None
        else f" ({step.tb_frame.f_code.co_filename}:{step.tb_lineno})"
    )
    said = " ".join(str(error).split())[:300]
    return (
        f"internal error, {type(error).__name__}: {said}{where}. This is a fault of "
        f"{NAME}: please report it with what `{NAME} --debug ...` shows."
    )


def _fail(label: str, message: str, status: int) -> NoReturn:
    """One line on stderr; what a hostile file had printed stays harmless."""
    # Both ends: errors say first where, and last what to do.
    if len(message) > MAX_LINE:
        message = f"{message[: MAX_LINE // 2]} ... {message[-MAX_LINE // 2 :]}"
    line = "".join(sign if sign.isprintable() else " " for sign in message)
    sys.stderr.write(f"{label}: {line}\n")
    sys.exit(status)
