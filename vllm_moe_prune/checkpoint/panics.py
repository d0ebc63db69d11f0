"""Rust's panics as errors of one line.

The tokenizers library panics on some patterns and some texts. What reaches Python is no
``Exception``, and Rust writes a report of its own to the process's stderr before.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CalibrationError, MoePruneError

PANIC = "PanicException"
STDERR = 2


class Panicked(Exception):
    """Code of a library in Rust gave up; says why."""


@contextmanager
def panics_raised() -> Iterator[None]:
    """Turn a panic into ``Panicked``, and keep its report to ourselves.

    Everything else written to stderr meanwhile is shown at the end.
    """
    # In memory: what goes wrong here must not be the disk.
    with open(os.memfd_create("stderr"), "w+b") as said:  # noqa: PTH123, a descriptor
        sys.stderr.flush()
        kept = os.dup(STDERR)
        # Rust writes to the descriptor; setting sys.stderr would not catch that.
        os.dup2(said.fileno(), STDERR)
        panicked = False
        try:
            yield
        except BaseException as error:
            # By name: PyO3's class is in no module that could be imported.
            panicked = type(error).__name__ == PANIC
            if panicked:
                raise Panicked(" ".join(str(error).split())) from error
            raise
        finally:
            # Flushed before switching back, so that lines keep their order.
            sys.stderr.flush()
            os.dup2(kept, STDERR)
            os.close(kept)
            said.seek(0)
            if not panicked and (data := said.read()):
                os.write(STDERR, data)


@contextmanager
def tokenizer_errors(failed: str, advice: str) -> Iterator[None]:
    """Turn whatever a tokenizer raises into an error of one line.

    Args:
        failed: What it could not do.
        advice: What to do about it, a sentence.

    Raises:
        CalibrationError: ``failed``, the reason, ``advice``.
    """
    try:
        with panics_raised():
            yield
    except MoePruneError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CalibrationError(f"{failed}: {reason}. {advice}") from error
