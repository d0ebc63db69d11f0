"""What registering the plugin costs each process of a vLLM server, with and without
waiting for vLLM's own imports (``plugin/load/lazy_register.py``).

    python bench/register.py [--rounds 5] [--json]

Each sample is a fresh process that first imports what that process of the server has
imported when plugins are loaded. Processor seconds, which other work on the machine
changes less than seconds; modules that registering added.
"""

import argparse
import json
import statistics
import subprocess
import sys

BEFORE = {
    "API server": "import vllm.entrypoints.openai.api_server",
    "engine core": "import vllm.v1.engine.core",
    "bare process": "import vllm",
}
NOW = """
import importlib
from vllm_moe_prune.plugin.load import lazy_register
def at_once(module, then):
    importlib.import_module(module)
    then()
lazy_register.when_imported = at_once
lazy_register.quantization = lambda load: load()
"""
SAMPLE = """
import json, sys, time
{before}
{patch}
import vllm_moe_prune.plugin as plugin
modules, began = len(sys.modules), time.process_time()
plugin.register()
print("FOUND", json.dumps([time.process_time() - began, len(sys.modules) - modules]))
"""


def sample(before: str, patch: str) -> tuple[float, int]:
    """Processor seconds of ``register()``, and modules it imported."""
    code = SAMPLE.format(before=before, patch=patch)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    line = next(one for one in done.stdout.splitlines() if one.startswith("FOUND"))
    seconds, modules = json.loads(line.removeprefix("FOUND"))
    return float(seconds), int(modules)


def main() -> None:
    """Samples in turns, then medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = {}
    for name, before in BEFORE.items():
        ways = {"deferred": "", "at once": NOW}
        found: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, patch in ways.items():
                found[way].append(sample(before, patch))
        rows[name] = {
            way: {
                "seconds": round(statistics.median(s for s, _ in values), 2),
                "modules": values[0][1],
            }
            for way, values in found.items()
        }
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'process':14} {'deferred':>20} {'at once':>20}")
    for name, row in rows.items():
        cells = [f"{v['seconds']:.2f} s, {v['modules']} modules" for v in row.values()]
        print(f"{name:14} {cells[0]:>20} {cells[1]:>20}")


if __name__ == "__main__":
    main()
