"""The C++ of the CPU kernel under address and undefined-behavior sanitizers, and as
compilers leave it that are too old for some instructions."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
OLD = """#!/bin/sh
case "$*" in *{}*) echo "unrecognized option" >&2; exit 1;; esac
exec g++ "$@" -O0
"""
LOAD = "import ctypes, torch; print(ctypes.CDLL({!r}).moe_prune_level())"

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
    steps = list(recipe["STEPS"]) if recipe["X86"] else []
    jobs = [(kernel / name, flags) for name, flags in recipe["units"](steps)]
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


@pytest.mark.parametrize(
    ("unknown", "level"),
    [("-mavxvnni", 5), ("-mavx512vbmi2", 0)],
)
def test_what_a_compiler_is_too_old_for_is_left_out(
    unknown: str, level: int, tmp_path: Path
) -> None:
    compiler = tmp_path / "old"
    compiler.write_text(OLD.format(unknown))
    compiler.chmod(0o755)
    folders = [
        "--build-lib",
        str(tmp_path / "lib"),
        "--build-temp",
        str(tmp_path / "o"),
    ]
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        env=os.environ | {"CC": str(compiler), "CXX": str(compiler)},
        cwd=ROOT,
        check=True,
    )
    (library,) = tmp_path.rglob("_cpu*.so")
    ran = subprocess.run(
        [sys.executable, "-c", LOAD.format(str(library))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout) <= level
