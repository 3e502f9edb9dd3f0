"""pixel_norm against its formula."""

import pytest
import torch
from oracle import Errors, two_orders

from fastgan.ops import pixel_norm

SHAPES = ((5, 512), (3, 16, 6, 7), (2, 1, 3, 3), (2, 7, 3, 2, 3), (4, 9, 5))
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def formula(x, eps=1e-8):
    return x / (x.pow(2).sum(1, keepdim=True) / x.shape[1] + eps).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_values_and_both_derivatives_are_as_exact_as_eager(dtype):
    errors = Errors()
    for shape in SHAPES:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        results = [
            two_orders(f, [x.to(d).requires_grad_()], dtype)
            for f, d in ((pixel_norm, dtype), (formula, dtype), (formula, torch.float64))
        ]
        errors.add(["y", "grad_x", "g_x", "g_grad_y"], *results)
    errors.check()


def test_gradcheck_and_gradgradcheck():
    x = torch.randn(3, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pixel_norm, x)
    assert torch.autograd.gradgradcheck(pixel_norm, x)


def test_the_result_has_a_mean_square_of_one():
    torch.testing.assert_close(pixel_norm(torch.randn(4, 512)).square().mean(1), torch.ones(4))


def test_a_pixel_of_zeros_stays_zero_and_has_finite_derivatives():
    x = torch.zeros(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    y = pixel_norm(x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert not y.any()
    torch.testing.assert_close(grad, torch.full_like(x, 1e4))
    assert torch.autograd.grad(grad.square().sum(), x)[0].isfinite().all()


def test_squares_that_overflow_half_precision_do_not():
    x = torch.full((2, 8), 1000.0, dtype=torch.float16)
    assert torch.equal(pixel_norm(x), torch.ones_like(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_keeps_the_layout(layout):
    x = torch.randn(2, 6, 4, 4).contiguous(memory_format=LAYOUTS[layout])
    assert pixel_norm(x).stride() == x.stride()


def test_an_empty_batch_gives_an_empty_result():
    assert pixel_norm(torch.randn(0, 3, 4, 4)).shape == (0, 3, 4, 4)


BAD = {
    "no tensor": (([1.0],), TypeError, "x must be a tensor, not list"),
    "integers": ((torch.ones(2, 3, dtype=torch.int64),), TypeError, "x must be float32"),
    "one axis": ((torch.ones(3),), ValueError, r"x must have shape \(N, C, \*\), not \(3,\)"),
    "negative eps": ((torch.ones(2, 3), -1.0), ValueError, "eps must not be negative, not -1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        pixel_norm(*arguments)
