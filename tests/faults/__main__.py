"""``python -m tests.faults [NAME ...]``: every event of every command, or of those.

Prints a row per command as docs/reliability.md has them, and what went wrong. ``-n``
takes so many faults of each kind, evenly spread, instead of all. A name is that of a
case, or a part of the names of several.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .cases import CASES
from .disturb import errors, kills, make_everything, make_world, sampled
from .harness import server

HEAD = "| command | write events | kills | right | errors | right | seconds |"


def main() -> int:
    """The number of faults after which something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="cases, or parts of their names")
    parser.add_argument("-n", type=int, default=sys.maxsize, help="of each kind")
    asked = parser.parse_args()
    base = "/dev/shm" if Path("/dev/shm").is_dir() else None
    bad = 0
    with tempfile.TemporaryDirectory(prefix="moe-prune-faults-", dir=base) as folder:
        scratch = Path(folder)
        with server(scratch) as running:
            make_everything(running, scratch)
            tell(HEAD)
            tell("|---" * HEAD.count(" |") + "|")
            for case in CASES:
                if asked.names and not any(map(case.called, asked.names)):
                    continue
                began = time.monotonic()
                world = make_world(running, case, scratch)
                cells = []
                for faults in (kills(world.events), errors(world.events)):
                    chosen = sampled(list(faults), asked.n, case.name)
                    found = [(fault, world.disturbed(fault)) for fault in chosen]
                    wrong = [(fault, said) for fault, said in found if said]
                    for fault, said in wrong:
                        tell(f"{case.name}: {fault}: {'; '.join(said)}")
                    bad += len(wrong)
                    cells += [len(chosen), len(chosen) - len(wrong)]
                took = round(time.monotonic() - began)
                row = [case.name, len(world.events), *cells, took]
                tell("| " + " | ".join(map(str, row)) + " |")
    return bad


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(min(main(), 99))
