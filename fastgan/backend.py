"""Which implementation serves a device: C++ on the CPU, Triton on CUDA, the definition in plain torch everywhere else.

An operator may have CUDA C++ besides, which an automatic choice prefers to Triton where an nvcc has built it.

`FASTGAN_BACKEND` names one instead: ``auto`` (the default), ``cpp``, ``triton`` or ``reference``. An automatic choice
falls back to the definition, and leaves to it the tensors that are too small to gain; a backend asked for by name serves
all, and one that cannot raises `RuntimeError` with the reason.
"""

import functools
import importlib
import os
from typing import Literal, cast

Backend = Literal["cpp", "triton", "reference"]


@functools.cache
def obstacle(backend: Backend, device_type: str) -> str | None:
    """Why `backend` cannot serve tensors on `device_type`; None when it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if device_type != "cpu":
            return f"the C++ kernels serve CPU tensors, not {device_type}"
        try:
            importlib.import_module("fastgan._C")
        except ImportError as error:
            return f"fastgan._C is not there ({error}): install a C++ compiler, then reinstall fastgan"
        return None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != "cuda" and not (device_type == "cpu" and interpreted):
        return (
            f"the Triton kernels serve CUDA tensors, not {device_type} (TRITON_INTERPRET=1 runs them slowly on the CPU)"
        )
    try:
        importlib.import_module("triton")
        importlib.import_module("fastgan_kernels")
    except ImportError as error:
        return f"Triton is not there ({error}): pip install triton"
    return None


@functools.cache
def cuda_cpp_obstacle() -> str | None:
    """Why CUDA C++ cannot serve the operators that have it beside Triton; None when it can."""
    try:
        _cuda = importlib.import_module("fastgan._cuda")
    except ImportError as error:
        return f"fastgan._cuda is not there ({error}): put nvcc on the PATH, then reinstall fastgan"
    return _cuda.obstacle() or None


def requested() -> str:
    """What FASTGAN_BACKEND says."""
    return os.environ.get("FASTGAN_BACKEND", "auto")


@functools.cache
def is_automatic() -> bool:
    """Whether nobody named a backend: then stock torch serves what it is faster at. Decided once."""
    return requested() == "auto"


@functools.cache
def has_wide_lanes() -> bool:
    """Whether the C++ kernels have AVX-512. CPUs without it have smaller caches as well, in which Python's own code does not
    stay from one call to the next."""
    return obstacle("cpp", "cpu") is None and importlib.import_module("fastgan._C").cpu_capability() == "avx512"


has_wide_lanes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def native(device_type: str) -> Backend:
    """The backend that an automatic choice tries."""
    return "triton" if device_type == "cuda" else "cpp"


@functools.cache
def _serving(device_type: str) -> Backend:
    name = requested()
    if name == "auto":
        return native(device_type) if obstacle(native(device_type), device_type) is None else "reference"
    if name not in ("cpp", "triton", "reference"):
        raise RuntimeError(f"FASTGAN_BACKEND={name}: it must be auto, cpp, triton or reference")
    backend = cast(Backend, name)
    reason = obstacle(backend, device_type)
    if reason is not None:
        raise RuntimeError(f"FASTGAN_BACKEND={name}: {reason}")
    return backend


def serving(device_type: str) -> Backend:
    """The backend that serves the operators on `device_type` ("cpu", "cuda", …). Decided once for each device type."""
    return _serving(device_type)


# What torch.compiler.assume_constant_result sets; that would import all of torch._dynamo, which takes seconds.
serving._dynamo_marked_constant = True  # type: ignore[attr-defined]
is_automatic._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reset() -> None:
    """Decide again: the environment has changed."""
    _serving.cache_clear()
    is_automatic.cache_clear()
    obstacle.cache_clear()
    cuda_cpp_obstacle.cache_clear()
