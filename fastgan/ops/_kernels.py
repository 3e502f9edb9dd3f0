"""Which kernel runs when an operator is called: PyTorch's dispatcher tells the device, and the backend that serves it does
the rest."""

import importlib
from collections.abc import Callable

import torch

from fastgan import backend

KERNELS: dict[str, dict[str, Callable]] = {}
"""Of each operator, what computes it on a device: what the dispatcher is told as well."""


tell_openmp = torch.get_num_threads
"""A thread's first question has torch tell OpenMP, which counts for each thread of the process anew, what `set_num_threads`
said. Without it our kernels would take all cores there."""


def register_kernel(operator: str, device: str, kernel: Callable) -> None:
    torch.library.impl(f"fastgan::{operator}", device, kernel)
    KERNELS.setdefault(operator, {})[device] = kernel


def register_kernels(
    operator: str,
    module: str,
    kernel: str,
    cpp: Callable,
    definition: Callable | None = None,
    cuda_cpp: Callable | None = None,
) -> None:
    """Serve `fastgan::operator` by `cpp` or by `kernel` of `fastgan_kernels.<module>`, whichever backend serves the device.

    An automatic choice prefers `cuda_cpp` to Triton where it can run. Where the definition does, and elsewhere than on CPU
    and CUDA, `definition`. An operator without one is not called there: its function runs the definition in its place.
    """

    def triton(*args):
        if cuda_cpp is not None and backend.requested() == "auto" and backend.cuda_cpp_obstacle() is None:
            return cuda_cpp(*args)
        return getattr(importlib.import_module(f"fastgan_kernels.{module}"), kernel)(*args)

    def register(device: str) -> None:
        def serve(*args):
            serving = backend.serving(device)
            if serving == "reference" and definition is not None:
                return definition(*args)
            if serving == "cpp":
                tell_openmp()
                return cpp(*args)
            return triton(*args)

        register_kernel(operator, device, serve)

    register("cpu")
    register("cuda")
    if definition is not None:
        torch.library.impl(f"fastgan::{operator}", "CompositeExplicitAutograd", definition)
