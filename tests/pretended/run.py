"""Run modules as on a machine with a CUDA device that has none.

    python -m tests.pretended.run MODULE [ARGUMENT ...] [+ MODULE [ARGUMENT ...]] ...

Stops at the first that fails. What made the host wait, and how often, is written to
the standard error in the end.
"""

import itertools
import os
import runpy
import sys
import time

# Triton decides when it is imported.
os.environ["TRITON_INTERPRET"] = "1"

from tests.pretended.cuda import PretendedCuda
from tests.pretended.interpreting import install


def main() -> None:
    install()
    runs = itertools.groupby(sys.argv[1:], lambda word: word == "+")
    with PretendedCuda() as device:
        for words in [list(words) for joint, words in runs if not joint]:
            sys.argv = words
            start = time.process_time()
            try:
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
            except SystemExit as exited:
                if exited.code:
                    raise
            taken = time.process_time() - start
            print(f"{words[0]}: {taken:.1f} s", file=sys.stderr)  # noqa: T201
    for what, count in device.waits.most_common():
        print(f"{count:7d} {what}", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
