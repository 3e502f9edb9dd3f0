"""Builds fastgan._C: C++ kernels on raw pointers behind pybind11. torch is not needed to build."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup


class BuildKernels(build_ext):
    def build_extensions(self) -> None:
        if self.compiler.compiler_type == "unix":
            for extension in self.extensions:
                # -fno-trapping-math lets a ternary become a select; OpenMP binds to the runtime that torch has loaded.
                extension.extra_compile_args += [
                    "-O3",
                    "-fopenmp",
                    "-fno-math-errno",
                    "-fno-trapping-math",
                    "-Wno-psabi",
                    "-Wno-maybe-uninitialized",  # of which GCC's own intrinsics are full
                ]
                extension.extra_link_args += ["-fopenmp"]
        super().build_extensions()


kernels = Pybind11Extension(
    "fastgan._C",
    ["csrc/bindings.cpp", *(f"csrc/cpu/{isa}.cpp" for isa in ("baseline", "avx2", "avx512", "amx"))],
    depends=[str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").rglob(pattern)],
    cxx_std=17,
    # Without a working compiler the package still installs; `fastgan doctor` then says what is missing.
    optional=True,
)

ParallelCompile().install()
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
