"""`fastgan doctor`: what is installed, what serves each operator and why, and what to do about what is missing."""

import importlib.metadata
import platform

import torch
from rich.console import Group
from rich.table import Table

from fastgan import backend
from fastgan.ops import _autotune

OPERATORS = {
    "batch_norm_act": "normalisation, residual, activation",
    "group_norm_act": "likewise by group, instance or layer",
    "sample_squares": "norms of samples, for gradient penalties",
    "bias_act": "bias, activation, gain, clamp",
    "pixel_shuffle_act": "pixel shuffle, activation",
    "spectral_norm": "all of a model's power iterations",
    "convolution": "both convolutions and their gradients",
}
CUDA_CPP = {"spectral_norm"}  # those that have it beside Triton
_MEANINGS = {"cpp": "C++", "triton": "Triton", "reference": "plain torch"}


def report() -> Group:
    """Tables of versions, devices and backends, to print with rich."""
    return Group(_versions(), _devices(), _backends(), *_advice())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> Table:
    table = Table(title="Versions", title_justify="left", show_header=False)
    for package in ("fastgan", "torch", "triton", "numpy", "accelerate", "datasets"):
        table.add_row(package, torch.__version__ if package == "torch" else _version(package))
    table.add_row("python", platform.python_version())
    table.add_row("system", f"{platform.system()} {platform.machine()}")
    return table


def _devices() -> Table:
    table = Table(title="Devices", title_justify="left", show_header=False)
    table.add_row("cpu", _cpu())
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        table.add_row(f"cuda:{i}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        built = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        table.add_row("cuda", f"none: {built}")
    return table


def _cpu() -> str:
    threads = f"{torch.get_num_threads()} threads, torch uses {torch.backends.cpu.get_cpu_capability()}"
    if backend.obstacle("cpp", "cpu") is not None:
        return f"{threads}, fastgan has no C++ kernels"
    from fastgan import _C

    return f"{threads}, fastgan's C++ kernels use {_C.cpu_capability()}"


def _backends() -> Table:
    table = Table("operator", "device", "served by", "why", title="Backends", title_justify="left")
    for operator, what in OPERATORS.items():
        for device in ("cpu", "cuda"):
            table.add_row(f"{operator} [dim]({what})[/dim]", device, *_served(operator, device))
    return table


def _served(operator: str, device: str) -> tuple[str, str]:
    try:
        serving = backend.serving(device)
    except RuntimeError as error:
        return "[red]error[/red]", str(error)
    if operator == "convolution" and serving != "reference":
        return _convolution(device, serving)
    if serving == "triton" and operator in CUDA_CPP and backend.requested() == "auto":
        reason = backend.cuda_cpp_obstacle()
        return ("CUDA C++", "automatic") if reason is None else (_MEANINGS[serving], reason)
    if serving != "reference":
        return _MEANINGS[serving], "FASTGAN_BACKEND names it" if backend.requested() == serving else "automatic"
    if backend.requested() == "reference":
        return _MEANINGS[serving], "FASTGAN_BACKEND=reference"
    return _MEANINGS[serving], backend.obstacle(backend.native(device), device) or "no kernel for this device"


def _convolution(device: str, serving: str) -> tuple[str, str]:
    if device != "cpu":
        how = "whichever is measured to be faster for a shape" if _autotune.is_on() else "FASTGAN_AUTOTUNE=0"
        return ("cuDNN, Triton" if _autotune.is_on() else "cuDNN"), how
    if serving != "cpp":
        return "oneDNN", "the vendor's convolution in the fast layout"
    from fastgan import _C

    unit = "the CPU's matrix unit" if _C.has_matrix_unit() else "patches (this CPU has no matrix unit, AMX)"
    return "C++, oneDNN", f"whichever is faster for a shape: C++ for {unit}, or the vendor's in the fast layout"


def _advice() -> list[str]:
    advice = []
    if backend.obstacle("cpp", "cpu") is not None:
        advice.append(
            "To build the C++ kernels: install a C++ compiler (Debian, Ubuntu: apt install g++; macOS: "
            "xcode-select --install), then pip install --force-reinstall --no-deps from the checkout"
        )
    if torch.cuda.is_available() and backend.obstacle("triton", "cuda") is not None:
        advice.append("To run the kernels on the GPU: pip install triton")
    return [f"[yellow]{line}[/yellow]" for line in advice]
