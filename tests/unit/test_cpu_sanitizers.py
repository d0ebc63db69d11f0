"""The C++ of the CPU kernel under address and undefined-behaviour sanitizers."""

import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),  # mostly the compiler's
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]


def build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel with the flags that setup.py gives each file, and the fuzzer."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", asked.update)
    monkeypatch.chdir(ROOT)
    recipe = runpy.run_path("setup.py")
    assert asked["ext_modules"]
    kernel = Path(recipe["FOLDER"])
    jobs = [(kernel / name, flags) for name, flags in recipe["units"]()]
    x86 = [flag for flag in jobs[0][1] if flag == "-DMOE_PRUNE_X86"]
    objects = []
    for number, (source, flags) in enumerate(
        [*jobs, (Path("tests/native/fuzz.cpp"), x86)]
    ):
        target = folder / f"{number}.o"
        command = ["g++", *recipe["COMMON"], *flags, *SANITIZE, "-c", str(source)]
        subprocess.run([*command, "-o", str(target)], check=True)
        objects.append(str(target))
    program = folder / "fuzz"
    subprocess.run(
        ["g++", "-fopenmp", *SANITIZE, *objects, "-o", str(program)], check=True
    )
    return program


def test_random_layers_stay_within_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = build(tmp_path, monkeypatch)
    # vLLM, in the same process before, preloads libraries; the sanitizer comes first.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    ran = subprocess.run(
        [str(program), "25", "1"], capture_output=True, text=True, check=False, env=env
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-4000:]
    assert "levels agree" in ran.stdout
