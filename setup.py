"""Builds fastgan._C, C++ kernels on raw pointers behind pybind11, and where there is an nvcc fastgan._cuda, likewise in CUDA
C++. Neither torch nor a GPU is needed to build."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

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
    """Every architecture that this nvcc knows, of those that FASTGAN_CUDA_ARCHITECTURES names: "90", say, or "80 90"."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    wanted = os.environ.get("FASTGAN_CUDA_ARCHITECTURES", "").split() or CUDA_ARCHITECTURES
    known = [arch for arch in wanted if f"compute_{arch}" in listed]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
    return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}", "-std=c++17", "-O3", "--threads=0"]


def is_outdated(built: str | Path, sources: Iterable[str]) -> bool:
    """Whether one of the sources, or how they are built, has changed since."""
    newest = max(Path(path).stat().st_mtime for path in (*sources, __file__))
    return not Path(built).exists() or Path(built).stat().st_mtime < newest


class BuildKernels(build_ext):
    user_options: ClassVar = [
        *build_ext.user_options,
        ("only=", None, "the one module to build: fastgan._cuda, say"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.only = None

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.only:
            self.extensions = [extension for extension in self.extensions if extension.name == self.only]
            if not self.extensions:
                raise SystemExit(f"{self.only} cannot be built: no nvcc was found")
            self.extensions[0].optional = False
        # Where editable installs and wheels find each other's objects: compiling takes minutes.
        self.build_temp = str(Path("build", f"temp.{self.plat_name}-{sys.implementation.cache_tag}"))
        self.parallel = self.parallel or 2  # C++ beside CUDA C++

    def build_extension(self, extension) -> None:
        if extension.name != "fastgan._cuda":
            return super().build_extension(extension)
        # nvcc links CUDA's runtime statically, so the module loads also where there is only a driver, or not even that.
        target = Path(self.get_ext_fullpath(extension.name))
        built = Path(self.build_temp, target.name)
        if is_outdated(built, (*extension.sources, *extension.depends)):
            built.parent.mkdir(parents=True, exist_ok=True)
            headers = [f"-I{path}" for path in (*extension.include_dirs, *self.include_dirs)]
            options = ["-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", *nvcc_flags(NVCC), *headers]
            self.spawn([NVCC, *options, *extension.sources, "-o", str(built)])
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))

    def build_extensions(self) -> None:
        if self.compiler.compiler_type == "unix":
            for extension in self.extensions:
                # Python's own flags have -fwrapv, with which loops of signed indices are hard to optimise: a layer norm's
                # backward takes 1.7 times as long. -fno-trapping-math lets a ternary become a select; OpenMP binds to the
                # runtime that torch has loaded.
                extension.extra_compile_args += [
                    "-O3",
                    "-fno-wrapv",
                    "-fopenmp",
                    "-fno-math-errno",
                    "-fno-trapping-math",
                    "-Wno-psabi",
                    "-Wno-maybe-uninitialized",  # of which GCC's own intrinsics are full
                ]
                extension.extra_link_args += ["-fopenmp"]
        super().build_extensions()


# Those that take longest to compile come first.
UNITS = ("avx2_norms", "avx512_norms", "avx512", "avx2", "baseline_norms", "baseline", "amx")
kernels = Pybind11Extension(
    "fastgan._C",
    ["csrc/bindings.cpp", *(f"csrc/cpu/{unit}.cpp" for unit in UNITS)],
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

ParallelCompile(needs_recompile=lambda built, source: is_outdated(built, (source, *kernels.depends))).install()
setup(ext_modules=[kernels, *[cuda_kernels] * (NVCC is not None)], cmdclass={"build_ext": BuildKernels})
