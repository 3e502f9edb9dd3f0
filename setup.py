"""Builds fastgan._C: C++ kernels on raw pointers behind pybind11. torch is not needed to build."""

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
                ]
                extension.extra_link_args += ["-fopenmp"]
        super().build_extensions()


kernels = Pybind11Extension(
    "fastgan._C",
    ["csrc/bindings.cpp", "csrc/cpu/baseline.cpp", "csrc/cpu/avx2.cpp", "csrc/cpu/avx512.cpp"],
    depends=["csrc/cpu/kernels.h", "csrc/cpu/kernels.inc", "csrc/cpu/simd.h", "csrc/cpu/norm_act.h", "csrc/cpu/conv.h"],
    cxx_std=17,
    # Without a working compiler the package still installs; `fastgan doctor` then says what is missing.
    optional=True,
)

ParallelCompile().install()
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
