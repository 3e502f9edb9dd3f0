"""One convolution computes what a convolution and the pool after it, or the upsampling before it, compute."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from fastgan.ops import conv2d_avg_pool2d, upsample_conv2d
from fastgan.ops.resampled_conv import reference_down, reference_up

BOTH = [(conv2d_avg_pool2d, reference_down), (upsample_conv2d, reference_up)]
both = pytest.mark.parametrize(("op", "reference"), BOTH, ids=["down", "up"])
# kernel, padding, groups, image
GEOMETRIES = [
    ((3, 3), 1, 1, (8, 10)),
    ((3, 3), 0, 2, (7, 9)),
    ((2, 2), 1, 1, (5, 6)),
    ((5, 3), (2, 1), 1, (7, 7)),
    ((4, 1), (3, 0), 2, (6, 4)),
    ((1, 1), 0, 1, (4, 4)),
]


def tensors(kernel, groups, image, dtype=torch.float64, layout=torch.contiguous_format):
    x = torch.randn(2, 4, *image, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    weight = torch.randn(6, 4 // groups, *kernel, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(6, dtype=dtype, requires_grad=True)


@both
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize(("kernel", "padding", "groups", "image"), GEOMETRIES)
def test_values_layout_and_both_derivatives(op, reference, kernel, padding, groups, image, layout):
    inputs = tensors(kernel, groups, image, layout=layout)
    found, expected = (f(*inputs, padding=padding, groups=groups) for f in (op, reference))
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
    cotangent = torch.randn_like(expected)
    grads = [torch.autograd.grad(y, inputs, cotangent, create_graph=True) for y in (found, expected)]
    torch.testing.assert_close(*grads)
    seconds = [torch.autograd.grad(sum(g.square().sum() for g in grad), inputs[:2]) for grad in grads]
    torch.testing.assert_close(*seconds)


@both
def test_gradcheck_and_gradgradcheck(op, reference):
    inputs = tensors((3, 3), 1, (4, 5))
    gradcheck(lambda *args: op(*args, padding=1), inputs)
    gradgradcheck(lambda *args: op(*args, padding=1), inputs)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_at_most_twice_that_of_the_two_steps(op, reference, dtype):
    inputs = tensors((3, 3), 1, (16, 16), dtype)
    exact = reference(*(t.double() for t in inputs), padding=1)
    found, stock = (f(*inputs, padding=1) for f in (op, reference))
    error, allowed = ((y.double() - exact).norm() / exact.norm() for y in (found, stock))
    assert found.dtype == dtype
    assert error <= 2 * allowed + torch.finfo(dtype).eps, f"{error / allowed:.2f} times the error of the two steps"


@both
def test_under_autocast_the_weight_is_rounded_once(op, reference):
    x, weight, bias = tensors((3, 3), 1, (8, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = op(x, weight, bias, padding=1)
    exact = reference(x.bfloat16().double(), weight.double(), bias.double(), padding=1)
    assert found.dtype == torch.bfloat16
    error = (found.double() - exact).norm() / exact.norm()
    # The weight and the result: each one rounding, uniform to ± eps / 2.
    assert error < 2 * torch.finfo(torch.bfloat16).eps / 12**0.5


def test_a_padding_as_large_as_the_kernel_is_refused():
    with pytest.raises(ValueError, match=r"padding must be below weight's 3×3 taps, not 3"):
        upsample_conv2d(torch.randn(1, 4, 4, 4), torch.randn(6, 4, 3, 3), padding=3)


@both
def test_what_does_not_fit_names_the_argument(op, reference):
    with pytest.raises(ValueError, match="x must have 4 channels"):
        op(torch.randn(1, 3, 8, 8), torch.randn(6, 4, 3, 3))
    with pytest.raises(TypeError, match=r"bias must be torch\.float32"):
        op(torch.randn(1, 4, 8, 8), torch.randn(6, 4, 3, 3), torch.randn(6).double())
