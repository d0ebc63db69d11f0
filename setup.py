"""Builds the CPU kernel; everything else about the package is in pyproject.toml.

One shared library with a plain C interface, loaded through ctypes: no headers of Python
or PyTorch, one library for all their versions. Each file gets the instructions it is
written for, and which of them run is decided at run time. What a compiler is too old
for is left out. Without one that works, the package installs all the same and says at
run time what is slower.
"""

import platform
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = Path("vllm_moe_prune/kernels/cpu")
# OpenMP is compiled for but not linked: the library joins the runtime, and so the
# threads and their places, of the PyTorch it is loaded into.
COMMON = [
    *("-std=c++17", "-O3", "-g0", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math"),
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    *AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-mpopcnt", "-mprefer-vector-width=512"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # gcc means its own headers
]
VBMI2 = [*AVX512, "-mavx512vbmi2"]
BF16 = [*VBMI2, "-mavx512bf16"]
AMX = [*BF16, "-mamx-tile", "-mamx-bf16"]
LEVELS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "vbmi2": VBMI2}
PAIRS = {
    **{"portable": "generic.cpp", "avx2": "generic.cpp"},
    **{"avx512": "fma.cpp", "vbmi2": "fma.cpp"},
}
DOTS = {
    "avx2": AVX2,
    # Compilers know AVX-512 VNNI as long as VBMI2.
    "avx512vnni": [*AVX512, "-mavx512vnni"],
}
"""Dot products of bytes, by which tokens rounded to int8 are multiplied."""
ACTIVATIONS = ("portable", "avx2", "avx512")
X86 = platform.machine() in {"x86_64", "AMD64"}
STEPS = {
    "MOE_PRUNE_X86": ("loading.cpp", VBMI2),
    "MOE_PRUNE_BF16": ("expand.cpp", BF16),
    "MOE_PRUNE_AMX": ("amx.cpp", [*AMX, "-DMOE_PRUNE_ISA=amx"]),
    "MOE_PRUNE_AVXVNNI": (
        "dots.cpp",
        [*AVX2, "-mavxvnni", "-DMOE_PRUNE_ISA=avxvnni"],
    ),
}
"""What a compiler may be too old for, each with all before it: the macro that asks for
it, the source behind it and its flags."""


def units(steps: Iterable[str]) -> list[tuple[str, list[str]]]:
    """What is compiled: a source and its flags; of ``STEPS`` only these."""
    levels = {
        name: [*flags, f"-DMOE_PRUNE_ISA={name}"] for name, flags in LEVELS.items()
    }
    pairs = [(source, levels[name]) for name, source in PAIRS.items()]
    activations = [("activation.cpp", levels[name]) for name in ACTIVATIONS]
    common: list[tuple[str, list[str]]] = [
        (name, []) for name in ("moe.cpp", "linear.cpp", "paths.cpp", "encode.cpp")
    ]
    macros = [f"-D{step}" for step in steps]
    if not macros:
        return [*common, pairs[0], activations[0]]
    dots = [
        ("dots.cpp", [*flags, f"-DMOE_PRUNE_ISA={name}"])
        for name, flags in DOTS.items()
    ]
    x86 = [*common, *pairs, *dots, *activations, *(STEPS[step] for step in steps)]
    return [(name, [*flags, *macros]) for name, flags in x86]


class BuildKernel(build_ext):
    """Compiles every unit with its own flags, some sources more than once."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; setuptools lets an optional kernel fail."""
        able = takewhile(lambda step: X86 and self._can_compile(STEPS[step][1]), STEPS)
        steps = list(able)
        objects = []
        for number, (name, flags) in enumerate(units(steps)):
            objects += self.compiler.compile(
                [str(FOLDER / name)],
                output_dir=str(Path(self.build_temp) / str(number)),
                extra_postargs=[*COMMON, *flags],
                depends=ext.depends,
            )
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), target_lang="c++"
        )

    def _can_compile(self, flags: list[str]) -> bool:
        probe = Path(self.build_temp) / "probe.cpp"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("#include <immintrin.h>\n")
        try:
            self.compiler.compile(
                [str(probe)], output_dir=self.build_temp, extra_postargs=flags
            )
        except CompileError:
            return False
        return True


setup(
    ext_modules=[
        Extension(
            "vllm_moe_prune.kernels._cpu",
            sources=sorted(str(path) for path in FOLDER.glob("*.cpp")),
            depends=sorted(str(path) for path in FOLDER.glob("*.h")),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernel},
)
