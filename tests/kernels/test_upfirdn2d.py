"""The kernel of upfirdn2d against its definition."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from fastgan_kernels.upfirdn2d import upfirdn2d

# The interpreter computes masked elements too: NumPy's warnings say nothing.
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {"planes": torch.contiguous_format, "rows": torch.channels_last}
FILTERS = {"binomial": (4, 4), "separable": (5,), "ragged": (3, 4), "one tap": (1, 1), "long": (12,)}
RESAMPLINGS = [
    ([1, 1], [1, 1], [6, 6, 6, 6]),
    ([2, 2], [1, 1], [6, 5, 6, 5]),
    ([1, 1], [2, 2], [5, 5, 5, 5]),
    ([3, 1], [2, 3], [-2, 11, 10, -1]),
    ([1, 5], [3, 4], [9, 3, -7, 12]),
]


def problem(shape, filter_size, layout="planes", dtype=torch.float64):
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout]), torch.rand(filter_size, device=DEVICE) + 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filter_name", FILTERS)
@pytest.mark.parametrize(("up", "down", "padding"), RESAMPLINGS, ids=str)
def test_values_are_those_of_the_definition(up, down, padding, filter_name, layout):
    from fastgan.ops.upfirdn2d import reference

    for shape, flip in (((2, 3, 6, 7), False), ((1, 66, 5, 4), True), ((1, 1, 24, 29), True)):
        x, f = problem(shape, FILTERS[filter_name], layout)
        y = upfirdn2d(x, f, up, down, padding, flip, 1.7)
        torch.testing.assert_close(y, reference(x, f, up, down, padding, flip, 1.7))
        assert y.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_float32(layout, dtype):
    x, f = problem((2, 3, 9, 8), (6, 6), layout, dtype)
    found = upfirdn2d(x, f, [2, 2], [1, 1], [5, 5, 5, 5], False, 1.0)
    exact = upfirdn2d(x.double(), f, [2, 2], [1, 1], [5, 5, 5, 5], False, 1.0)
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=step, atol=10 * torch.finfo(torch.float32).eps)


def test_views_and_empty_batches():
    x, f = problem((4, 6, 5, 7), (4, 4))
    arguments = (f, [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0)
    for view in (x.mT, x[::2], x[:, :1].expand(4, 6, 5, 7), x[..., 1:4, ::2]):
        torch.testing.assert_close(upfirdn2d(view, *arguments), upfirdn2d(view.clone(), *arguments))
    assert upfirdn2d(x[:0], *arguments).shape == (0, 6, 10, 14)


# ── Ahead of time ────────────────────────────────────────────────────────────────────────────────────────────────────


def compiled_cases() -> Iterator[tuple[str, Callable]]:
    for dtype, layout, (up, down, padding), size in itertools.product(
        (torch.float32, torch.bfloat16, torch.float64), LAYOUTS, RESAMPLINGS[:3], ((4, 4), (12,))
    ):
        x, f = problem((2, 64, 32, 32), size, layout, dtype)
        yield f"{dtype} {layout} {up} {down} {size}", partial(upfirdn2d, x, f, up, down, padding, False, 1.0)
