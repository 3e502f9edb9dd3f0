"""The Triton and CUDA C++ kernels of spectral_norm against the definition, differentiated by autograd in float64."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import ahead_of_time
import oracle
import pytest
import torch
from fastgan_kernels import spectral_norm
from fastgan_kernels._layers import Layer
from fastgan_kernels.spectral_norm import (
    spectral_norm_backward,
    spectral_norm_double_backward,
    spectral_norm_forward,
)
from torch import Tensor
from torch.nn import functional as F

import fastgan
from fastgan.ops import _spectral_norm_cuda

# The interpreter computes masked elements too, and NaN are put in on purpose: NumPy's warnings say nothing.
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-12
NAMES = ("normalised", "u", "v", "sigma", "grad_weight", "g_grad", "g_weight")
# (shape, dim): one element, few rows, few columns, several blocks, and the weights of convolutions.
SHAPES = (
    ((1, 1), 0), ((1, 40), 0), ((40, 1), 0), ((5, 7), 1), ((5, 33), 0), ((4, 3, 2, 3), 0), ((3, 4, 3, 2), 1),
    ((2, 3, 2, 1, 2), 2),
)  # fmt: skip


@dataclass
class Problem:
    """Inputs of all three orders."""

    n_power_iterations: int
    eps: float
    dims: list[int]
    weights: list[Tensor]
    u: list[Tensor]
    v: list[Tensor]
    grads: list[Tensor]
    ggs: list[Tensor]

    @property
    def x(self) -> Tensor:
        return self.weights[0]

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors = {name: [t.to(dtype) for t in getattr(self, name)] for name in ("weights", "u", "v", "grads", "ggs")}
        return replace(self, **tensors)


def problem(*layers, n_power_iterations=1, eps=EPS, dtype=torch.float32, channels_last=False) -> Problem:
    """Layers, (shape, dim) each, that some iterations have gone before: without any σ is near 0, and nothing is exact."""
    generator = torch.Generator().manual_seed(0)

    def weight(shape) -> Tensor:
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else t

    shapes, dims = [shape for shape, _ in layers], [dim for _, dim in layers]
    weights, grads, ggs = ([weight(shape) for shape in shapes] for _ in range(3))
    u, v = [], []
    for w, dim in zip(weights, dims, strict=True):
        start = torch.ones(w.numel() // w.shape[dim], dtype=torch.float64, device=DEVICE)
        _, *vectors, _ = defined(w.double(), start[:0], start, dim, 5, eps)
        for of, vector in zip((u, v), vectors, strict=True):
            of.append(vector.to(dtype))
    return Problem(n_power_iterations, eps, dims, weights, u, v, grads, ggs)


def forward(p: Problem) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    return spectral_norm_forward(p.weights, p.u, p.v, p.dims, p.n_power_iterations, p.eps)


def results_of(p: Problem) -> tuple[list[Tensor], ...]:
    normalised, u, v, sigma = forward(p)
    grads = spectral_norm_backward(p.grads, p.weights, u, v, sigma, p.dims)
    seconds = spectral_norm_double_backward(p.ggs, p.grads, p.weights, u, v, sigma, p.dims)
    return normalised, u, v, list(sigma), grads, *seconds


def defined(weight: Tensor, u: Tensor, v: Tensor, dim: int, n_power_iterations: int, eps: float) -> tuple[Tensor, ...]:
    matrix = weight.movedim(dim, 0).flatten(1)
    for _ in range(n_power_iterations):
        u = F.normalize(matrix.detach() @ v, dim=0, eps=eps)
        v = F.normalize(matrix.detach().t() @ u, dim=0, eps=eps)
    sigma = torch.vdot(u, matrix @ v)
    return weight / sigma, u, v, sigma


def by_definition(p: Problem) -> tuple[list[Tensor], ...]:
    layers = []
    for weight, u, v, dim, grad, gg in zip(p.weights, p.u, p.v, p.dims, p.grads, p.ggs, strict=True):
        weight, grad = weight.detach().requires_grad_(), grad.detach().requires_grad_()
        outputs = defined(weight, u, v, dim, p.n_power_iterations, p.eps)
        (grad_weight,) = torch.autograd.grad(outputs[0], weight, grad, create_graph=True)
        seconds = torch.autograd.grad(grad_weight, (grad, weight), gg)
        layers.append([t.detach() for t in (*outputs, grad_weight, *seconds)])
    return tuple(zip(*layers, strict=True))


def pooled(results: tuple[list[Tensor], ...]) -> dict[str, Tensor]:
    """All layers' in one, in the order of indices."""
    return {name: torch.cat([t.flatten() for t in of]) for name, of in zip(NAMES, results, strict=False)}


def assert_as_exact_as_eager(p: Problem) -> None:
    oracle.assert_kernels_are_as_exact_as_eager(
        pooled(results_of(p)), lambda p, dtype: pooled(by_definition(p.to(dtype))), p, {}
    )


@pytest.fixture
def small_tiles(monkeypatch):
    """Several blocks of each layer, with several tiles, and several launches, on weights that the interpreter can cover."""
    monkeypatch.setattr(spectral_norm, "_TILE", 32)
    monkeypatch.setattr(spectral_norm, "_HEIGHTS", (1, 2, 8))
    monkeypatch.setattr(spectral_norm, "_BLOCKS", 2)
    monkeypatch.setattr(spectral_norm, "_MAX_LAYERS", 4)
    monkeypatch.setattr(spectral_norm, "_cached_plan", spectral_norm._Plan)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels, as they are launched."""
    names: list[str] = []
    launch = spectral_norm.launch
    monkeypatch.setattr(
        spectral_norm, "launch", lambda kernel, *args: (names.append(kernel.__name__), launch(kernel, *args))
    )
    return names


@pytest.mark.parametrize(("n_power_iterations", "channels_last"), [(0, True), (1, False), (1, True), (2, False)])
def test_every_layer_is_as_exact_as_eager(small_tiles, n_power_iterations, channels_last):
    assert_as_exact_as_eager(problem(*SHAPES, n_power_iterations=n_power_iterations, channels_last=channels_last))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_is_as_exact_as_eager(dtype):
    assert_as_exact_as_eager(problem(*SHAPES, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 9000), (9000, 1), (1, 1), (33, 600)], ids=str)
def test_a_single_layer_of_any_proportions(shape):
    assert_as_exact_as_eager(problem((shape, 0)))


def test_forty_layers_take_two_launches_in_each_direction(launches):
    p = problem(*(((1 + i % 5, 2 + i % 7), i % 2) for i in range(40)))
    results = by_definition(p.to(torch.float64))
    normalised, u, v, sigma = forward(p)
    assert launches == ["_multiply_kernel", "_divide_kernel"]
    spectral_norm_backward(p.grads, p.weights, u, v, sigma, p.dims)
    assert launches[2:] == ["_add_kernel", "_backward_kernel"]
    spectral_norm_double_backward(p.ggs, p.grads, p.weights, u, v, sigma, p.dims)
    assert launches[4:] == ["_add_kernel", "_double_backward_kernel"]
    for found, exact in zip(normalised, results[0], strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_an_iteration_more_is_a_launch_more(launches):
    forward(problem(*SHAPES, n_power_iterations=3))
    assert launches == [*["_multiply_kernel"] * 3, "_divide_kernel"]


def test_what_is_built_for_shapes_serves_every_tensor_of_them(monkeypatch):
    p = problem(*SHAPES)
    expected = pooled(results_of(p))
    monkeypatch.setattr(spectral_norm, "_Plan", None)
    moved = replace(p, weights=[w.clone() for w in p.weights], u=[u.clone() for u in p.u])
    monkeypatch.setattr(torch, "tensor", None)
    oracle.assert_same(pooled(results_of(moved)), expected, NAMES)


def test_the_arguments_are_left_as_they_are():
    p = problem(*SHAPES)
    before = [t.clone() for t in (*p.weights, *p.u, *p.v)]
    normalised, u, v, _ = forward(p)
    assert all(torch.equal(t, b) for t, b in zip((*p.weights, *p.u, *p.v), before, strict=True))
    storages = {t.untyped_storage().data_ptr() for t in (*p.weights, *p.u, *p.v)}
    assert not storages & {t.untyped_storage().data_ptr() for t in (*normalised, *u, *v)}


def test_results_begin_where_the_widest_loads_are_possible():
    for results in forward(problem(*SHAPES))[:3]:
        assert all(t.storage_offset() * t.element_size() % 128 == 0 for t in results)


def test_results_have_the_memory_format_of_the_weight_whatever_that_of_the_gradients():
    p, other = problem(*SHAPES, channels_last=True), problem(*SHAPES)
    expected = results_of(p)
    results = results_of(replace(p, grads=other.grads, ggs=other.ggs))
    mixed = by_definition(replace(p, grads=other.grads, ggs=other.ggs).to(torch.float64))
    for name, found, exact, of_kind in zip(NAMES, results, mixed, expected, strict=True):
        for i, weight in enumerate(p.weights):
            torch.testing.assert_close(found[i].double(), exact[i].double(), rtol=1e-3, atol=1e-4)
            assert found[i].stride() == of_kind[i].stride()
            if name in ("normalised", "grad_weight", "g_grad", "g_weight") and p.dims[i] < 2 < weight.dim():
                assert found[i].stride() == weight.stride()


def test_any_strides_are_taken():
    p = problem(((6, 8), 0), ((4, 6, 3, 3), 0), ((4, 6, 3, 3), 1))
    expected = pooled(results_of(p))
    strided = {
        name: [F.pad(t, (1, 1))[..., 1:-1] for t in getattr(p, name)] for name in ("weights", "u", "v", "grads", "ggs")
    }
    assert not any(t.is_contiguous() for t in strided["weights"])
    oracle.assert_same(pooled(results_of(replace(p, **strided))), expected, NAMES)


def test_a_layer_without_a_gradient_gets_none_and_the_others_what_they_get_with_it(launches):
    p = problem(*SHAPES)
    *_, grads, g_grads, g_weights = results_of(p)
    _, u, v, sigma = forward(p)
    absent = {0, 4, len(SHAPES) - 1}

    def some(tensors: list) -> list:
        return [None if i in absent else t for i, t in enumerate(tensors)]

    launches.clear()
    found = spectral_norm_backward(some(p.grads), p.weights, u, v, sigma, p.dims)
    seconds = spectral_norm_double_backward(some(p.ggs), p.grads, p.weights, u, v, sigma, p.dims)
    assert len(launches) == 4
    for results, all_results in zip((found, *seconds), (grads, g_grads, g_weights), strict=True):
        for i, result in enumerate(results):
            assert result is None if i in absent else torch.equal(result, all_results[i])
    assert spectral_norm_backward([None] * len(SHAPES), p.weights, u, v, sigma, p.dims) == [None] * len(SHAPES)
    assert len(launches) == 4


def test_a_gradient_that_is_absent_from_the_second_derivative_counts_as_zero():
    p = problem(*SHAPES)
    _, u, v, sigma = forward(p)
    zeros = [torch.zeros_like(g) for g in p.grads]
    expected = spectral_norm_double_backward(p.ggs, zeros, p.weights, u, v, sigma, p.dims)
    found = spectral_norm_double_backward(p.ggs, [None] * len(zeros), p.weights, u, v, sigma, p.dims)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_zero_nan_and_inf_stay_in_their_layer_and_give_what_the_definition_gives(small_tiles, value):
    p = problem(((1, 40), 0), ((5, 33), 0), ((4, 3, 2, 3), 1))
    clean = results_of(p)
    spoiled = 1
    weights = [w.clone() for w in p.weights]
    weights[spoiled][0] = value
    if value == 0:
        weights[spoiled].zero_()
    results = results_of(replace(p, weights=weights))
    expected = by_definition(replace(p, weights=weights))
    for name, of, before, exact in zip(NAMES, results, clean, expected, strict=True):
        for i, result in enumerate(of):
            if i != spoiled:
                assert torch.equal(result, before[i]), name
        if value == 0 or name in ("normalised", "sigma"):
            assert torch.equal(of[spoiled].isnan(), exact[spoiled].isnan()), name


@pytest.mark.parametrize("n_power_iterations", [1, 2])
@pytest.mark.parametrize("size", [1e-13, 1e-10, 1e12])
def test_small_and_large_weights_neither_vanish_nor_overflow(small_tiles, size, n_power_iterations):
    """W v below eps is not normalised to 1; Wᵀ W v would leave float32's range where W v does not."""
    p = problem(*SHAPES[:5], n_power_iterations=n_power_iterations)
    p = replace(p, weights=[w * size for w in p.weights])
    for name, found, exact in zip(NAMES[:4], forward(p), by_definition(p.to(torch.float64)), strict=False):
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=0 if name == "sigma" else 1e-5)


def test_a_weight_past_the_range_of_the_offsets_is_an_error():
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements, not 2147483648"):
        Layer(0, torch.Size([2**16, 2**15]), False, 0).matrix()


# -------------------------------------------------------------------------------------------------------------- CUDA C++

NVCC = os.environ.get("FASTGAN_NVCC", shutil.which("nvcc"))
SOURCE = Path(__file__).parents[2] / "csrc" / "cuda" / "spectral_norm.cu"
needs_nvcc = pytest.mark.skipif(not NVCC, reason="needs nvcc")
MAX_LAYERS = 64


class CudaArguments(ctypes.Structure):
    """`struct SpectralNorm` of csrc/cuda/spectral_norm.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "n_power_iterations")),
        ("eps", ctypes.c_double),
        ("items", ctypes.c_int64 * 3),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_void_p * MAX_LAYERS) for name in ("weights", "u", "v")),
        *((name, ctypes.c_void_p) for name in ("normalised", "new_u", "new_v", "sigma", "scratch")),
    )


@pytest.fixture(scope="module")
def kernel_on_cpu(tmp_path_factory):
    """The kernel's source, compiled for the CPU."""
    library = tmp_path_factory.mktemp("cuda") / "spectral_norm.so"
    source = Path(__file__).with_name("spectral_norm_on_cpu.cpp")
    options = ["-x", "c++", "-O1", "-std=c++17", "-Xcompiler=-fPIC,-w", "-shared", "-o", str(library)]
    subprocess.run([NVCC, *options, str(source)], check=True)
    return ctypes.CDLL(str(library)).spectral_norm_forward_on_cpu


@pytest.fixture
def cuda(kernel_on_cpu, monkeypatch) -> Callable[[Problem], tuple]:
    """Serves a problem by the CUDA C++ kernel, on three blocks."""

    def run(dtype, table, items, weights, u, v, n_power_iterations, eps, *results_and_stream):
        arguments = CudaArguments(
            len(weights), n_power_iterations, eps, (ctypes.c_int64 * 3)(*items), table,
            *((ctypes.c_void_p * MAX_LAYERS)(*addresses) for addresses in (weights, u, v)), *results_and_stream[:-1],
        )  # fmt: skip
        kernel_on_cpu(dtype, ctypes.byref(arguments), 3)

    module = SimpleNamespace(threads=256, element_item=8192, max_layers=MAX_LAYERS, spectral_norm_forward=run)
    monkeypatch.setitem(sys.modules, "fastgan._cuda", module)
    monkeypatch.setattr(fastgan, "_cuda", module, raising=False)
    monkeypatch.setattr(_spectral_norm_cuda, "_current_stream", lambda _: 0)
    return lambda p: _spectral_norm_cuda.forward(p.weights, p.u, p.v, p.dims, p.n_power_iterations, p.eps)


@needs_nvcc
@pytest.mark.parametrize(
    ("n_power_iterations", "dtype", "channels_last"),
    [(0, torch.float32, False), (1, torch.float32, True), (3, torch.float32, False), (1, torch.float64, False),
     (1, torch.bfloat16, False), (0, torch.float16, True)],
    ids=str,
)  # fmt: skip
def test_the_cuda_kernel_is_as_exact_as_eager(cuda, n_power_iterations, dtype, channels_last):
    layers = (*SHAPES, ((1, 9000), 0), ((9000, 1), 0), ((70, 300), 0))
    p = problem(*layers, n_power_iterations=n_power_iterations, dtype=dtype, channels_last=channels_last)
    normalised, u, v, sigma = cuda(p)
    oracle.assert_kernels_are_as_exact_as_eager(
        pooled((normalised, u, v, list(sigma))),
        lambda p, dtype: pooled(by_definition(p.to(dtype))), p, {},
    )  # fmt: skip
    by_triton = forward(p)[0]
    assert [t.stride() for t in normalised] == [t.stride() for t in by_triton]


@needs_nvcc
def test_the_cuda_kernel_gives_what_the_definition_gives_of_zero_nan_and_small_weights(cuda):
    p = problem(((5, 33), 0), ((40, 9), 0), ((3, 4), 1), ((6, 6), 0))
    weights = [p.weights[0] * 0, p.weights[1].clone(), p.weights[2] * 1e-13, p.weights[3]]
    weights[1][3, 2] = torch.nan
    p = replace(p, weights=weights)
    for found, exact in zip(cuda(p), by_definition(p.to(torch.float64)), strict=False):
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=0, equal_nan=True)


@needs_nvcc
def test_the_cuda_kernel_neither_spills_nor_lets_fewer_than_two_blocks_run_at_once():
    capabilities = [target.arch for target in ahead_of_time.GPUS.values() if target.backend == "cuda"]
    targets = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in capabilities]
    command = [NVCC, "-c", "-std=c++17", "-O3", "-Xptxas=-v", "--threads=0", *targets, str(SOURCE), "-o", os.devnull]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = re.findall(r"(\d+) bytes spill stores", log)
    assert spilled == ["0"] * (4 * len(targets))
    assert all(int(registers) <= 128 for registers in re.findall(r"Used (\d+) registers", log))


# ---------------------------------------------------------------------------------------------- ahead of time, and CUDA


def run_every_order(dtype: torch.dtype) -> None:
    for n_power_iterations in (0, 2) if dtype == torch.float32 else (1,):
        results_of(problem(((64, 27), 0), ((4, 3, 4, 4), 1), n_power_iterations=n_power_iterations, dtype=dtype))


def compiled_cases() -> Iterator[tuple[str, Callable]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        yield str(dtype), partial(run_every_order, dtype)


needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@needs_cuda
def test_a_captured_graph_replays_bit_for_bit():
    p = problem(*SHAPES)
    results_of(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = results_of(p)
    for w in p.weights:
        w.copy_(torch.randn_like(w))
    graph.replay()
    oracle.assert_same(pooled(results), pooled(results_of(p)), NAMES)
