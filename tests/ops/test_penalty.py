"""Norms and squares of samples against plain torch."""

import pytest
import torch
from oracle import Errors, two_orders

from fastgan.ops import penalty, sample_norms, sample_squares

SHAPES = [(3, 5), (2, 3, 4, 4), (4, 3, 100, 100), (1, 40000), (5, 1), (2, 3, 2, 3, 2)]


def squares(x):
    return x.square().flatten(1).sum(1)


def norms(x):
    return (squares(x) + 1e-12).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("ours", "stock"), [(sample_squares, squares), (sample_norms, norms)], ids=["squares", "norms"]
)
def test_values_and_both_derivatives_are_as_exact_as_eager(ours, stock, dtype, poisoned):
    def in_dtype(x):
        return stock(x).to(penalty.accumulation_dtype(dtype))

    errors = Errors()
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        for layout in (torch.contiguous_format, *[torch.channels_last] * (x.dim() == 4)):
            x = x.contiguous(memory_format=layout)
            results = [
                two_orders(f, [x.to(d).requires_grad_()], dtype)
                for f, d in ((ours, dtype), (in_dtype, dtype), (stock, torch.float64))
            ]
            errors.add(["y", "x", "g_x", "g_grad_y"], *results)
    errors.check()


@pytest.mark.parametrize("served_by", ["automatic", "triton", "reference"])
def test_gradcheck_and_gradgradcheck(served_by, use_backend):
    """Triton through the interpreter where there is no GPU."""
    if served_by != "automatic":
        use_backend(served_by)
    x, y = (torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    factors = torch.randn(2, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.fastgan
    for function, inputs in ((ops.sample_dot, (x, y)), (ops.sample_scale, (x, factors)), (sample_norms, (x,))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_opcheck():
    x, y, factors = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3)
    torch.library.opcheck(torch.ops.fastgan.sample_dot, (x.requires_grad_(), y))
    torch.library.opcheck(torch.ops.fastgan.sample_scale, (x, factors.requires_grad_()))


def test_the_norm_of_zero_has_a_gradient_of_zero():
    x = torch.zeros(2, 3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(sample_norms(x).sum(), x, create_graph=True)
    assert torch.equal(grad, torch.zeros_like(x))
    assert torch.isfinite(torch.autograd.grad(grad.sum(), x)[0]).all()


def test_any_strides_are_taken():
    x = torch.randn(4, 6, 8)
    for view in (x[:, ::2], x.transpose(1, 2), x.transpose(0, 1), x[:1].expand(3, -1, -1), x[:0], x[:, :0]):
        torch.testing.assert_close(sample_squares(view), squares(view))
        factors = torch.randn(view.shape[0])
        torch.testing.assert_close(torch.ops.fastgan.sample_scale(view, factors), view * factors.view(-1, 1, 1))
    y = torch.randn(2, 3, 4, 4)
    mixed = torch.ops.fastgan.sample_dot(y, y.flip(1).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(mixed, (y * y.flip(1)).flatten(1).sum(1))


def test_the_bits_do_not_depend_on_the_number_of_threads():
    x, threads, found = torch.randn(3, 50001), torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(sample_squares(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_function_transforms_see_through_the_operator():
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.func.jacrev(sample_norms)(x), torch.func.jacrev(norms)(x))


def test_bad_input_names_the_argument():
    with pytest.raises(TypeError, match="x must be float32"):
        sample_squares(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"x must have shape \(N, \*\)"):
        sample_squares(torch.tensor(1.0))
