"""Every error this package raises on purpose.

    MoePruneError                 base: one line that says what, where and what to do
    ├── CheckpointError           the input folder, its index, a shard or its config
    ├── CalibrationError          the calibration or evaluation text, the tokenizer
    ├── RecipeError               what the user asked for cannot be done
    ├── PlanError                 a plan (perhaps edited by hand) that does not fit
    ├── RemapError                an expert remap table that does not fit its checkpoint
    ├── OutputError               the output folder: not empty, disk full, cannot resume
    ├── ServeError                the serving environment: vLLM or the plugin is missing
    ├── EvaluationError           a task, its data, or the server it is put to
    ├── RanksError                torchrun: a rank ended, hangs or has another input
    ├── MissingExtra              a package that only some commands need
    └── Interrupted               Ctrl-C; says how to go on

The command line prints the message as one line and exits with status 2 (130 after
Ctrl-C, as shells have it).
"""

from importlib.util import find_spec


def said_by(error: Exception) -> str:
    """What an error says; of Python's own about a file, without the number."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}."
    return str(error)


class MoePruneError(Exception):
    """Base class; catch this to catch everything the tool refuses."""


class CheckpointError(MoePruneError):
    """The input checkpoint is incomplete, damaged, hostile or unsupported."""


class CalibrationError(MoePruneError):
    """The calibration text cannot be used."""


class RecipeError(MoePruneError):
    """The recipe asks for something impossible."""


class PlanError(MoePruneError):
    """The plan is invalid or was made for another model."""


class RemapError(MoePruneError):
    """The expert remap table is missing, damaged or contradicts the checkpoint."""


class OutputError(MoePruneError):
    """The output cannot be written or resumed."""


class RanksError(MoePruneError):
    """The processes of one job do not fit together, or one of them is gone."""


class ServeError(MoePruneError):
    """The checkpoint cannot be served in this environment."""


class EvaluationError(MoePruneError):
    """A model cannot be judged: a task, its data or the server does not do."""


class MissingExtra(MoePruneError):
    """A package of one of the project's extras is not installed."""


class Interrupted(MoePruneError):
    """The user pressed Ctrl-C."""


def require_extra(extra: str, modules: tuple[str, ...], purpose: str) -> None:
    """Refuse what needs packages that are not installed, before any work is done.

    Args:
        extra: The project's extra that brings them.
        modules: What is imported.
        purpose: Begins the message, such as "PNG files".

    Raises:
        MissingExtra: Naming what is missing and how to install it.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"{purpose} need {' and '.join(missing)}, not installed here: "
            f"pip install 'vllm-moe-prune[{extra}]'."
        )
