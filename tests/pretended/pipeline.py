"""The whole pipeline on a CPU and on a pretended device: same bytes, and what waits.

    python -m tests.pretended.run tests.pretended.pipeline [--json FILE]
        [--only FAMILY RECIPE] ... [--layers 4] [--width 128]

Ends with 1 if bytes differ. Recipes are those of ``bench/gpu/prune.py``; counts are of
one run, by decoder layer.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu.prune import FAMILIES, RECIPES, pruned, recipe, source
from tests.pretended import dispatch
from tests.pretended.cuda import PretendedCuda
from tests.tiny import tiny_text
from vllm_moe_prune.recipes.schema import Recipe


@contextmanager
def plain_attention() -> Iterator[None]:
    """A CPU's own attention rounds otherwise than the products that a device makes."""
    switches = torch.backends.cuda
    before = switches.flash_sdp_enabled(), switches.mem_efficient_sdp_enabled()
    switches.enable_flash_sdp(False)
    switches.enable_mem_efficient_sdp(False)
    yield
    switches.enable_flash_sdp(before[0])
    switches.enable_mem_efficient_sdp(before[1])


def counted(device: PretendedCuda) -> dict[str, Any]:
    """What there was so far."""
    return {
        "launches": sum(device.launches.values()),
        "waits": sum(device.waits.values()),
        "copied ahead": sum(device.overlapped.values()),
        "lines": device.waits.copy(),
        "launching": device.lines.copy(),
    }


def compared(
    checkpoint: Path, layers: int, chosen: Recipe, out: Path
) -> dict[str, Any]:
    """One recipe on both."""
    device = dispatch.ACTIVE
    assert device is not None
    before, start = counted(device), time.process_time()
    found = pruned(checkpoint, chosen, out / "cuda", "cuda")
    after, taken = counted(device), time.process_time() - start
    # Sensitivity is measured in another type on CPUs: then it is compared with itself.
    against = "cuda" if chosen.experts.budget == "sensitivity" else "cpu"
    wanted = pruned(checkpoint, chosen, out / "again", against)
    return {
        "against": against,
        "same": bool(found) and found == wanted,
        **{
            what: round((after[what] - before[what]) / layers)
            for what in ("launches", "waits", "copied ahead")
        },
        "seconds": round(taken, 1),
        "most waits": (after["lines"] - before["lines"]).most_common(12),
        "most launches": (after["launching"] - before["launching"]).most_common(12),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=2, action="append")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name, plain_attention():
        text = tiny_text(Path(name))
        for at, (family, chosen) in enumerate(
            options.only or itertools.product(FAMILIES, RECIPES)
        ):
            out = Path(name, str(at))
            checkpoint = source(out, family, options.layers, options.width)
            about = {"family": family, "recipe": chosen}
            of = compared(checkpoint, options.layers, recipe(chosen, text), out)
            found.append(about | of)
            print(found[-1], flush=True)  # noqa: T201
            if options.json is not None:
                options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    sys.exit(not all(one["same"] for one in found))


if __name__ == "__main__":
    main()
