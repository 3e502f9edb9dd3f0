"""pixel_shuffle_act against its definition, to the third derivative."""

import math

import pytest
import torch
import torch.nn.functional as F
from needs import needs_cpp
from oracle import Errors, two_orders

from fastgan import backend
from fastgan.ops import pixel_shuffle_act
from fastgan.ops._autograd import operators
from fastgan.ops.pixel_shuffle_act import reference

ACTS = ("none", "relu", "leaky_relu", "prelu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Of y's channels and x's pixels, with r: ragged tails and whole vectors of both, fewer of them than a vector has, one of
# each, several blocks, lines and channels that are cut.
SHAPES = (
    (2, 3, 5, 7, 2), (2, 19, 4, 8, 2), (1, 16, 3, 33, 2), (3, 1, 9, 5, 2), (2, 5, 1, 3, 2), (2, 64, 20, 24, 2),
    (2, 3, 5, 7, 3), (1, 18, 6, 17, 3), (2, 9, 3, 10, 4), (1, 40, 40, 41, 1), (1, 2, 3, 2, 5),
)  # fmt: skip
RESULTS = ["y", "grad_x", "grad_weight", "g_x", "g_weight", "g_grad_y"]

all_acts = pytest.mark.parametrize("act", ACTS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def inputs_of(shape, dtype=torch.float64, layout="nchw", weights=None):
    """[x, weight] and r, rounded to dtype, so that an upcast copy is the same input."""
    n, channels, height, width, r = shape
    x = torch.randn(n, channels * r * r, height, width, dtype=torch.float64).to(dtype)
    weight = torch.linspace(-0.5, 1.5, weights or channels, dtype=torch.float64).to(dtype)
    return [x.contiguous(memory_format=LAYOUTS[layout]), weight], r


def leaves(inputs, dtype=None):
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]


def with_settings(function, r, act, negative_slope=0.2):
    """Of (x, weight) with "prelu", else of (x)."""
    if act == "prelu":
        return lambda x, weight: function(x, r, act, weight)
    return lambda x: function(x, r, act, negative_slope=negative_slope)


def arguments_of(inputs, act):
    return inputs if act == "prelu" else inputs[:1]


@pytest.mark.instruction_sets
@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@all_acts
def test_values_and_both_derivatives_are_as_exact_as_eager(act, dtype, layout, poisoned):
    errors = Errors()
    for shape in SHAPES:
        for weights in (None, 1) if act == "prelu" else (None,):
            inputs, r = inputs_of(shape, dtype, layout, weights)
            inputs = arguments_of(inputs, act)
            ours, stock = (with_settings(f, r, act) for f in (pixel_shuffle_act, reference))
            # Eager torch overflows in float16 sums of gradients where it need not: there bfloat16 is the peer.
            peer = torch.bfloat16 if dtype == torch.float16 else dtype
            errors.add(
                RESULTS if act == "prelu" else ["y", "grad_x", "g_x", "g_grad_y"],
                two_orders(ours, leaves(inputs), dtype),
                two_orders(stock, leaves(inputs, peer), dtype),
                two_orders(stock, leaves(inputs, torch.float64), dtype),
            )
    errors.check()


@pytest.mark.instruction_sets
@layouts
@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_the_definition_of_espcn(r, layout):
    (x, weight), _ = inputs_of((2, 10, 3, 9, r), layout=layout)
    y = pixel_shuffle_act(x, r, "prelu", weight)
    expected = torch.empty(2, 10, 3 * r, 9 * r, dtype=x.dtype)
    for i in range(r):
        for j in range(r):
            part = x[:, i * r + j :: r * r]
            expected[:, :, i::r, j::r] = torch.where(part > 0, part, weight.view(-1, 1, 1) * part)
    torch.testing.assert_close(y, expected)
    assert torch.equal(pixel_shuffle_act(x, r, "none"), F.pixel_shuffle(x, r))


@layouts
@pytest.mark.parametrize("r", [2, 3])
@pytest.mark.parametrize("weights", [1, 3])
def test_gradcheck_and_gradgradcheck_of_prelu(weights, r, layout):
    inputs, _ = inputs_of((2, 3, 3, 2, r), layout=layout, weights=weights)
    function = with_settings(pixel_shuffle_act, r, "prelu")
    assert torch.autograd.gradcheck(function, leaves(inputs))
    assert torch.autograd.gradgradcheck(function, leaves(inputs))


@layouts
@pytest.mark.parametrize(("act", "slope"), [("none", 0.0), ("relu", 0.0), ("leaky_relu", 0.2), ("leaky_relu", -0.3)])
def test_gradcheck_and_gradgradcheck_of_the_others(act, slope, layout):
    inputs, r = inputs_of((2, 3, 3, 2, 2), layout=layout)
    function = with_settings(pixel_shuffle_act, r, act, slope)
    assert torch.autograd.gradcheck(function, leaves(inputs[:1]))
    assert torch.autograd.gradgradcheck(function, leaves(inputs[:1]))


@all_acts
def test_the_third_derivative_agrees_with_differences_of_the_second(act):
    inputs, r = inputs_of((2, 3, 3, 2, 2))
    given = leaves(arguments_of(inputs, act))

    def second(*given):
        y = with_settings(pixel_shuffle_act, r, act)(*given).pow(3).sum()
        first = torch.autograd.grad(y, given, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), given, create_graph=True)

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
        x, kernel, *slopes = leaves([
            torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.randn(8, 3, 1, 1, dtype=torch.float64),
            *([torch.tensor([0.3, -0.4], dtype=torch.float64)] if act == "prelu" else []),
        ])  # fmt: skip
        head = torch.linspace(-1, 1, 2 * 144, dtype=torch.float64).requires_grad_()

        def critic(x):
            y = with_settings(function, 2, act)(F.conv2d(x, kernel), *slopes)
            return y if last else (y.pow(2).flatten(1) @ head).tanh()

        return r1(critic, x, (kernel, *slopes) if last else (kernel, *slopes, head))

    for ours, stock in zip(gradients(pixel_shuffle_act), gradients(reference), strict=True):
        assert (ours is None) == (stock is None)
        if stock is not None:
            torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "prelu"])
def test_all_that_the_side_depends_on_gets_zeros_as_from_stock(act):
    def gradients(function):
        torch.manual_seed(0)
        inputs, r = inputs_of((4, 3, 6, 6, 2))
        x, *slopes = leaves(arguments_of(inputs, act))
        offset = torch.randn(12, dtype=torch.float64, requires_grad=True)
        return r1(lambda x: with_settings(function, r, act)(x + offset.view(-1, 1, 1), *slopes), x, (offset,))

    for ours, stock in zip(gradients(pixel_shuffle_act), gradients(reference), strict=True):
        assert torch.equal(ours, stock) and not ours.any()


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@all_acts
def test_opcheck(act, dtype, layout):
    ops = torch.ops.fastgan
    inputs, r = inputs_of((3, 5, 4, 4, 2), dtype, layout)
    x, weight = leaves(inputs)
    weight = weight if act == "prelu" else None
    settings = (r, act, 0.2, True, layout == "channels_last")
    torch.library.opcheck(ops.pixel_shuffle_act, (x, None, weight, *settings))
    grad_y = torch.randn(3, 5, 8, 8, dtype=dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    side = None if act == "none" else grad_y.detach().cos() if act == "relu" else x.detach()
    torch.library.opcheck(ops.pixel_shuffle_act, (x, side, weight, *settings))
    needs_weight = act == "prelu"
    torch.library.opcheck(
        ops.pixel_shuffle_act_backward,
        (grad_y, x if needs_weight else None, side, weight, *settings, True, needs_weight),
    )


def everything(function, x, r, act, weight):
    """y, what one is multiplied by in the first derivative, and the gradient of weight."""
    given = leaves([x, weight] if act == "prelu" else [x])
    y = with_settings(function, r, act)(*given)
    return y, *torch.autograd.grad(y, given, torch.ones_like(y))


@layouts
@all_acts
def test_the_switching_point_is_on_torch_s_side(act, layout):
    """In every vector lane, and in the tail."""
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, 2.0]).repeat(4 * 9 * 7 * 4).view(2, 72, 5, 7)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    for r in (2, 3):
        weight = torch.linspace(0.1, 0.9, 72 // r**2)
        results = zip(
            everything(pixel_shuffle_act, x, r, act, weight), everything(reference, x, r, act, weight), strict=True
        )
        for ours, stock in results:
            torch.testing.assert_close(ours, stock, rtol=1e-6, atol=1e-6)


@layouts
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-42, 1e30, -1e30], ids=str)
@all_acts
def test_special_values_go_where_eager_sends_them(act, value, layout):
    x = torch.randn(2, 36, 3, 11)
    x[0, 5, 1, 3] = x[1, 35, 2, 10] = value
    x = x.contiguous(memory_format=LAYOUTS[layout])
    for r in (2, 3):
        weight = torch.linspace(0.1, 0.9, 36 // r**2)
        results = zip(
            everything(pixel_shuffle_act, x, r, act, weight), everything(reference, x, r, act, weight), strict=True
        )
        for ours, stock in results:
            torch.testing.assert_close(ours, stock, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("act", ["relu", "prelu"])
def test_infinite_gradients_go_where_eager_sends_them(act):
    x, weight = torch.randn(1, 16, 3, 9), torch.linspace(0.1, 0.9, 4)
    grad_y = torch.randn(1, 4, 6, 18)
    grad_y[..., 1:3, 3:5] = math.inf
    results = []
    for function in (pixel_shuffle_act, reference):
        given = leaves([x, weight] if act == "prelu" else [x])
        results.append(torch.autograd.grad(with_settings(function, 2, act)(*given), given, grad_y))
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("r", [2, 3])
def test_the_output_keeps_the_layout_that_stock_keeps(r):
    for shape in ((2, 6, 4, 5), (2, 1, 4, 4), (2, 3, 1, 1), (2, 3, 1, 5), (1, 2, 5, 1)):
        (x, _), _ = inputs_of((*shape, r), torch.float32)
        for given in (x, x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], 3)[..., ::2]):
            given = given.requires_grad_()
            y, stock = (f(given, r, "none") for f in (pixel_shuffle_act, reference))
            (grad,) = torch.autograd.grad(y, given, torch.ones(()).expand_as(y))
            for layout in LAYOUTS.values():
                assert y.is_contiguous(memory_format=layout) == stock.is_contiguous(memory_format=layout)
                assert grad.is_contiguous(memory_format=layout) or not given.is_contiguous(memory_format=layout)


def test_any_strides_give_the_same_numbers():
    base, weight = torch.randn(8, 24, 5, 7), torch.randn(12)[::2]
    views = (base.transpose(2, 3), base[::2], base[:, :, 1:4, ::2], base[:, :1].expand(8, 24, 5, 7))
    for view in views:
        torch.testing.assert_close(
            pixel_shuffle_act(view, 2, "prelu", weight), reference(view, 2, "prelu", weight)
        )  # fmt: skip
    given = leaves([base, weight])
    cotangent = torch.randn(8, 10, 14, 6).permute(0, 3, 1, 2)
    results = [
        torch.autograd.grad(f(*given[:1], 2, "prelu", given[1]), given, cotangent)
        for f in (pixel_shuffle_act, reference)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("weights", [1, 6])
def test_a_float32_weight_serves_half_precision(weights):
    (x, weight), r = inputs_of((2, 6, 5, 7, 2), torch.bfloat16, weights=weights)
    given, narrow = leaves([x, weight.float()]), leaves([x, weight])
    y, expected = (pixel_shuffle_act(i[0], r, "prelu", i[1]) for i in (given, narrow))
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    grads, narrow_grads = (
        torch.autograd.grad(t.float().square().sum(), i) for t, i in ((y, given), (expected, narrow))
    )
    assert grads[1].dtype == torch.float32 and torch.equal(grads[0], narrow_grads[0])
    torch.testing.assert_close(grads[1].bfloat16(), narrow_grads[1])


@all_acts
def test_autocast_runs_it_in_stock_s_dtype(act):
    (x, weight), r = inputs_of((2, 6, 5, 7, 2), torch.float32)
    given = leaves(arguments_of([x, weight], act))
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_settings(pixel_shuffle_act, r, act)(*given)
        y = F.pixel_shuffle(x, r)
        stock = {"prelu": lambda: F.prelu(y, weight), "relu": lambda: F.relu(y), "none": lambda: y}.get(
            act, lambda: F.leaky_relu(y, 0.2)
        )()
    assert ours.dtype == stock.dtype
    torch.testing.assert_close(ours, stock)
    assert [g.dtype for g in torch.autograd.grad(ours.float().sum(), given)] == [torch.float32] * len(given)


@all_acts
def test_an_empty_batch_gives_an_empty_result(act):
    inputs, r = inputs_of((0, 3, 4, 4, 2))
    given = leaves(arguments_of(inputs, act))
    y = with_settings(pixel_shuffle_act, r, act)(*given)
    assert y.shape == (0, 3, 8, 8)
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), given))


@all_acts
def test_an_image_without_a_batch(act):
    inputs, r = inputs_of((1, 3, 4, 5, 2))
    (x, *slopes) = leaves(arguments_of(inputs, act))
    y, expected = (with_settings(f, r, act)(*i, *slopes) for f, i in ((pixel_shuffle_act, [x[0]]), (reference, [x])))
    torch.testing.assert_close(y, expected[0])
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), [x, *slopes]) for t in (y, expected)))


@needs_cpp
@layouts
def test_the_bits_do_not_depend_on_the_number_of_threads(layout):
    results = []
    threads = torch.get_num_threads()
    for shape, weights in (((8, 24, 40, 40, 2), 24), ((2, 11, 50, 30, 3), 1)):
        inputs, r = inputs_of(shape, torch.float32, layout, weights)
        try:
            for n in (1, 2, 3, 7):
                torch.set_num_threads(n)
                results.append(two_orders(with_settings(pixel_shuffle_act, r, "prelu"), leaves(inputs)))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)
        results.clear()


@layouts
def test_the_triton_kernels_serve_the_operator(layout, use_backend):
    """Through the interpreter where there is no GPU."""
    use_backend("triton")
    for act in ("relu", "prelu"):
        inputs, r = inputs_of((1, 2, 2, 3, 2), layout=layout)
        function = with_settings(pixel_shuffle_act, r, act)
        given = leaves(arguments_of(inputs, act))
        assert torch.autograd.gradcheck(function, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@layouts
@pytest.mark.parametrize("act", ["relu", "prelu"])
def test_compiled_whole(act, layout):
    inputs, r = inputs_of((4, 6, 5, 5, 2), torch.float32, layout)
    given = leaves(arguments_of(inputs, act))

    def step(*given):
        return with_settings(pixel_shuffle_act, r, act)(*given).square().mean()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(*given)
        results.append([loss, *torch.autograd.grad(loss, given)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("act", "slope", "expected"),
    [("none", 0.0, ""), ("relu", 0.0, "y"), ("leaky_relu", 0.2, "y"), ("leaky_relu", -0.2, "x"), ("prelu", 0.0, "xw")],
)
def test_what_is_saved(act, slope, expected):
    """Of relu and leaky_relu what the next layer saves as well, x where y does not tell the side, nothing where there is
    none."""
    inputs, r = inputs_of((4, 6, 5, 5, 2), torch.float32)
    x, weight = leaves(inputs)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = with_settings(pixel_shuffle_act, r, act, slope)(*arguments_of([x, weight], act))
    tensors = {"x": x, "y": y, "w": weight}
    assert [t.data_ptr() for t in saved] == [tensors[name].data_ptr() for name in expected]


def test_no_gradient_is_computed_that_nobody_uses(monkeypatch):
    asked = []
    kernel = operators.pixel_shuffle_act_backward
    monkeypatch.setattr(
        operators, "pixel_shuffle_act_backward", lambda *args: asked.append(args[-2:]) or kernel(*args)
    )  # fmt: skip
    inputs, r = inputs_of((4, 3, 5, 5, 2))
    x, weight = (t * 1 for t in leaves(inputs))
    y = pixel_shuffle_act(x, r, "prelu", weight).sum()
    for targets in (x, weight, (x, weight)):
        torch.autograd.grad(y, targets, retain_graph=True)
    assert asked == [(True, False), (False, True), (True, True)]


x4 = torch.randn(2, 12, 4, 4)
BAD = {
    "no tensor": (dict(x=[1.0]), TypeError, "x must be a tensor, not list"),
    "integers": (dict(x=torch.ones(2, 12, 4, 4, dtype=torch.int64)), TypeError, "x must be float32"),
    "two dimensions": (dict(x=torch.ones(12, 4)), ValueError, r"x must have shape \(N, C·r², H, W\) or"),
    "five dimensions": (dict(x=x4[None]), ValueError, "x must have shape"),
    "no integer": (dict(upscale_factor=2.0), TypeError, "upscale_factor must be an integer, not float"),
    "factor 0": (dict(upscale_factor=0), ValueError, "upscale_factor must be 1 or more, not 0"),
    "channels": (dict(upscale_factor=3), ValueError, "x must have a multiple of 9 channels, upscale_factor², not 12"),
    "unknown act": (dict(act="gelu"), ValueError, "act must be one of none, relu, leaky_relu, prelu, not 'gelu'"),
    "no weight": (dict(prelu_weight=None), ValueError, "act 'prelu' needs prelu_weight"),
    "a weight": (dict(act="relu"), ValueError, "prelu_weight is for act 'prelu', not for 'relu'"),
    "weight no tensor": (dict(prelu_weight=0.25), TypeError, "prelu_weight must be a tensor, not float"),
    "weight of x": (
        dict(prelu_weight=torch.ones(12)), ValueError,
        r"prelu_weight must have shape \(3,\), one for each channel, or \(1,\), not \(12,\)",
    ),
    "weight of two dimensions": (dict(prelu_weight=torch.ones(3, 1)), ValueError, "prelu_weight must have shape"),
    "weight without": (dict(prelu_weight=torch.ones(())), ValueError, "prelu_weight must have shape"),
    "weight's dtype": (dict(prelu_weight=torch.ones(3).double()), TypeError, "prelu_weight must be torch.float32"),
    "weight's device": (dict(prelu_weight=torch.ones(3, device="meta")), ValueError, "prelu_weight is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        pixel_shuffle_act(**(dict(x=x4, upscale_factor=2, prelu_weight=torch.ones(3)) | changes))


def test_function_transforms_see_through_the_operator():
    (x, weight), r = inputs_of((2, 3, 2, 2, 2))

    def score(function, x):
        return function(x, r, "prelu", weight).pow(3).sum()

    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),)), torch.func.hessian):
        ours, stock = (transform(lambda x, f=f: score(f, x))(x) for f in (pixel_shuffle_act, reference))
        torch.testing.assert_close(ours, stock)


@needs_cpp
def test_stock_torch_serves_small_tensors_unless_a_backend_is_named(monkeypatch):
    served = []
    kernel = operators.pixel_shuffle_act
    monkeypatch.setattr(
        operators, "pixel_shuffle_act", lambda *args: served.append(args[0].shape) or kernel(*args)
    )  # fmt: skip
    small, large = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 1024, 1024)
    for automatic in (True, False):
        monkeypatch.setattr(backend, "is_automatic", lambda: automatic)  # noqa: B023
        for x in (small, large):
            pixel_shuffle_act(x, 2, "relu")
    assert served == [large.shape, small.shape, large.shape]
