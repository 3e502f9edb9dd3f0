"""group_norm_act, instance_norm_act and layer_norm_act against their definition, to the third derivative."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from needs import needs_cpp
from oracle import Errors, arange_like, two_orders

from fastgan import backend
from fastgan.ops import group_norm_act, instance_norm_act, layer_norm_act
from fastgan.ops._autograd import operators
from fastgan.ops.group_norm_act import _composed, reference

ACTS = ("none", "relu", "leaky_relu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Ragged tails in channels and planes, one-element planes, planes cut into pieces, few and many samples, more planes than are
# taken together; the group counts.
SHAPES = (
    ((4, 6, 5, 7), 3),
    ((2, 20, 8, 8), 20),
    ((64, 16, 1, 1), 2),
    ((2, 3, 130, 130), 1),
    ((3, 140, 9, 9), 2),
    ((9, 3, 33, 31), 3),
    ((70, 24, 6, 5), 6),
    ((9, 70, 3, 4), 70),
)
NORMS = ("channels", "elements")

RESULTS = [
    "y", "grad_x", "grad_weight", "grad_bias", "grad_residual",
    "g_x", "g_weight", "g_bias", "g_residual", "g_grad_y",
]  # fmt: skip


def inputs_of(shape, norm="channels", dtype=torch.float64, layout=torch.contiguous_format, residual=True):
    """[x, weight, bias, residual] of group norm ("channels") or [x, weight, bias, None] of layer norm ("elements"); rounded
    to dtype, so that an upcast copy is the same input."""
    x = (2 * torch.randn(shape, dtype=torch.float64) + 3).to(dtype).contiguous(memory_format=layout)
    size = shape[1:2] if norm == "channels" else shape[1:]
    weight, bias = (torch.randn(size, dtype=torch.float64).to(dtype) for _ in range(2))
    return [x, weight, bias, torch.randn_like(x) if residual and norm == "channels" else None]


def leaves(inputs, dtype=None):
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]


def ours(norm, groups, act="none"):
    def call(x, weight, bias, residual=None):
        settings = dict(eps=1e-3, act=act, negative_slope=0.2)
        if norm == "elements":
            return layer_norm_act(x, x.shape[1:], weight, bias, **settings)
        return group_norm_act(x, groups, weight, bias, residual=residual, **settings)

    return call


def stock(norm, groups, act="none"):
    def call(x, weight, bias, residual=None):
        groups_of = 1 if norm == "elements" else groups
        return reference(x, groups_of, weight, bias, 1e-3, act=act, negative_slope=0.2, residual=residual)

    return call


def assert_same(found, expected):
    """A gradient that is absent counts as zero."""
    if found is None:
        assert expected is None or not expected.any()
    else:
        torch.testing.assert_close(found, torch.zeros_like(found) if expected is None else expected)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_values_and_both_derivatives_are_as_exact_as_eager(shape, groups, norm, dtype, layout, poisoned):
    errors = Errors()
    for act, residual in itertools.product(ACTS, (False, True) if norm == "channels" else (False,)):
        inputs = inputs_of(shape, norm, dtype, LAYOUTS[layout], residual)
        # Eager torch overflows in float16 sums of gradients where it need not: there bfloat16 is the peer.
        peer = torch.bfloat16 if dtype == torch.float16 else dtype
        names = RESULTS if residual else [name for name in RESULTS if "residual" not in name]
        errors.add(
            names,
            two_orders(ours(norm, groups, act), leaves(inputs), dtype),
            two_orders(stock(norm, groups, act), leaves(inputs, peer), dtype),
            two_orders(stock(norm, groups, act), leaves(inputs, torch.float64), dtype),
        )
    errors.check()


@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 7), (2, 4, 2, 3, 4), (2, 4, 2, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_any_number_of_spatial_dimensions(shape, groups):
    for norm in NORMS:
        inputs = inputs_of(shape, norm)
        results = [two_orders(f(norm, groups, "relu"), leaves(inputs)) for f in (ours, stock)]
        for found, expected in zip(*results, strict=True):
            assert_same(found, expected)


@pytest.mark.parametrize("normalized_shape", [7, (7,), (5, 7), (4, 5, 7), (3, 4, 5, 7)], ids=str)
def test_layer_norm_over_any_of_the_last_axes(normalized_shape):
    x = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    size = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    weight, bias = torch.randn(2, *size, dtype=torch.float64)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(0, 1).reshape(x.shape)):
        functions = (
            lambda x, w, b: layer_norm_act(x, normalized_shape, w, b),
            lambda x, w, b: F.layer_norm(x, size, w, b),
        )
        results = [two_orders(f, leaves([given, weight, bias])) for f in functions]
        for found, expected in zip(*results, strict=True):
            assert_same(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("act", ACTS)
def test_gradcheck_and_gradgradcheck(act, groups, layout):
    inputs = leaves(inputs_of((3, 4, 3, 2), layout=LAYOUTS[layout]))
    assert torch.autograd.gradcheck(ours("channels", groups, act), inputs)
    assert torch.autograd.gradgradcheck(ours("channels", groups, act), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ACTS)
def test_gradcheck_and_gradgradcheck_of_layer_norm(act, layout):
    inputs = leaves(inputs_of((3, 4, 3, 2), "elements", layout=LAYOUTS[layout]))[:3]
    assert torch.autograd.gradcheck(ours("elements", 1, act), inputs)
    assert torch.autograd.gradgradcheck(ours("elements", 1, act), inputs)


@pytest.mark.parametrize("given", ["nothing", "weight", "bias"])
@pytest.mark.parametrize("norm", NORMS)
def test_gradgradcheck_without_some_of_the_parameters(norm, given):
    x, weight, bias, _ = leaves(inputs_of((3, 4, 3, 2), norm))
    parameters = {"nothing": (None, None), "weight": (weight, None), "bias": (None, bias)}[given]
    arguments = [x, *(p for p in parameters if p is not None)]

    def function(*arguments):
        rest = iter(arguments[1:])
        return ours(norm, 2, "leaky_relu")(arguments[0], *(None if p is None else next(rest) for p in parameters))

    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("norm", NORMS)
def test_the_definition_has_a_gradient_for_a_bias_without_weight(norm):
    """Stock torch runs on small tensors, and its group norm fails there."""
    x, _, bias, _ = leaves(inputs_of((3, 4, 3, 2), norm))
    results = [two_orders(f(norm, 2, "relu"), [x, None, bias]) for f in (ours, stock)]
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_definition_has_gradients_for_the_parameters_alone(layout):
    """Of a channels_last x torch 2.13 crashes there."""
    x = torch.randn(4, 8, 8, 8).contiguous(memory_format=layout)
    parameters = [torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)]
    grad_y = torch.randn(4, 8, 8, 8)
    for _ in range(20):
        y = reference(x, 4, *parameters)
        of_weight, of_bias = torch.autograd.grad(y, parameters, grad_y)
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(of_bias, grad_y.sum((0, 2, 3)))
    torch.testing.assert_close(of_weight, (grad_y * y.detach()).sum((0, 2, 3)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("affine", [True, False])
def test_the_third_derivative_agrees_with_differences_of_the_second(norm, affine):
    x, weight, bias, residual = leaves(inputs_of((3, 4, 3, 2), norm))
    given = [t for t in ([x, weight, bias, residual] if affine else [x, residual]) if t is not None]

    def second(x, *rest):
        rest = iter(rest)
        weight, bias = (next(rest), next(rest)) if affine else (None, None)
        y = ours(norm, 2, "leaky_relu")(x, weight, bias, next(rest, None)).pow(3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [x, weight] if affine else [x], create_graph=True)

    assert torch.autograd.gradcheck(second, given, eps=1e-6, atol=1e-4, rtol=1e-4)


def r1(critic, x, parameters):
    """The gradients that a zero-centred penalty gives the parameters."""
    (grad_x,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.autograd.grad(grad_x.pow(2).sum(), parameters, allow_unused=True)


@pytest.mark.parametrize("last", [True, False], ids=["last layer", "parameters after it"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_penalty_through_the_operator(norm, last):
    def gradients(function):
        torch.manual_seed(0)
        x, weight, bias, _ = leaves(inputs_of((4, 6, 6, 6), norm))
        head = torch.linspace(-1, 1, 36 * 6, dtype=torch.float64).requires_grad_()

        def critic(x):
            y = function(norm, 3, "leaky_relu")(x, weight, bias).pow(2)
            return y if last else (y.flatten(1) @ head).tanh()

        return r1(critic, x, (weight, bias) if last else (weight, bias, head))

    for found, expected in zip(gradients(ours), gradients(stock), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_bias_has_a_zero_second_gradient_not_none(norm):
    x, weight, bias, _ = leaves(inputs_of((4, 6, 6, 6), norm))
    grads = r1(lambda x: ours(norm, 3, "relu")(x, weight, bias), x, (weight, bias))
    assert grads[1] is not None and not grads[1].any()


@pytest.mark.parametrize("norm", NORMS)
def test_a_penalty_does_not_ask_for_the_parameters_gradients(norm, monkeypatch):
    """Which the first pass, the one to the input, throws away."""
    asked = []
    kernel = operators.group_norm_act_backward
    monkeypatch.setattr(operators, "group_norm_act_backward", lambda *args: asked.append(args[-3:]) or kernel(*args))
    x, weight, bias, _ = leaves(inputs_of((4, 6, 6, 6), norm))
    y = ours(norm, 3)(x * 1, weight * 1, bias * 1)
    torch.autograd.grad(y.sum(), x, create_graph=True)
    assert asked == [(True, False, False)]


@pytest.mark.parametrize(
    ("dtype", "norm"), [*((torch.float32, norm) for norm in NORMS), (torch.bfloat16, "channels")], ids=str
)
def test_opcheck(dtype, norm):
    x, weight, bias, residual = leaves(inputs_of((3, 6, 4, 4), norm, dtype))
    groups = 3 if norm == "channels" else 1
    settings = (1e-5, "leaky_relu", 0.2)
    ops = torch.ops.fastgan
    torch.library.opcheck(ops.group_norm_act, (x, weight, bias, residual, groups, *settings))
    mean, var = torch.zeros(3, groups), torch.ones(3, groups)
    grads = (torch.randn_like(x).requires_grad_(), x, weight, bias, residual, mean, var)
    torch.library.opcheck(ops.group_norm_act_backward, (*grads, *settings, True, True, residual is not None))
    torch.library.opcheck(
        ops.group_norm_act_double_backward, (torch.randn_like(x), None, None, None, *grads, *settings)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
@pytest.mark.parametrize("norm", NORMS)
def test_the_switching_point_belongs_to_the_negative_side(norm, act, layout):
    """x equal to its mean, in every vector lane and in the tail; a mean that stock norms find to rounding only."""
    x = torch.tensor([-1.0, 0.0, 1.0]).repeat(4 * 37).view(1, 4, 3, 37).contiguous(memory_format=LAYOUTS[layout])
    x.requires_grad_()
    weight = inputs_of(x.shape, norm)[1].float()
    groups = 4 if norm == "channels" else 1

    def gradient(function):
        y = function(x)
        return torch.autograd.grad(y, x, arange_like(y))[0]

    def expected(x):
        return _composed([x.double(), weight.double(), None, None], groups, 1e-3, act, 0.2)

    found = gradient(lambda x: ours(norm, groups, act)(x, weight, None))
    torch.testing.assert_close(found, gradient(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_huge_means_do_not_cancel(norm, layout):
    signs = torch.randint(0, 2, (8, 20, 30, 30)) * 2.0 - 1
    x = (1e4 + signs).contiguous(memory_format=LAYOUTS[layout])
    y = ours(norm, 20)(x, None, None)
    truth = stock(norm, 20)(x.double(), None, None)
    torch.testing.assert_close(y.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_of_channels_with_far_means(layout):
    x = (torch.randn(4, 8, 12, 12) + 1e3 * torch.arange(8).view(8, 1, 1)).contiguous(memory_format=LAYOUTS[layout])
    truth = reference(x.double(), 2)
    torch.testing.assert_close(group_norm_act(x, 2).double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", [(0, 0), (3, 11)], ids=["first", "inside"])
def test_one_outlier_does_not_spoil_the_variance(place, layout):
    x = torch.randn(8, 4, 16, 16).contiguous(memory_format=LAYOUTS[layout])
    x[0, :, place[0], place[1]] = 1e4
    truth = reference(x.double(), 4)
    torch.testing.assert_close(instance_norm_act(x).double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_zero_variance_gives_bias_and_finite_gradients(norm, layout):
    x, weight, bias, _ = (t if t is None else t.float() for t in inputs_of((4, 6, 5, 5), norm))
    x = torch.full_like(x, 7.1).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    y = ours(norm, 3)(x, weight, bias)
    torch.testing.assert_close(y, (bias if norm == "elements" else bias.view(6, 1, 1)).expand_as(y))
    grads = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    second = torch.autograd.grad(grads[0].pow(2).sum(), x)
    assert grads[0].isfinite().all() and second[0].isfinite().all()


def test_groups_of_one_element_give_bias_and_no_gradient():
    x, bias = torch.randn(5, 4, 1, 1, requires_grad=True), torch.randn(4)
    y = instance_norm_act(x, torch.ones(4), bias, residual=torch.ones(5, 4, 1, 1))
    torch.testing.assert_close(y, (bias + 1).view(4, 1, 1).expand_as(y))
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    assert not grad.any()
    assert torch.autograd.grad(grad.pow(2).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-42], ids=["nan", "inf", "denormal"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("norm", NORMS)
def test_special_values_go_where_eager_sends_them(norm, act, value):
    x = torch.randn(4, 6, 5, 5)
    x[1, 1, 2, 3] = value

    def results(function):
        leaf = x.clone().requires_grad_()
        y = function(norm, 3, act)(leaf, None, None)
        return y, torch.autograd.grad(y, leaf, torch.ones_like(y))[0]

    for found, expected in zip(results(ours), results(stock), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_the_output_keeps_the_layout(norm):
    x = torch.randn(2, 6, 4, 4)
    volume = torch.randn(2, 6, 3, 4, 4)
    formats = (x, x.contiguous(memory_format=torch.channels_last), volume)
    for given in (*formats, volume.contiguous(memory_format=torch.channels_last_3d)):
        for function in (ours, stock):
            assert function(norm, 2)(given, None, None).stride() == given.stride()


@pytest.mark.parametrize("norm", NORMS)
def test_any_strides_give_the_same_numbers(norm):
    base = torch.randn(8, 6, 5, 7)
    views = (
        base.transpose(2, 3),
        base[::2],
        base[:, :, 1:4, ::2],
        base[:, :1].expand(8, 6, 5, 7),
        base.permute(0, 2, 1, 3)[:, :4],
    )
    for view in views:
        torch.testing.assert_close(ours(norm, 2)(view, None, None), stock(norm, 2)(view, None, None))


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4)], ids=str)
def test_an_empty_tensor_gives_an_empty_result(shape):
    x = torch.randn(shape, requires_grad=True)
    for y in (group_norm_act(x, 2), instance_norm_act(x), layer_norm_act(x, shape[2:], act="relu")):
        assert y.shape == shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_parameters_of_another_dtype_than_x():
    x = torch.randn(4, 6, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    for norm, size in (("channels", (6,)), ("elements", (6, 5, 5))):
        weight, bias = (torch.randn(size, requires_grad=True) for _ in range(2))
        y = ours(norm, 3)(x, weight, bias)
        grads = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
        assert [y.dtype, *(g.dtype for g in grads)] == [torch.bfloat16] * 2 + [torch.float32] * 2
        exact = stock(norm, 3)(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend_name", ["auto", "reference"])
def test_parameters_in_float32_beside_an_x_in_float64(backend_name, use_backend):
    use_backend(backend_name)
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    for norm, size in (("channels", (6,)), ("elements", (6, 5, 5))):
        weight, bias = torch.randn(size), torch.randn(size)
        expected = stock(norm, 3)(x, weight.double(), bias.double())
        torch.testing.assert_close(ours(norm, 3)(x, weight, bias), expected)
        torch.testing.assert_close(ours(norm, 3)(x, weight, bias.double()), expected)


@needs_cpp
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(16, 24, 40, 40), (150, 24, 6, 6)], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(shape, norm, layout):
    inputs = inputs_of(shape, norm, torch.float32, LAYOUTS[layout])
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7, 40):
            torch.set_num_threads(n)
            results.append(two_orders(ours(norm, 6, "relu"), leaves(inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", NORMS)
def test_the_triton_kernels_serve_the_operator(norm, layout, use_backend):
    """Through the interpreter where there is no GPU."""
    use_backend("triton")
    inputs = leaves(inputs_of((2, 4, 2, 3), norm, layout=LAYOUTS[layout]))
    present = [t for t in inputs if t is not None]
    assert torch.autograd.gradcheck(ours(norm, 2, "leaky_relu"), present, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours(norm, 2, "leaky_relu"), present, fast_mode=True)


@pytest.mark.parametrize("norm", NORMS)
def test_compiled_whole(norm):
    def step(x, weight, bias):
        return ours(norm, 3, "leaky_relu")(x, weight, bias).square().mean()

    arguments = leaves(inputs_of((4, 6, 5, 5), norm, torch.float32))[:3]
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(*arguments)
        results.append([loss, *torch.autograd.grad(loss, arguments)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("act", ACTS)
def test_only_statistics_are_saved_beside_the_input_and_what_moves_the_activation(act):
    saved = []
    x, weight, bias, residual = leaves(inputs_of((4, 6, 5, 5), dtype=torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours("channels", 3, act)(x, weight, bias, residual)
    expected = [x] if act == "none" else [x, residual]
    assert [t.data_ptr() for t in saved if t.numel() > 12] == [t.data_ptr() for t in expected]


x4 = torch.randn(2, 6, 4, 4)
BAD = {
    "no tensor": (dict(x=[1.0]), TypeError, "x must be a tensor, not list"),
    "residual no tensor": (dict(residual=1.0), TypeError, "residual must be a tensor, not float"),
    "weight no tensor": (dict(weight=1.0), TypeError, "weight must be a tensor, not float"),
    "integers": (dict(x=torch.ones(2, 6, 4, 4, dtype=torch.int64)), TypeError, "x must be float32"),
    "one dimension": (dict(x=torch.randn(6)), ValueError, "x must have at least 2 dimensions"),
    "groups that do not divide": (
        dict(num_groups=4),
        ValueError,
        "num_groups must divide the 6 channels of x, not be 4",
    ),
    "no groups": (dict(num_groups=0), ValueError, "num_groups must be 1 or more, not 0"),
    "weight too long": (dict(weight=torch.ones(4)), ValueError, r"weight must have shape \(6,\)"),
    "weight of two dimensions": (dict(weight=torch.ones(6, 1)), ValueError, "weight must have shape"),
    "bias of another dtype": (dict(bias=torch.ones(6).double()), TypeError, "bias must be torch.float32"),
    "weight on another device": (dict(weight=torch.ones(6, device="meta")), ValueError, "weight is on meta"),
    "unknown act": (dict(act="gelu"), ValueError, "act must be one of none, relu, leaky_relu, not 'gelu'"),
    "negative eps": (dict(eps=-1.0), ValueError, "eps must not be negative"),
    "residual of another shape": (dict(residual=torch.randn(2, 6, 4, 5)), ValueError, "residual must have x's shape"),
    "residual of another dtype": (dict(residual=x4.double()), TypeError, "residual must be torch.float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    changes, error, message = BAD[case]
    arguments = dict(x=x4, num_groups=3) | changes
    with pytest.raises(error, match=message):
        group_norm_act(**arguments)
    if "num_groups" not in changes:
        del arguments["num_groups"]
        with pytest.raises(error, match=message):
            instance_norm_act(**arguments)


def test_instance_norm_names_an_x_without_channels():
    with pytest.raises(ValueError, match=r"x must have a channel, not shape \(2, 0, 4, 4\)"):
        instance_norm_act(torch.randn(2, 0, 4, 4))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "x must be a tensor, not list"),
        (dict(normalized_shape=5), ValueError, r"normalized_shape must be the last sizes of x, .*, not \(5,\)"),
        (dict(normalized_shape=()), ValueError, "normalized_shape must be the last sizes of x"),
        (dict(normalized_shape=(1, 2, 6, 4, 4)), ValueError, "normalized_shape must be the last sizes of x"),
        (dict(weight=torch.ones(4)), ValueError, r"weight must have shape \(4, 4\)"),
        (dict(bias=torch.ones(4, 4).double()), TypeError, "bias must be torch.float32"),
        (dict(act="gelu"), ValueError, "act must be one of"),
        (dict(eps=-1.0), ValueError, "eps must not be negative"),
    ],
)
def test_bad_input_of_layer_norm_names_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        layer_norm_act(**dict(x=x4, normalized_shape=(4, 4)) | changes)


@pytest.mark.parametrize("norm", NORMS)
def test_function_transforms_see_through_the_operator(norm):
    x, weight, bias, _ = inputs_of((4, 4, 2, 2), norm)

    def score(function, x):
        return function(norm, 2, "leaky_relu")(x, weight, bias).pow(2).sum()

    for transform in (torch.func.grad, torch.func.hessian, torch.func.vmap):
        found, expected = (transform(lambda x, f=f: score(f, x[None] if x.dim() < 4 else x))(x) for f in (ours, stock))
        torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.cos())
        tangents = [torch.autograd.forward_ad.unpack_dual(score(f, dual)).tangent for f in (ours, stock)]
    torch.testing.assert_close(*tangents)


@needs_cpp
def test_stock_torch_serves_small_tensors_unless_a_backend_is_named(monkeypatch):
    served = []
    kernel = operators.group_norm_act
    monkeypatch.setattr(operators, "group_norm_act", lambda *args: served.append(args[0].shape) or kernel(*args))
    small, large = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 1024, 1024)
    for automatic in (True, False):
        monkeypatch.setattr(backend, "is_automatic", lambda: automatic)  # noqa: B023
        for x in (small, large):
            instance_norm_act(x)
    assert served == [large.shape, small.shape, large.shape]
