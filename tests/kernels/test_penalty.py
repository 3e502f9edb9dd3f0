"""The kernels of penalty against plain torch in float64."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import triton
import triton.language as tl
from fastgan_kernels import penalty
from fastgan_kernels.penalty import sample_dot, sample_scale
from torch import Tensor

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((3, 5), (5, 1), (130, 3), (2, 3, 4, 5), (2, 3, 12, 13), (2, 3, 2, 3, 2))


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


def column(factors: Tensor, x: Tensor) -> Tensor:
    return factors.view(-1, *[1] * (x.dim() - 1))


@pytest.fixture(params=["shipped tiles", "several programs"])
def _tiles(request, monkeypatch):
    if request.param == "several programs":
        monkeypatch.setattr(penalty, "_TILE", 32)
        monkeypatch.setattr(penalty, "PROGRAMS", 6)
        monkeypatch.setattr(penalty, "_cached_plan", penalty._Plan)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_and_products_are_exact_to_rounding(shape, dtype):
    """A product is rounded once; a sum has the dtype of accumulation."""
    x, y, factors = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), normal(shape[0], dtype=torch.float32)
    for layout in (torch.contiguous_format, *[torch.channels_last] * (len(shape) == 4)):
        x = x.contiguous(memory_format=layout)
        sums, scaled = sample_dot(x, y), sample_scale(x, factors)
        assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        products = x.double() * y.double()
        free = torch.finfo(sums.dtype).eps * products.abs().flatten(1).sum(1)
        assert ((sums - products.flatten(1).sum(1)).abs() <= 4 * free).all()
        assert scaled.stride() == x.stride() and scaled.dtype == dtype
        # The interpreter truncates to bfloat16.
        exact, step = x.double() * column(factors.double(), x), torch.finfo(dtype).eps
        torch.testing.assert_close(scaled.double(), exact, rtol=step, atol=torch.finfo(dtype).tiny * step * 4)


def test_several_programs_share_a_long_sample():
    x = normal(1, 5000, dtype=torch.float32)
    assert penalty._plan(x).splits > 1
    torch.testing.assert_close(sample_dot(x, x).double(), x.double().square().sum(1))


def test_any_strides_are_taken_and_empty_batches_give_zeros():
    x, y = normal(4, 6, 8), normal(4, 6, 8)
    views: tuple[Callable, ...] = (
        lambda t: t[:, ::2],
        lambda t: t.transpose(1, 2),
        lambda t: t.transpose(0, 1),
        lambda t: t[:1].expand(3, -1, -1),
        lambda t: t[:0],
        lambda t: t[:, :0],
    )
    for view in views:
        a, b = view(x), view(y)
        factors = normal(2 * a.shape[0])[::2]
        torch.testing.assert_close(sample_dot(a, b), (a * b).flatten(1).sum(1))
        torch.testing.assert_close(sample_scale(a, factors), a * column(factors, a))
    p, q = normal(2, 3, 4, 4), normal(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(sample_dot(p, q), (p * q).flatten(1).sum(1))


def test_nan_and_inf_stay_in_their_sample():
    x = normal(3, 40, dtype=torch.float32)
    x[1, 3], x[2, 7] = torch.nan, torch.inf
    sums = sample_dot(x, x)
    assert sums.isfinite().tolist() == [True, False, False] and sums[2] == torch.inf


@triton.jit
def offsets_kernel(out, t, shape):
    at, _ = penalty._tile(t, shape, 2, 4)
    tl.store(out + tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :], at)


def test_offsets_past_two_to_the_31_are_exact():
    out = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    offsets_kernel[(1,)](out, 2**30, (2**33, 2**34))
    assert out.tolist() == [[2**32 + row * 2**34 + col for col in range(4)] for row in range(2)]


# ---------------------------------------------------------------------------------------------- ahead of time, and CUDA


def launch(dtype: torch.dtype, *shape: int) -> None:
    x = normal(*shape, dtype=dtype)
    sample_dot(x, x)
    sample_scale(x, x.new_ones(x.shape[0], dtype=torch.float32))


def compiled_cases() -> Iterator[tuple[str, Callable]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((64, 3, 64, 64), (1024, 64)):
            yield f"{dtype} {shape}", partial(launch, dtype, *shape)
    yield "bare", partial(launch, torch.float32, 1, 1)


needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@needs_cuda
def test_a_captured_graph_replays_bit_for_bit():
    x = normal(2, 3, 256, 256, dtype=torch.float32)
    factors = normal(2, dtype=torch.float32)
    sample_dot(x, x), sample_scale(x, factors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums, scaled = sample_dot(x, x), sample_scale(x, factors)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(sums, sample_dot(x, x)) and torch.equal(scaled, sample_scale(x, factors))
