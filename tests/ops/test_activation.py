"""The activations and poolings with a lean second derivative, against stock torch's."""

import pytest
import torch
import torch.nn.functional as F
from oracle import two_orders

from fastgan.ops import activation, avg_pool

X = (3, 4, 6, 6)
# Ours, stock, and the shape of a weight.
FUNCTIONS = {
    "relu": (activation.relu, F.relu, None),
    "leaky_relu": (lambda x: activation.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2), None),
    "leaky_relu of slope 0": (lambda x: activation.leaky_relu(x, 0), lambda x: F.leaky_relu(x, 0), None),
    "leaky_relu of slope -1": (lambda x: activation.leaky_relu(x, -1), lambda x: F.leaky_relu(x, -1), None),
    "hardtanh": (activation.hardtanh, F.hardtanh, None),
    "prelu": (activation.prelu, F.prelu, (1,)),
    "prelu of channels": (activation.prelu, F.prelu, (4,)),
    "avg_pool2d": (lambda x: avg_pool.avg_pool2d(x, 2), lambda x: F.avg_pool2d(x, 2), None),
    "avg_pool2d, all settings": (
        lambda x: avg_pool.avg_pool2d(x, (3, 2), 2, 1, True, False),
        lambda x: F.avg_pool2d(x, (3, 2), 2, 1, True, False),
        None,
    ),
    "avg_pool2d with a divisor": (
        lambda x: avg_pool.avg_pool2d(x, 2, divisor_override=3),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        None,
    ),
    "adaptive_avg_pool2d": (
        lambda x: avg_pool.adaptive_avg_pool2d(x, (4, None)),
        lambda x: F.adaptive_avg_pool2d(x, (4, None)),
        None,
    ),
}
IN_PLACE = {
    "relu": (lambda x: activation.relu(x, inplace=True), F.relu_),
    "leaky_relu": (lambda x: activation.leaky_relu(x, 0.2, inplace=True), lambda x: F.leaky_relu_(x, 0.2)),
    "hardtanh": (lambda x: activation.hardtanh(x, inplace=True), F.hardtanh_),
}


def inputs_of(name, dtype=torch.float64):
    shape = FUNCTIONS[name][2]
    return [torch.randn(s).to(dtype).requires_grad_() for s in (X, shape) if s]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_both_derivatives_are_stock_s(name, layout, dtype):
    ours, stock, _ = FUNCTIONS[name]
    inputs = [t.detach() for t in inputs_of(name, dtype)]
    inputs[0] = inputs[0].contiguous(memory_format=layout)
    found, expected = (two_orders(f, [t.clone().requires_grad_() for t in inputs], dtype) for f in (ours, stock))
    assert found[0].stride() == expected[0].stride()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None and b is not None else a, b)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck_and_gradgradcheck(name):
    function, inputs = FUNCTIONS[name][0], inputs_of(name)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_third_derivative_is_stock_s(name):
    def third(function):
        inputs = [t.detach().requires_grad_() for t in drawn]
        (first,) = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs[0], create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), inputs[-1], create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), inputs)

    drawn = inputs_of(name)
    torch.testing.assert_close(third(FUNCTIONS[name][0]), third(FUNCTIONS[name][1]))


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hardtanh", "prelu"])
def test_the_switching_points_and_special_values_are_stock_s(name):
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 1e-45, -1e-45])
    results = []
    for function in FUNCTIONS[name][:2]:
        x, weights = special.clone().requires_grad_(), [torch.full((1,), 0.3)] if name == "prelu" else []
        y = function(x, *weights)
        results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    torch.testing.assert_close(*results, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_writes_to_its_input_and_has_both_derivatives(name):
    ours, stock = IN_PLACE[name]
    x = torch.randn(X, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(*(two_orders(lambda x, f=f: f(x * 2), [x])[:2] for f in (ours, stock)))
    h = x * 2
    assert ours(h) is h
    assert torch.equal(h, FUNCTIONS[name][1](x * 2))
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        ours(x)


def test_in_place_on_a_view_writes_to_its_base():
    results = []
    for function in (lambda x: activation.relu(x, inplace=True), F.relu_):
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).requires_grad_()
        h = x * 1
        function(h[:, :3])
        results.append((h, *torch.autograd.grad(h.pow(2).sum(), x)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("stride", [0, (2, 0), (1, 2, 3)])
def test_a_pool_s_bad_stride_is_stock_s_error(stride):
    with pytest.raises(RuntimeError, match="stride"):
        avg_pool.avg_pool2d(torch.randn(X), 2, stride)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gradient_penalty_with_the_operator_first_and_last(name):
    """First it has no parameter before it, last none after it: in one an incomplete gradient shows, in the other not."""
    ours, stock, shape = FUNCTIONS[name]
    extra = [torch.rand(shape, dtype=torch.float64)] if shape else []
    x, mix = torch.randn(X, dtype=torch.float64), torch.randn(4, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (ours, stock):
        for layers in (
            lambda x, f=function: f(F.conv2d(x, mix).sin(), *extra),
            lambda x, f=function: F.conv2d(f(x.sin(), *extra), mix),
        ):
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(layers(leaf).pow(2).sum(), leaf, create_graph=True)
            results.append(torch.autograd.grad(grad.pow(2).sum(), [leaf, mix]))
    torch.testing.assert_close(results[:2], results[2:])


def test_opcheck():
    x, weight = torch.randn(X, requires_grad=True), torch.rand(4, requires_grad=True)
    ops, side = torch.ops.fastgan, torch.randn(X)
    for act, settings in (("relu", []), ("leaky_relu", [0.2]), ("hardtanh", [-1.0, 1.0])):
        torch.library.opcheck(ops.activation, (x, act, settings))
        torch.library.opcheck(ops.activation_backward, (x, side, act, settings))
    torch.library.opcheck(ops.prelu, (x, side, weight, 1.0))
    torch.library.opcheck(ops.prelu_weight_grad, (x, x, side, 4))
    torch.library.opcheck(ops.avg_pool2d, (x, [2, 2], [2, 2], [0, 0], False, True, None))
    torch.library.opcheck(ops.avg_pool2d_backward, (x, [3, 4, 12, 12], [2, 2], [2, 2], [0, 0], False, True, None))
    torch.library.opcheck(ops.adaptive_avg_pool2d, (x, [4, 4]))
    torch.library.opcheck(ops.adaptive_avg_pool2d_backward, (x, [3, 4, 12, 12], [6, 6]))
