"""Builds the CPU kernel; everything else about the package is in pyproject.toml.

One shared library with a plain C interface, loaded through ctypes: no headers of Python
or PyTorch, one library for all their versions. Each file gets the instructions it is
written for, and which of them run is decided at run time. Without a C++ compiler the
package installs all the same and says at run time what is slower.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
ACTIVATIONS = ("portable", "avx2", "avx512")


def units() -> list[tuple[str, list[str]]]:
    """What is compiled: a source and its flags."""
    levels = {
        name: [*flags, f"-DMOE_PRUNE_ISA={name}"] for name, flags in LEVELS.items()
    }
    pairs = [(source, levels[name]) for name, source in PAIRS.items()]
    activations = [("activation.cpp", levels[name]) for name in ACTIVATIONS]
    common: list[tuple[str, list[str]]] = [("moe.cpp", []), ("encode.cpp", [])]
    if platform.machine() not in {"x86_64", "AMD64"}:
        return [*common, pairs[0], activations[0]]
    tiles = [*AMX, "-DMOE_PRUNE_ISA=amx"]
    others = [("loading.cpp", VBMI2), ("expand.cpp", BF16), ("amx.cpp", tiles)]
    x86 = [*common, *pairs, *activations, *others]
    return [(name, [*flags, "-DMOE_PRUNE_X86"]) for name, flags in x86]


class BuildKernel(build_ext):
    """Compiles every unit with its own flags, some sources more than once."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; setuptools lets an optional kernel fail."""
        objects = []
        for number, (name, flags) in enumerate(units()):
            objects += self.compiler.compile(
                [str(FOLDER / name)],
                output_dir=str(Path(self.build_temp) / str(number)),
                extra_postargs=[*COMMON, *flags],
                depends=ext.depends,
            )
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), target_lang="c++"
        )


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
