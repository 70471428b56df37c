"""Compiles the CPU kernels once for each instruction set; all else is in pyproject.toml.

Each extension is optional: where there is no compiler, or not for this instruction set, the package installs without it.
They are plain shared objects that gbnzoo.kernels loads through ctypes, no Python modules.
"""

import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

INSTRUCTION_SETS = {
    "avx512": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "portable": [],
}


class BuildAtOnce(build_ext):
    """All extensions at once, each in a folder of its own, since their object files have one name."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or True  # as many as there are processors

    def build_extension(self, ext):
        alone = copy.copy(self)
        alone.build_temp = str(Path(self.build_temp, ext.name))
        super(BuildAtOnce, alone).build_extension(ext)


setup(
    cmdclass={"build_ext": BuildAtOnce},
    ext_modules=[
        Extension(
            f"gbnzoo.kernels._ghost_norm_{name}",
            ["gbnzoo/kernels/ghost_norm.cpp", "gbnzoo/kernels/crops.cpp", "gbnzoo/kernels/order.cpp"],
            depends=["gbnzoo/kernels/threads.h", "gbnzoo/kernels/vectors.h"],
            language="c++",
            extra_compile_args=["-std=gnu++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", *flags],
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ],
)
