"""Tests of Triton kernels on CPU tensors, in a process of their own.

Triton decides when it is imported whether it interprets: tests/unit/test_triton.py runs
this folder with TRITON_INTERPRET=1; elsewhere nothing here is collected.
"""

import os

from hypothesis import Phase, settings

# Examples are small already, and the interpreter is slow: shrinking takes minutes.
settings.register_profile(
    "interpreted",
    settings.get_profile("repeatable"),
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile("interpreted")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    from tests.pretended import interpreting

    interpreting.install()
