"""Builds fastgan._C, C++ kernels on raw pointers behind pybind11, and where there is an nvcc fastgan._cuda, likewise in CUDA
C++. Neither torch nor a GPU is needed to build."""

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

# Those that differ in machine code; later ones translate the last.
CUDA_ARCHITECTURES = ("80", "90", "100", "120")


def find_nvcc() -> str | None:
    """FASTGAN_NVCC, which may also be empty for none; else that of CUDA_HOME, or on the PATH."""
    if "FASTGAN_NVCC" in os.environ:
        return os.environ["FASTGAN_NVCC"] or None
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")


def nvcc_flags(nvcc: str) -> list[str]:
    """Every architecture that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    known = [arch for arch in CUDA_ARCHITECTURES if f"compute_{arch}" in listed]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}", "-std=c++17", "-O3", "--threads=0"]


class BuildKernels(build_ext):
    def build_extension(self, extension) -> None:
        if extension.name != "fastgan._cuda":
            return super().build_extension(extension)
        # nvcc links CUDA's runtime statically, so the module loads also where there is only a driver, or not even that.
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        headers = [f"-I{path}" for path in (*extension.include_dirs, *self.include_dirs)]
        options = ["-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", *nvcc_flags(NVCC), *headers]
        self.spawn([NVCC, *options, *extension.sources, "-o", str(target)])

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

NVCC = find_nvcc()
cuda_kernels = Pybind11Extension(
    "fastgan._cuda",
    ["csrc/cuda/bindings.cpp", "csrc/cuda/spectral_norm.cu"],
    depends=["csrc/cuda/spectral_norm.h"],
    optional=True,
)

ParallelCompile().install()
setup(ext_modules=[kernels, *[cuda_kernels] * (NVCC is not None)], cmdclass={"build_ext": BuildKernels})
