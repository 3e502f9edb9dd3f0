"""bias_act against its definition, to the third derivative."""

import math

import pytest
import torch
import torch.nn.functional as F
from needs import needs_cpp
from oracle import Errors, two_orders

from fastgan import backend
from fastgan.ops import bias_act
from fastgan.ops._autograd import operators
from fastgan.ops.bias_act import reference

ACTS = {
    "linear": 1, "relu": math.sqrt(2), "lrelu": math.sqrt(2), "tanh": 1, "sigmoid": 1, "elu": 1, "selu": 1,
    "softplus": 1, "swish": math.sqrt(2),
}  # fmt: skip
PIECEWISE_LINEAR = ("linear", "relu", "lrelu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Ragged tails in channels and planes, one-element planes, several blocks, a plane cut into pieces, few and many channels.
SHAPES = ((4, 3, 5, 7), (2, 19, 8, 8), (64, 16, 1, 1), (2, 3, 130, 130), (9, 1, 33, 31), (1, 130, 20, 21), (50, 70))
RESULTS = ["y", "grad_x", "grad_b", "g_x", "g_b", "g_grad_y"]

all_acts = pytest.mark.parametrize("act", ACTS)


def inputs_of(shape, dtype=torch.float64, layout="nchw", dim=1):
    """[x, b], rounded to dtype, so that an upcast copy is the same input; x on both sides of every switch."""
    x = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    if layout == "channels_last" and x.dim() > 3:
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return [x, torch.randn(shape[dim], dtype=torch.float64).to(dtype)]


def leaves(inputs, dtype=None):
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]


def away_from_the_limit(inputs, act, clamp):
    """The inputs, but where rounding would decide whether the clamp has a gradient."""
    x, b = inputs
    if clamp is None:
        return inputs
    shape = [1, -1, *[1] * (x.dim() - 2)]
    y = reference(x.double(), b.double(), act=act)
    return [torch.where((y.abs() - clamp).abs() < 8 * torch.finfo(x.dtype).eps, -b.view(shape), x), b]


def with_settings(function, **settings):
    return lambda x, b: function(x, b, **settings)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@all_acts
def test_values_and_both_derivatives_are_as_exact_as_eager(act, dtype, layout, poisoned):
    errors = Errors()
    for shape in SHAPES:
        for clamp in (None, 0.8):
            inputs = away_from_the_limit(inputs_of(shape, dtype, layout), act, clamp)
            ours, stock = (with_settings(f, act=act, clamp=clamp) for f in (bias_act, reference))
            # Eager torch overflows in float16 sums of gradients where it need not: there bfloat16 is the peer.
            peer = torch.bfloat16 if dtype == torch.float16 else dtype
            errors.add(
                RESULTS,
                two_orders(ours, leaves(inputs), dtype),
                two_orders(stock, leaves(inputs, peer), dtype),
                two_orders(stock, leaves(inputs, torch.float64), dtype),
            )
    errors.check()


@all_acts
def test_the_definition_of_stylegan(act):
    """Bias, activation, gain, clamp, in this order, with each activation's own gain."""
    x, b = inputs_of((4, 3, 5, 7))
    activations = {"linear": lambda t: t, "lrelu": lambda t: F.leaky_relu(t, 0.2), "swish": lambda t: t * t.sigmoid()}
    activation = activations.get(act) or getattr(F, act)
    expected = activation(x + b.view(1, 3, 1, 1)) * ACTS[act]
    torch.testing.assert_close(bias_act(x, b, act=act), expected)
    torch.testing.assert_close(
        bias_act(x, b, act=act, gain=0.7, clamp=0.5), (expected / ACTS[act] * 0.7).clamp(-0.5, 0.5)
    )


def test_alpha_is_the_slope_of_lrelu():
    x = torch.tensor([-2.0, 2.0])
    assert bias_act(x, act="lrelu", alpha=0.5, gain=1).tolist() == [-1.0, 2.0]
    assert bias_act(x, act="lrelu", alpha=0.0, gain=1).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("shape", "dim", "layout"),
    [
        ((6,), 0, "nchw"),
        ((6, 5), 0, "nchw"),
        ((3, 4, 7), 2, "nchw"),
        ((3, 4, 5, 6), 0, "channels_last"),
        ((3, 4, 5, 6), 2, "channels_last"),
        ((3, 4, 5, 6), 3, "channels_last"),
        ((2, 3, 2, 3, 4), 1, "channels_last"),
        ((2, 3, 2, 3, 4, 5), 3, "nchw"),
    ],
    ids=str,
)
@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_the_bias_lies_along_any_axis(shape, dim, layout, act):
    inputs = inputs_of(shape, layout=layout, dim=dim)
    ours, stock = (two_orders(with_settings(f, act=act, dim=dim), leaves(inputs)) for f in (bias_act, reference))
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("clamp", [None, 1.1])
@all_acts
def test_gradcheck_and_gradgradcheck(act, clamp, layout):
    inputs = leaves(inputs_of((3, 4, 3, 2), layout=layout))
    function = with_settings(bias_act, act=act, clamp=clamp)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(lambda x: function(x, None), inputs[:1])


@all_acts
def test_the_third_derivative_agrees_with_differences_of_the_second(act):
    given = leaves(inputs_of((3, 4, 3, 2)))

    def second(x, b):
        y = bias_act(x, b, act=act, clamp=3.1).pow(3).sum()
        first = torch.autograd.grad(y, (x, b), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, b), create_graph=True)

    assert torch.autograd.gradcheck(second, given, eps=1e-6, atol=1e-4, rtol=1e-4)


def r1(critic, x, parameters):
    """The gradients that a zero-centred penalty gives the parameters."""
    (grad_x,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.autograd.grad(grad_x.pow(2).sum(), parameters, allow_unused=True)


@pytest.mark.parametrize("last", [True, False], ids=["last layer", "parameters after it"])
@all_acts
def test_a_gradient_penalty_through_the_operator(act, last):
    def gradients(function):
        torch.manual_seed(0)
        x, b = leaves(inputs_of((4, 3, 6, 6)))
        weight = torch.randn(3, 3, 1, 1, dtype=torch.float64, requires_grad=True)
        head = torch.linspace(-1, 1, 36 * 3, dtype=torch.float64).requires_grad_()

        def critic(x):
            y = function(F.conv2d(x, weight), b, act=act)
            return y if last else (y.pow(2).flatten(1) @ head).tanh()

        return r1(critic, x, (weight, b) if last else (weight, b, head))

    for ours, stock in zip(gradients(bias_act), gradients(reference), strict=True):
        assert (ours is None) == (stock is None)
        if stock is not None:
            torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("act", ["relu", "lrelu"])
def test_all_that_the_side_depends_on_gets_zeros_as_from_stock(act):
    def gradients(function):
        torch.manual_seed(0)
        x, b = leaves(inputs_of((4, 3, 6, 6)))
        offset, slant = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        return r1(lambda x: function(x + offset.view(-1, 1, 1), b * slant, act=act), x, (offset, b, slant))

    for ours, stock in zip(gradients(bias_act), gradients(reference), strict=True):
        assert torch.equal(ours, stock) and not ours.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
def test_opcheck(act, dtype):
    x, b = leaves(inputs_of((3, 5, 4, 4), dtype))
    settings = (1, act, 0.2, 1.5, 0.9)
    smooth = act == "swish"
    ops = torch.ops.fastgan
    torch.library.opcheck(ops.bias_act, (x, b, *settings))
    sides = (x, b) if smooth else (x.detach(), None)
    grad_y, ggb = torch.randn_like(x).requires_grad_(), torch.randn(5)
    torch.library.opcheck(ops.bias_act_backward, (grad_y, *sides, *settings, True, True))
    torch.library.opcheck(
        ops.bias_act_double_backward, (torch.randn_like(x), ggb, grad_y, *sides, *settings, smooth, smooth)
    )


def everything(function, x, **settings):
    """y, and what one is multiplied by in both derivatives."""
    x = x.clone().requires_grad_()
    y = function(x, **settings)
    (first,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    second = torch.autograd.grad(first, x, torch.ones_like(y), allow_unused=True)[0] if first.requires_grad else None
    return y, first, torch.zeros_like(x) if second is None else second


@all_acts
def test_the_switching_points_are_on_torch_s_side(act):
    """In every vector lane, and in the tail."""
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, 20.0, 21.0]).repeat(37)
    for ours, stock in zip(everything(bias_act, x, act=act), everything(reference, x, act=act), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("act", PIECEWISE_LINEAR)
def test_the_limit_of_the_clamp_has_no_gradient(act):
    x = torch.tensor([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]).repeat(7)
    settings = dict(act=act, gain=1, alpha=1.0, clamp=1)
    y, first, _ = everything(bias_act, x, **settings)
    assert torch.equal(y, reference(x, **settings))
    assert torch.equal(first, torch.where((y.abs() < 1) & ((x > 0) | (act != "relu")), 1.0, 0.0))
    assert torch.equal(first, everything(reference, x, **settings)[1])


def test_a_clamp_of_zero_leaves_nothing():
    y, first, _ = everything(bias_act, torch.randn(50), act="lrelu", clamp=0)
    assert not y.any() and not first.any()


@pytest.mark.instruction_sets
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-42, 1e30, -1e30], ids=str)
@all_acts
def test_special_values_go_where_eager_sends_them(act, value):
    x = torch.randn(37)
    x[[3, 36]] = value
    results = list(zip(everything(bias_act, x, act=act), everything(reference, x, act=act), strict=True))
    # The gradient that stock torch gives elu at nan depends on where it lies in memory.
    for ours, stock in results[: 1 if act in ("elu", "selu") and math.isnan(value) else 3]:
        torch.testing.assert_close(ours, stock, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clamp", [0.8, 256, 1e-6, 1 / 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_reaches_the_limit_has_no_gradient_however_the_limit_is_rounded(dtype, clamp):
    x = torch.tensor([-5e3, -1e-7, 5e3], dtype=dtype).repeat(13)
    y, first, _ = everything(bias_act, x, act="lrelu", clamp=clamp)
    assert (y.abs()[[0, 2]] == torch.tensor(clamp, dtype=dtype)).all()
    assert torch.equal(first != 0, everything(reference, x, act="lrelu", clamp=clamp)[1] != 0)


@all_acts
def test_a_clamp_keeps_nan_and_stops_the_gradients_of_nan_and_infinity(act):
    """Of which stock torch passes some and stops others, by where they lie in memory."""
    x = torch.randn(37)
    x[[3, 36]], x[[4, 35]] = math.nan, math.inf
    y, first, second = everything(bias_act, x, act=act, clamp=0.5)
    assert y.isnan().nonzero().flatten().tolist() == [3, 36]
    assert y[[4, 35]].tolist() == [0.5, 0.5]
    for derivative in (first, second):
        assert derivative.isfinite().all() and not derivative[[3, 4, 35, 36]].any()


def test_an_overflowing_half_still_has_its_gradient():
    x = torch.full((40,), 60000.0, dtype=torch.float16)
    y, first, _ = everything(bias_act, x, act="relu")
    assert y.isinf().all() and (first == torch.tensor(2.0).sqrt().half()).all()


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_the_output_keeps_the_layout(act):
    x = torch.randn(2, 6, 4, 4)
    for given in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(2, 6, 3, 4, 4)):
        given = given.requires_grad_()
        y = bias_act(given, torch.randn(6), act=act)
        (grad,) = torch.autograd.grad(y, given, torch.ones(()).expand_as(y))
        assert y.stride() == grad.stride() == given.stride()


def test_any_strides_give_the_same_numbers():
    base, b = torch.randn(8, 6, 5, 7), torch.randn(12)[::2]
    views = (base.transpose(2, 3), base[::2], base[:, :, 1:4, ::2], base[:, :1].expand(8, 6, 5, 7))
    for view in views:
        torch.testing.assert_close(bias_act(view, b, act="tanh"), reference(view, b, act="tanh"))
    given = leaves([base, b])
    y = bias_act(*given, act="swish")
    weights = torch.randn(8, 5, 7, 6).permute(0, 3, 1, 2)
    torch.testing.assert_close(
        torch.autograd.grad(y, given, weights), torch.autograd.grad(reference(*given, act="swish"), given, weights)
    )


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_a_float32_bias_serves_half_precision(act):
    x, b = inputs_of((4, 3, 5, 7), torch.bfloat16)
    given, wide = leaves([x, b.float()]), leaves([x, b])
    y, expected = bias_act(*given, act=act), bias_act(*wide, act=act)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    grads, wide_grads = (torch.autograd.grad(t.float().square().sum(), i) for t, i in ((y, given), (expected, wide)))
    assert grads[1].dtype == torch.float32 and torch.equal(grads[0], wide_grads[0])
    torch.testing.assert_close(grads[1].bfloat16(), wide_grads[1])


def test_an_empty_batch_gives_an_empty_result():
    x, b = leaves([torch.randn(0, 3, 4, 4), torch.randn(3)])
    y = bias_act(x, b, act="lrelu")
    assert y.shape == x.shape
    assert not torch.autograd.grad(y.sum(), b)[0].any()


@pytest.mark.parametrize("settings", [dict(gain=0), dict(gain=-1.5), dict(act="lrelu", alpha=-0.5)], ids=str)
def test_settings_under_which_y_does_not_tell_the_side(settings):
    inputs = inputs_of((4, 3, 5, 7))
    ours, stock = (
        two_orders(with_settings(f, **{"act": "relu"} | settings), leaves(inputs)) for f in (bias_act, reference)
    )
    torch.testing.assert_close(ours, stock)


@needs_cpp
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_the_number_of_threads(layout):
    inputs = inputs_of((16, 24, 40, 40), torch.float32, layout)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(two_orders(with_settings(bias_act, act="swish"), leaves(inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("act", ["lrelu", "swish"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_triton_kernels_serve_the_operator(layout, act, use_backend):
    """Through the interpreter where there is no GPU."""
    use_backend("triton")
    inputs = leaves(inputs_of((2, 3, 2, 3), layout=layout))
    function = with_settings(bias_act, act=act, clamp=2.0)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_compiled_whole(act):
    def step(x, b):
        return bias_act(x, b, act=act, clamp=1.5).square().mean()

    given = leaves(inputs_of((4, 6, 5, 5), torch.float32))
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(*given)
        results.append([loss, *torch.autograd.grad(loss, given)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("act", ACTS)
def test_what_is_saved(act):
    """y of the activations whose side it tells, which the next layer saves as well, x of the others, nothing of linear."""
    saved = []
    given = leaves(inputs_of((4, 6, 5, 5), torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = bias_act(*given, act=act)
    expected = {"linear": []}.get(act, [y] if act in PIECEWISE_LINEAR else given)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in expected]


def test_no_gradient_is_computed_that_nobody_uses(monkeypatch):
    asked = []
    kernel = operators.bias_act_backward
    monkeypatch.setattr(
        operators, "bias_act_backward", lambda *args: asked.append(args[-2:]) or kernel(*args)
    )  # fmt: skip
    x, b = (t * 1 for t in leaves(inputs_of((4, 3, 5, 5))))
    y = bias_act(x, b, act="swish").sum()
    for targets in (x, b, (x, b)):
        torch.autograd.grad(y, targets, retain_graph=True)
    assert asked == [(True, False), (False, True), (True, True)]


def test_a_linear_bias_passes_its_gradient_on():
    x, b = leaves(inputs_of((4, 3, 5, 5)))
    grad_y = torch.randn_like(x)
    assert torch.autograd.grad(bias_act(x, b), x, grad_y)[0].data_ptr() == grad_y.data_ptr()


x4 = torch.randn(2, 3, 4, 4)
BAD = {
    "no tensor": (dict(x=[1.0]), TypeError, "x must be a tensor, not list"),
    "integers": (dict(x=torch.ones(2, 3, 4, 4, dtype=torch.int64)), TypeError, "x must be float32"),
    "b no tensor": (dict(b=1.0), TypeError, "b must be a tensor, not float"),
    "b too long": (dict(b=torch.ones(4)), ValueError, r"b must have shape \(3,\), one for each index of axis 1"),
    "b of two dimensions": (dict(b=torch.ones(3, 1)), ValueError, "b must have shape"),
    "b of another dtype": (dict(b=torch.ones(3).double()), TypeError, "b must be torch.float32"),
    "b on another device": (dict(b=torch.ones(3, device="meta")), ValueError, "b is on meta"),
    "no such axis": (dict(dim=4), ValueError, "dim must be an axis of x from 0 to 3, not 4"),
    "an axis from the end": (dict(dim=-3), ValueError, "dim must be 0 or more, not -3"),
    "unknown act": (dict(act="gelu"), ValueError, "act must be one of linear, relu, .*, swish, not 'gelu'"),
    "act in a list": (dict(act=["relu"]), ValueError, r"act must be one of .*, not \['relu'\]"),
    "negative clamp": (dict(clamp=-1.0), ValueError, "clamp must not be negative, not -1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        bias_act(**(dict(x=x4, b=torch.ones(3)) | changes))


def test_function_transforms_see_through_the_operator():
    x, b = inputs_of((4, 3, 2, 2))

    def score(function, x):
        return function(x, b, act="swish").pow(2).sum()

    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),)), torch.func.hessian):
        ours, stock = (transform(lambda x, f=f: score(f, x))(x) for f in (bias_act, reference))
        torch.testing.assert_close(ours, stock)


@needs_cpp
def test_stock_torch_serves_small_tensors_unless_a_backend_is_named(monkeypatch):
    served = []
    kernel = operators.bias_act
    monkeypatch.setattr(operators, "bias_act", lambda *args: served.append(args[0].shape) or kernel(*args))
    small, large = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 1024, 1024)
    for automatic in (True, False):
        monkeypatch.setattr(backend, "is_automatic", lambda: automatic)  # noqa: B023
        for x in (small, large):
            bias_act(x, act="lrelu")
    assert served == [large.shape, small.shape, large.shape]
