"""gradient_reversal and reversed_linear: values of the identity and of a linear layer, gradients of their definitions."""

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from oracle import Errors, two_orders
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan import backend
from fastgan.ops import gradient_reversal, reversed_linear
from fastgan.ops.gradient_reversal import reference

COEFFS = {"number": 0.3, "zero": 0.0, "negative": -2, "tensor": torch.tensor(0.3), "integer tensor": torch.tensor(2)}


def definition(x, weight, bias, coeff):
    return F.linear(reference(x, coeff), weight, bias)


class Operators(TorchDispatchMode):
    """Notes the operators that run, each with the elements of its first argument."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        size = args[0].numel() if args and isinstance(args[0], torch.Tensor) else None
        self.noted.append((func.overloadpacket.__name__, size))
        return func(*args, **(kwargs or {}))

    def sizes(self, *names):
        return [size for name, size in self.noted if name in names]


@pytest.fixture
def tensors():
    """Of a linear layer in float64: x with two axes before the features, weight and bias."""
    shapes = (2, 3, 4), (5, 4), (5,)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


# ── gradient_reversal ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("coeff", COEFFS.values(), ids=COEFFS)
def test_values_are_those_of_x_and_both_derivatives_those_of_the_definition(coeff):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def curved(function):
        return lambda x: function(x.sin(), coeff).pow(3)

    torch.testing.assert_close(two_orders(curved(gradient_reversal), [x]), two_orders(curved(reference), [x]))


def test_the_third_derivative_is_the_definition_s():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    thirds = []
    for function in (gradient_reversal, reference):
        grad = function(x, 0.5).pow(4).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(grad.sum(), x, create_graph=True)
        thirds.append(grad)
    torch.testing.assert_close(*thirds)


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_every_dtype_and_shape_shares_its_memory_and_gets_a_gradient_of_its_own_dtype(dtype, shape):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    for coeff in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
        y = gradient_reversal(x, coeff)
        assert (y.data_ptr(), y.stride(), y.dtype) == (x.data_ptr(), x.stride(), dtype)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert grad.dtype == dtype and torch.equal(grad, torch.full_like(x, -0.5))


def test_the_strides_of_a_view_and_what_needs_no_gradient_pass_through():
    x = torch.randn(4, 6)[:, ::2].t()
    y = gradient_reversal(x)
    assert y.stride() == x.stride() and y.data_ptr() == x.data_ptr() and not y.requires_grad
    whole = torch.arange(3)
    assert gradient_reversal(whole).data_ptr() == whole.data_ptr()


def test_forward_computes_nothing_and_backward_is_one_multiplication():
    x, coeff = torch.randn(32, 32, requires_grad=True), torch.tensor(0.5)
    with Operators() as forward:
        y = gradient_reversal(x, coeff)
    assert {name for name, _ in forward.noted} <= {"view", "alias", "detach"}
    grad_y = torch.ones(32, 32)
    with Operators() as backward:
        torch.autograd.grad(y, x, grad_y)
    assert sorted(backward.noted) == [("mul", 1024), ("neg", 1)]


def test_no_gradient_reaches_coeff_and_a_change_of_it_before_backward_raises():
    x, coeff = torch.randn(3, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    (grad,) = torch.autograd.grad(gradient_reversal(x, coeff).square().sum(), x, create_graph=True)
    grad.sum().backward()
    assert coeff.grad is None
    schedule = torch.tensor(0.5)
    y = gradient_reversal(x, schedule)
    schedule.fill_(0.7)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_in_place_operation_on_the_output_raises_and_leaves_x(compiled):
    def overwrite(x):
        return gradient_reversal(x * 1.0).relu_()

    run = torch.compile(overwrite, fullgraph=True, backend="aot_eager") if compiled else overwrite
    with pytest.raises(RuntimeError):
        run(torch.randn(3, requires_grad=True))


def test_autocast_changes_nothing():
    x = torch.randn(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = gradient_reversal(x, torch.tensor(0.5))
    assert y.dtype == torch.float32 and y.data_ptr() == x.data_ptr()


def test_function_transforms_take_the_definition():
    x = torch.randn(4, 3)

    def squares(x):
        return gradient_reversal(x, 0.5).square().sum()

    torch.testing.assert_close(torch.func.grad(squares)(x), -x)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(squares))(x), -x)
    torch.testing.assert_close(torch.func.jvp(gradient_reversal, (x,), (torch.ones_like(x),))[1], -torch.ones_like(x))


def test_threads_do_not_disturb_each_other():
    found = {}

    def run(coeff):
        x = torch.zeros(1000, requires_grad=True)
        for _ in range(50):
            x.grad = None
            gradient_reversal(x, coeff).sum().backward()
        found[coeff] = x.grad.unique().tolist()

    threads = [threading.Thread(target=run, args=(coeff,)) for coeff in (0.5, 0.25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0.5: [-0.5], 0.25: [-0.25]}


# ── reversed_linear ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("coeff", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_linear_values_and_both_derivatives_are_as_exact_as_eager(dtype, coeff, poisoned):
    errors = Errors()
    for shape, outputs in (((64, 33), 17), ((2, 3, 33), 40), ((33,), 5)):
        x, weight, bias = (torch.randn(s, dtype=torch.float64).to(dtype) for s in (shape, (outputs, 33), (outputs,)))
        results = [
            two_orders(
                lambda x, w, b, f=f: f(x.tanh(), w, b, coeff).tanh(),
                [t.to(d).requires_grad_() for t in (x, weight, bias)],
                dtype,
            )
            for f, d in ((reversed_linear, dtype), (definition, dtype), (definition, torch.float64))
        ]
        names = ["y", *(f"{order}_{t}" for order in ("grad", "second") for t in ("x", "weight", "bias")), "g_grad_y"]
        errors.add(names, *results)
    errors.check()


@pytest.mark.parametrize("coeff", COEFFS.values(), ids=COEFFS)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_linear_derivatives_are_the_definition_s_to_the_third(tensors, coeff, with_bias):
    inputs = tensors if with_bias else (*tensors[:2], None)
    leaves = [t for t in inputs if t is not None]
    results = []
    for function in (reversed_linear, definition):
        y = function(*inputs, coeff).sin()
        result = [y]
        for _ in range(3):
            grads = torch.autograd.grad(y.sum(), leaves, create_graph=True)
            result += grads
            y = sum(g.square().sum() for g in grads)
        results.append(result)
    torch.testing.assert_close(*results)


def test_what_nobody_asks_for_is_not_computed(tensors):
    x, weight, bias = tensors
    products = {}
    for name, wanted in (("x", [x]), ("weight", [weight]), ("bias", [bias]), ("all", [x, weight, bias])):
        y = reversed_linear(x, weight, bias, 0.5)
        cotangent = torch.ones_like(y)
        with Operators() as operators:
            torch.autograd.grad(y, wanted, cotangent)
        products[name] = len(operators.sizes("mm", "addmm"))
    assert products == {"x": 1, "weight": 1, "bias": 0, "all": 2}


@pytest.mark.parametrize("sizes", [(64, 8, 4), (4, 8, 64)], ids=["few outputs", "few samples"])
def test_the_factor_costs_no_pass_over_the_gradient_of_x(sizes):
    samples, features, outputs = sizes
    x, weight = torch.randn(samples, features, requires_grad=True), torch.randn(outputs, features)
    for coeff, multiplied in ((0.5, []), (torch.tensor(0.5), [min(samples, features) * outputs])):
        y = reversed_linear(x, weight, None, coeff)
        with Operators() as operators:
            y.backward(torch.ones_like(y))
        assert operators.sizes("mul", "mul_", "div") == multiplied


def test_strides_and_empty_batches(tensors):
    _, weight, bias = tensors
    for x in (torch.randn(4, 6, dtype=torch.float64).t(), torch.randn(0, 4, dtype=torch.float64)):
        results = []
        for function in (reversed_linear, definition):
            given = x.clone().as_strided(x.shape, x.stride()).requires_grad_()
            y = function(given, weight.t().contiguous().t(), bias, 0.5)
            results.append([y, *torch.autograd.grad(y.square().sum(), (given, weight, bias))])
        torch.testing.assert_close(*results)


def test_autocast_casts_as_it_does_for_the_stock_layer():
    linear, results = torch.nn.Linear(6, 5), []
    x = torch.randn(7, 6)
    for function in (reversed_linear, definition):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = function(given, linear.weight, linear.bias, 0.5)
        assert y.dtype == torch.bfloat16
        grads = torch.autograd.grad(y.float().square().sum(), (given, linear.weight, linear.bias))
        assert all(grad.dtype == torch.float32 for grad in grads)
        results.append([y, *grads])
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("coeff", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_both_compile_as_one_graph_with_their_gradients(coeff):
    weight, bias = torch.randn(5, 4, requires_grad=True), torch.randn(5, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)
    for run in (lambda x: gradient_reversal(x, coeff), lambda x: reversed_linear(x, weight, bias, coeff)):
        results = []
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            y = function(x)
            grads = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y), materialize_grads=True)
            results.append([y, *grads])
        torch.testing.assert_close(*results)
        torch._dynamo.reset()


def test_small_x_is_left_to_the_two_functions_unless_a_backend_is_named(monkeypatch):
    weight = torch.randn(2, 8)
    for automatic, samples, fused in ((True, 4, False), (False, 4, True), (True, 1 << 15, True)):
        monkeypatch.setattr(backend, "is_automatic", lambda automatic=automatic: automatic)
        y = reversed_linear(torch.randn(samples, 8, requires_grad=True), weight)
        assert (type(y.grad_fn).__name__ == "_ReversedLinearBackward") == fused


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("function", [gradient_reversal, lambda x, c: reversed_linear(x, torch.ones(2, 3), None, c)])
def test_bad_input_is_named(function):
    x = torch.ones(4, 3)
    for coeff in (math.inf, -math.inf, math.nan):
        with pytest.raises(ValueError, match=f"coeff must be finite, not {coeff}"):
            function(x, coeff)
    with pytest.raises(ValueError, match=r"coeff must be a number or a 0-d tensor, not a tensor of shape \(1,\)"):
        function(x, torch.ones(1))
    with pytest.raises(TypeError, match="coeff must be a number or a 0-d tensor, not str"):
        function(x, "1")
    with pytest.raises(TypeError, match="x must be a tensor, not list"):
        function([1.0], 1.0)


def test_a_tensor_s_value_is_not_waited_for():
    gradient_reversal(torch.ones(2, device="meta"), torch.ones((), device="meta"))
    gradient_reversal(torch.ones(2), torch.tensor(math.nan))


def test_linear_names_the_argument_that_does_not_fit():
    with pytest.raises(ValueError, match=r"weight must have shape \(out, in\) for x of shape \(2, 3\), not \(4, 5\)"):
        reversed_linear(torch.ones(2, 3), torch.ones(4, 5))
    with pytest.raises(TypeError, match=r"weight must be torch\.float32 like x, not torch\.float64"):
        reversed_linear(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x must be float32, .*, not torch\.complex64"):
        reversed_linear(torch.ones(2, 3, dtype=torch.complex64), torch.ones(4, 3, dtype=torch.complex64))
