"""Commands in a process of their own that knows only a stand-in for the Hub.

The endpoint is read when huggingface_hub is imported, hence another process; several
commands share one, since importing takes long.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Runs each list of arguments as a command of its own, and tells how it went.
SESSION = """
import contextlib, io, json, sys
from vllm_moe_prune.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["vllm-moe-prune", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


def session(
    commands: dict[str, list[str]], endpoint: str, home: Path, **environment: str
) -> dict[str, Result]:
    """Run commands in one fresh process.

    Args:
        commands: Name -> arguments.
        endpoint: Of the stand-in.
        home: Where the library keeps its cache.
        environment: More variables.
    """
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING"))
    }
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    process = subprocess.run(
        [sys.executable, "-c", SESSION, json.dumps(list(commands.values()))],
        env=clean | settings | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    named = zip(commands, results, strict=True)
    return {name: Result(*result) for name, result in named}
