"""conv2d and conv_transpose2d against stock torch, to the second derivative, in every form that the CPU has."""

import collections
import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from needs import needs_cpp
from oracle import Errors, two_orders

from fastgan import backend
from fastgan.ops import _conv_cpu, conv2d, conv_transpose2d

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# (N, C, H, W), C', kernel, settings. DCGAN's layers, CycleGAN's, and odd ones.
CASES = {
    "1x1 and 4x4": ((3, 10, 1, 1), 8, (4, 4), dict(stride=1, padding=0)),
    "k4 s2 p1": ((3, 6, 5, 5), 10, (4, 4), dict(stride=2, padding=1)),
    "k4 s2 p1, many images": ((40, 2, 12, 12), 3, (4, 4), dict(stride=2, padding=1)),
    "k3 s2 p1": ((2, 5, 7, 6), 4, (3, 3), dict(stride=2, padding=1)),
    "k3 s2 p1 d2": ((2, 5, 9, 8), 4, (3, 3), dict(stride=2, padding=1, dilation=2)),
    "groups": ((2, 6, 8, 8), 4, (3, 3), dict(stride=1, padding=1, groups=2)),
    "uneven": ((2, 3, 9, 8), 17, (3, 5), dict(stride=(2, 1), padding=(0, 2), dilation=(1, 2))),
    "mostly padding": ((2, 4, 2, 2), 6, (3, 3), dict(stride=3, padding=2)),
    "k1": ((2, 4, 5, 5), 6, (1, 1), dict(stride=1, padding=0)),
}


def inputs_of(case, transposed, dtype, bias=True):
    shape, outputs, kernel, settings = CASES[case]
    if case == "1x1 and 4x4" and not transposed:
        shape = (*shape[:2], 4, 4)
    groups = settings.get("groups", 1)
    ends = (shape[1], outputs // groups) if transposed else (outputs, shape[1] // groups)
    tensors = [torch.randn(shape), torch.randn(*ends, *kernel), torch.randn(outputs) if bias else None]
    return [None if t is None else t.to(dtype) for t in tensors], settings


def leaves(inputs, dtype):
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]


HAS_MATRIX_UNIT = backend.obstacle("cpp", "cpu") is None and importlib.import_module("fastgan._C").has_matrix_unit()


@pytest.fixture(autouse=True)
def _forms_are_chosen_anew():
    plans = (_conv_cpu._plan_for, _conv_cpu._plan_backward)
    for plan in plans:
        plan.cache_clear()
    yield
    for plan in plans:
        plan.cache_clear()


@pytest.fixture(params=["its own choice", "vendor", "patches", "tiles"])
def form(request, monkeypatch):
    """Every way to compute a convolution has to be right wherever it can be taken."""
    if request.param == "its own choice":
        return
    if request.param == "tiles" and not HAS_MATRIX_UNIT:
        pytest.skip("this CPU has no matrix unit")
    choose = _conv_cpu.choose_form

    def choose_form(geometry, result):
        takes = geometry.groups == 1 and (request.param != "tiles" or geometry.dtype != torch.float64)
        return request.param if takes else choose(geometry, result)

    monkeypatch.setattr(_conv_cpu, "choose_form", choose_form)


@pytest.mark.parametrize("function", [conv2d, conv_transpose2d])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_that_the_vendor_does_not_convolve_are_convolved_in_float32(dtype, function, monkeypatch):
    monkeypatch.setattr(_conv_cpu, "vendor_takes", lambda dtype: dtype.itemsize > 2)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 6, 8, 8), (6, 6, 4, 4), (6,))]
    wide = [t.detach().float().requires_grad_() for t in inputs]
    y, expected = function(*inputs, stride=2, padding=1), function(*wide, stride=2, padding=1)
    grad_y = torch.randn_like(y)
    grads, of_wide = (torch.autograd.grad(z, at, grad_y.to(z.dtype)) for z, at in ((y, inputs), (expected, wide)))
    for ours, once_rounded in zip((y, *grads), (expected, *of_wide), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, once_rounded.to(dtype), rtol=0, atol=0)


@needs_cpp
@pytest.mark.parametrize("form", ["patches", "winograd"])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv2d", "conv_transpose2d"])
def test_they_are_convolved_in_float32_under_autocast_too(transposed, form, monkeypatch):
    monkeypatch.setattr(_conv_cpu, "vendor_takes", lambda dtype: dtype.itemsize > 2)
    monkeypatch.setattr(_conv_cpu, "choose_form", lambda geometry, result: form)
    x, weight = torch.randn(2, 6, 8, 8).bfloat16(), torch.randn(6, 6, 4, 4).bfloat16()
    settings = ((2, 2), (1, 1), (1, 1), transposed, (0, 0), 1)

    def results():
        y = _conv_cpu.convolution(x, weight, None, settings)
        return y, _conv_cpu.weight_grad(y, x, weight.shape, settings)

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("transposed", [False, True], ids=["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_values_and_both_derivatives_are_as_exact_as_eager(case, dtype, transposed, form, poisoned):
    errors = Errors()
    ours, stock = (conv_transpose2d, F.conv_transpose2d) if transposed else (conv2d, F.conv2d)
    for bias, layout in itertools.product((True, False), LAYOUTS):
        inputs, settings = inputs_of(case, transposed, dtype, bias)
        names = ["y", "x", "weight", *["bias"] * bias, "g_x", "g_weight", *["g_bias"] * bias, "g_grad_y"]

        def two(function, layout, wide=dtype, inputs=inputs, settings=settings):
            x = inputs[0].contiguous(memory_format=layout)
            return two_orders(lambda *t: function(*t, **settings), leaves([x, *inputs[1:]], wide), dtype)

        truth = two(stock, layout, torch.float64)
        eager = [worst(results) for results in zip(truth, *(two(stock, each) for each in LAYOUTS), strict=True)]
        errors.add(names, two(ours, layout), eager, truth)
    errors.check()


LAYOUTS = (torch.contiguous_format, torch.channels_last)


def worst(results):
    """Eager torch has other algorithms for each layout, and so another error."""
    truth, *eager = results
    return truth if truth is None else max(eager, key=lambda t: (t.double() - truth).norm())


@pytest.mark.parametrize("transposed", [False, True], ids=["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("case", ["1x1 and 4x4", "k4 s2 p1", "k3 s2 p1 d2", "groups"])
def test_gradcheck_and_gradgradcheck(case, transposed):
    (x, weight, bias), settings = inputs_of(case, transposed, torch.float64)
    x = x[:1, :, :4, :4]
    function = conv_transpose2d if transposed else conv2d
    inputs = leaves([x, weight, bias], torch.float64)
    assert torch.autograd.gradcheck(lambda *t: function(*t, **settings), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *t: function(*t, **settings), inputs, fast_mode=True)


@pytest.mark.parametrize("last", [True, False], ids=["last layer", "parameters after it"])
@pytest.mark.parametrize("transposed", [False, True], ids=["conv2d", "conv_transpose2d"])
def test_a_gradient_penalty_through_the_operator(transposed, last, form):
    def gradients(function):
        torch.manual_seed(0)
        inputs, settings = inputs_of("k4 s2 p1", transposed, torch.float64)
        x, weight, bias = leaves(inputs, torch.float64)
        head = torch.linspace(-1, 1, 10, dtype=torch.float64).requires_grad_()
        y = function(x, weight, bias, **settings).pow(2).mean((2, 3))
        score = y if last else (y @ head).tanh()
        (grad_x,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return torch.autograd.grad(grad_x.pow(2).sum(), [weight, bias] if last else [weight, bias, head])

    ours, stock = (conv_transpose2d, F.conv_transpose2d) if transposed else (conv2d, F.conv2d)
    torch.testing.assert_close(gradients(ours), gradients(stock))


def test_the_third_derivative_is_exact_too():
    def third(function):
        torch.manual_seed(0)
        (x, weight, _), settings = inputs_of("k4 s2 p1", False, torch.float64)
        x, weight = leaves([x, weight], torch.float64)
        (first,) = torch.autograd.grad(function(x, weight, **settings).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), weight, create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), (x, weight))

    torch.testing.assert_close(third(conv2d), third(F.conv2d))


@pytest.mark.parametrize("transposed", [False, True], ids=["conv2d", "conv_transpose2d"])
def test_opcheck(transposed):
    (x, weight, bias), _ = inputs_of("k4 s2 p1", transposed, torch.float32)
    settings = ([2, 2], [1, 1], [1, 1], transposed, [0, 0], 1)
    x, weight, bias = leaves([x, weight, bias], torch.float32)
    torch.library.opcheck(torch.ops.fastgan.convolution, (x, weight, bias, *settings))
    torch.library.opcheck(torch.ops.fastgan.convolution_moments, (x, weight, *settings, "any"))
    y = torch.ops.fastgan.convolution(x, weight, bias, *settings).detach().requires_grad_()
    torch.library.opcheck(torch.ops.fastgan.convolution_weight_grad, (y, x, weight.shape, *settings))
    inputs = [t.detach() for t in (y, x, weight)]
    torch.library.opcheck(torch.ops.fastgan.convolution_backward, (*inputs, *settings))


def count_calls(function):
    """How often each operator of a convolution runs; changes of layout do not count."""
    calls = {"convolution": 0, "convolution_weight_grad": 0, "convolution_backward": 0}

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            library, name = func._schema.name.split("::")
            if library == "fastgan" and name in calls:
                calls[name] += 1
            return func(*args, **(kwargs or {}))

    with Counter():
        function()
    return calls


def test_no_weight_gradient_is_computed_for_a_gradient_in_the_input():
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    calls = count_calls(lambda: torch.autograd.grad(conv2d(x, weight).sum(), x))
    assert calls == {"convolution": 2, "convolution_weight_grad": 0, "convolution_backward": 0}


def test_a_gradient_penalty_costs_one_tangent_and_one_weight_gradient(monkeypatch):
    """Forward, input gradient, then: the tangent forward, and a weight gradient of the input gradient."""
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)

    def penalty():
        (grad,) = torch.autograd.grad(conv2d(x, weight).pow(2).sum(), x, create_graph=True)
        grad.pow(2).sum().backward(inputs=[weight])

    calls = count_calls(penalty)
    # The tangent forward and its weight's gradient are one backward pass, of the convolution that gave the input gradient.
    assert calls == {"convolution": 2, "convolution_weight_grad": 1, "convolution_backward": 1}


@pytest.mark.parametrize("transposed", [False, True], ids=["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_both_gradients_at_once_are_those_that_come_one_by_one(case, dtype, transposed, form):
    inputs, settings = inputs_of(case, transposed, dtype)
    x, weight, bias = leaves(inputs, dtype)
    y = (conv_transpose2d if transposed else conv2d)(x, weight, bias, **settings)
    grad_y = torch.randn_like(y)

    def gradients(*inputs):
        return torch.autograd.grad(y, inputs, grad_y, retain_graph=True)

    for both, one in zip(gradients(x, weight), (*gradients(x), *gradients(weight)), strict=True):
        torch.testing.assert_close(both, one, rtol=16 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)
        assert both.stride() == one.stride()


@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_the_layout_is_the_one_stock_torch_returns(layout, weight_layout):
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=layout)
    weight = torch.randn(8, 8, 4, 4).contiguous(memory_format=weight_layout)
    for ours, stock in ((conv2d, F.conv2d), (conv_transpose2d, F.conv_transpose2d)):
        assert ours(x, weight, stride=2, padding=1).stride() == stock(x, weight, stride=2, padding=1).stride()


def test_autocast_casts_as_stock_torch_does():
    x, weight, bias = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock = conv2d(x, weight, bias), F.conv2d(x, weight, bias)
    assert ours.dtype == stock.dtype == torch.bfloat16
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)


def test_an_output_padding_above_the_stride_runs_as_stock():
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(3, 4, 3, 3)
    settings = dict(stride=1, output_padding=1, dilation=2)
    assert torch.equal(conv_transpose2d(x, weight, **settings), F.conv_transpose2d(x, weight, **settings))


def test_an_empty_batch_gives_an_empty_result():
    assert conv2d(torch.randn(0, 3, 6, 6), torch.randn(4, 3, 3, 3)).shape == (0, 4, 4, 4)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    """Of our own kernels; of its sums the vendor promises nothing."""
    geometry = geometry_of((40, 3, 24, 24), outputs=20)
    image = torch.randn(geometry.image).contiguous(memory_format=torch.channels_last)
    positions = torch.randn(geometry.positions).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(20, 3, 4, 4)

    def results():
        identity = torch.eye(geometry.patch).view(geometry.patch, 4, 4, 3).permute(0, 3, 1, 2)
        columns = torch.ones(*geometry.positions[::2], geometry.positions[3], geometry.patch).permute(0, 3, 1, 2)
        yield _conv_cpu._image_of(geometry, columns * positions.mean(1, keepdim=True), identity)
        if HAS_MATRIX_UNIT:
            yield _conv_cpu._convolution_by_tiles(geometry, image, weight, None, transposed=False)
            yield _conv_cpu._convolution_by_tiles(geometry, positions, weight, None, transposed=True)
            grad_weight = torch.empty_like(weight)
            assert _conv_cpu._weight_grad_by_tiles(geometry, positions, image, grad_weight)
            yield grad_weight

    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(list(results()))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def geometry_of(image, outputs, dtype=torch.float32):
    """k4 s2 p1."""
    n, _, h, w = image
    positions = (n, outputs, h // 2, w // 2)
    return _conv_cpu.Geometry(dtype, image, positions, (4, 4), (2, 2), (1, 1), (1, 1), 1)


def add_two_orders(errors, inputs, transposed, **settings):
    ours, stock = (conv_transpose2d, F.conv_transpose2d) if transposed else (conv2d, F.conv2d)
    results = [
        two_orders(lambda *t, f=function: f(*t, **settings), leaves(inputs, dtype), torch.float32)
        for function, dtype in ((ours, torch.float32), (stock, torch.float32), (stock, torch.float64))
    ]
    errors.add(["y", "x", "weight", "g_x", "g_weight", "g_grad_y"], *results)


needs_matrix_unit = pytest.mark.skipif(not HAS_MATRIX_UNIT, reason="this CPU has no matrix unit")


@needs_matrix_unit
@pytest.mark.parametrize("special", [float("inf"), float("nan"), 3.4e38, 1e-36, 1e-44], ids=str)
@pytest.mark.parametrize("where", ["x", "weight"])
def test_numbers_that_do_not_split_into_tiles_are_as_stock(special, where, monkeypatch):
    """Infinite, not a number, rounded to infinity, or all tiny."""
    monkeypatch.setattr(_conv_cpu, "choose_form", lambda geometry, result: "tiles")
    tensors = {"x": torch.randn(2, 3, 8, 8), "weight": torch.randn(4, 3, 4, 4)}
    if abs(special) < 1:
        tensors[where].mul_(special)
    else:
        tensors[where][0, 1, 2, 3] = special
    results = []
    for function in (conv2d, F.conv2d):
        x, weight = (t.clone().requires_grad_() for t in tensors.values())
        y = function(x, weight, stride=2, padding=1)
        results.append([y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))])
    for ours, stock in zip(*results, strict=True):
        scale = stock.detach().abs().nan_to_num(0, 0, 0).max().item()
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5 * min(scale, 1), equal_nan=True)


@needs_matrix_unit
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "other strides"])
@pytest.mark.parametrize("outputs", [3, 16, 20, 33, 64])
@pytest.mark.parametrize("n", [1, 7, 16, 40])
def test_tiles_take_any_batch_channels_and_layout_of_the_weight(n, outputs, weight_layout, monkeypatch, poisoned):
    monkeypatch.setattr(_conv_cpu, "choose_form", lambda geometry, result: "tiles")
    errors = Errors()
    for transposed in (False, True):
        inputs = [torch.randn(n, 40, 9, 7), torch.randn(*((40, outputs) if transposed else (outputs, 40)), 3, 5)]
        if weight_layout == "channels_last":
            inputs[1] = inputs[1].contiguous(memory_format=torch.channels_last)
        elif weight_layout == "other strides":
            inputs[1] = inputs[1].permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
        add_two_orders(errors, inputs, transposed, stride=(2, 1), padding=(1, 3), dilation=(1, 2))
    errors.check()


@needs_matrix_unit
def test_a_batch_larger_than_the_workspace_is_packed_piece_by_piece(monkeypatch):
    """Packed float32 takes 6 bytes an element, 24 MiB at a time."""
    monkeypatch.setattr(_conv_cpu, "choose_form", lambda geometry, result: "tiles")
    errors = Errors()
    add_two_orders(errors, [torch.randn(200, 32, 32, 32), torch.randn(16, 32, 4, 4)], False, stride=2, padding=1)
    errors.check()


@pytest.fixture
def by_winograd(monkeypatch):
    if backend.obstacle("cpp", "cpu") is not None:
        pytest.skip("the C++ kernels are not there")
    monkeypatch.setattr(_conv_cpu, "choose_form", lambda geometry, result: "winograd")


@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("padding", [0, 1, 2, (0, 2)], ids=str)
@pytest.mark.parametrize(("inside", "outside"), [(16, 33), (40, 5)])
def test_winograd_s_form_is_as_exact_as_eager(inside, outside, padding, weight_layout, by_winograd, poisoned):
    errors = Errors()
    for transposed, size in itertools.product((False, True), ((34, 33), (35, 34))):
        ends = (inside, outside) if transposed else (outside, inside)
        inputs = [torch.randn(2, inside, *size), torch.randn(*ends, 3, 3).contiguous(memory_format=weight_layout)]
        add_two_orders(errors, inputs, transposed, padding=padding)
    errors.check()


def test_winograd_s_form_takes_many_tiles_and_channels_piece_by_piece(by_winograd):
    """96 tiles at a time, and 128 channels of what is summed over."""
    errors = Errors()
    add_two_orders(errors, [torch.randn(7, 130, 16, 17), torch.randn(40, 130, 3, 3)], False, padding=1)
    errors.check()


@needs_cpp
@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("padding", [0, 1, 2, 3, (1, 0), (0, 3)], ids=str)
@pytest.mark.parametrize(("inside", "outside"), [(16, 33), (40, 5)])
def test_the_phases_of_k4_s2_are_as_exact_as_eager(inside, outside, padding, weight_layout, by_winograd, poisoned):
    errors = Errors()
    for size in ((16, 17), (19, 14), (4, 5)):
        inputs = [
            torch.randn(3, inside, *size),
            torch.randn(outside, inside, 4, 4).contiguous(memory_format=weight_layout),
        ]
        add_two_orders(errors, inputs, False, stride=2, padding=padding)
        inputs[1] = inputs[1].transpose(0, 1)
        for output_padding in (0, (1, 0)):
            add_two_orders(errors, inputs, True, stride=2, padding=padding, output_padding=output_padding)
    errors.check()


@needs_cpp
@pytest.mark.parametrize("shape", [(41, 8, 17), (3, 62, 53), (1, 8, 130)], ids=str)
def test_many_tiles_and_channels_of_the_phases_are_taken_piece_by_piece(shape, by_winograd):
    """Parts of an image, whole ones, or many: 96 tiles at a time, 192 for the image, 512 for the weight's gradient."""
    n, height, width = shape
    errors = Errors()
    inputs = [torch.randn(n, 40, height, width), torch.randn(130, 40, 4, 4)]
    add_two_orders(errors, inputs, False, stride=2, padding=1)
    errors.check()


@needs_cpp
def test_the_bits_of_winograd_s_form_do_not_depend_on_the_number_of_threads(by_winograd):
    x, weight = torch.randn(5, 24, 34, 38).requires_grad_(), torch.randn(40, 24, 4, 4).requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            y = conv2d(x, weight, stride=2, padding=1)
            results.append([y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@needs_cpp
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (4, 2)], ids=["k3 s1", "k4 s2"])
@pytest.mark.parametrize(
    ("where", "special"), [*itertools.product(("x", "weight"), (float("inf"), float("nan"))), ("x", 3.4e38)], ids=str
)
def test_numbers_that_would_spread_over_winograd_s_tiles_are_as_stock(where, special, kernel, stride, monkeypatch):
    monkeypatch.setattr(_conv_cpu, "choose_form", lambda geometry, result: "winograd")
    tensors = {"x": torch.randn(2, 3, 8, 8), "weight": torch.randn(4, 3, kernel, kernel)}
    tensors[where][0, 1, 2, 2] = special
    results = []
    for function in (conv2d, F.conv2d):
        x, weight = (t.clone().requires_grad_() for t in tensors.values())
        y = function(x, weight, stride=stride, padding=1)
        results.append([y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))])
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_winograd_s_form_is_taken_for_residual_blocks_and_never_in_16_bits():
    if backend.obstacle("cpp", "cpu") is not None:
        pytest.skip("the C++ kernels are not there")
    geometry = _conv_cpu.Geometry(torch.float32, (2, 256, 34, 34), (2, 256, 32, 32), (3, 3), (1, 1), (0, 0), (1, 1), 1)
    assert [_conv_cpu.choose_form(geometry, result) for result in ("positions", "image")] == ["winograd"] * 2
    others = [{"dtype": torch.bfloat16}, {"stride": (2, 2)}, {"dilation": (2, 2)}, {"groups": 2}, {"kernel": (3, 1)}]
    for other in others:
        assert _conv_cpu.choose_form(geometry._replace(**other), "positions") != "winograd"


@needs_cpp
def test_the_phases_are_taken_for_dcgan_s_layers_where_there_is_no_matrix_unit():
    layer = _conv_cpu.Geometry(torch.float32, (64, 128, 16, 16), (64, 256, 8, 8), (4, 4), (2, 2), (1, 1), (1, 1), 1)
    form = "tiles" if HAS_MATRIX_UNIT else "winograd"
    assert [_conv_cpu.choose_form(layer, result) for result in ("positions", "image", "weight")] == [form] * 3


def test_compiled_whole():
    def step(x, weight, bias):
        return conv_transpose2d(x, weight, bias, stride=2, padding=1).square().mean()

    (x, weight, bias), _ = inputs_of("k4 s2 p1", True, torch.float32)
    inputs = leaves([x, weight, bias], torch.float32)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        results.append(torch.autograd.grad(function(*inputs), inputs))
    torch.testing.assert_close(*results)


x4, w4 = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
BAD = {
    "integers": (dict(x=x4.long()), TypeError, "x must be float32"),
    "three dimensions": (dict(x=x4[0]), ValueError, r"x must have shape \(N, C, H, W\)"),
    "channels": (dict(x=torch.randn(2, 5, 6, 6)), ValueError, "x must have 3 channels"),
    "weight of two dimensions": (dict(weight=torch.randn(4, 3)), ValueError, "weight must have 4 dimensions"),
    "weight of another dtype": (dict(weight=w4.double()), TypeError, "weight must be torch.float32"),
    "bias too long": (dict(bias=torch.randn(5)), ValueError, r"bias must have shape \(4,\)"),
    "bias on another device": (dict(bias=torch.randn(4, device="meta")), ValueError, "bias is on meta"),
    "groups": (dict(groups=3), ValueError, "groups must divide"),
    "no tensor": (dict(x=[1.0]), TypeError, "x must be a tensor, not list"),
    "weight no tensor": (dict(weight=None), TypeError, "weight must be a tensor, not NoneType"),
    "stride 0": (dict(stride=0), ValueError, "stride must be 1 or more, not 0"),
    "three strides": (dict(stride=(1, 2, 3)), TypeError, "stride must be one integer or two"),
    "half a stride": (dict(stride=1.5), TypeError, "stride must be one integer or two, not 1.5"),
    "dilation 0": (dict(dilation=(1, 0)), ValueError, "dilation must be 1 or more"),
    "negative padding": (dict(padding=-1), ValueError, "padding must be 0 or more, not -1"),
    "padding in two lines": (
        dict(padding=torch.tensor([[1], [0]])),
        TypeError,
        r"^padding must be one integer or two, not tensor\(\[\[1\], \[0\]\]\)$",
    ),
    "padding by name": (dict(padding="same"), TypeError, "padding must be one integer or two, not 'same'"),
    "too small": (dict(x=torch.randn(2, 3, 2, 2)), ValueError, "too small for weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        conv2d(**(dict(x=x4, weight=w4) | changes))


@pytest.mark.parametrize("output_padding", [-1, 2, (0, 3)])
def test_an_output_padding_that_does_not_fit_is_refused(output_padding):
    with pytest.raises(ValueError, match="output_padding must be"):
        conv_transpose2d(torch.randn(2, 4, 6, 6), w4, stride=2, output_padding=output_padding)


VIEWS = {
    "a crop": lambda t: F.pad(t, (2, 2, 2, 2))[:, :, 2:-2, 2:-2],
    "every second channel": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "a transpose": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[:1].expand(4, -1, -1, -1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("view", VIEWS)
def test_the_gradient_of_an_input_of_any_strides_has_stock_s_layout(view):
    strides = []
    for function in (conv2d, F.conv2d):
        x = VIEWS[view](torch.randn(4, 3, 6, 6)).detach().requires_grad_()
        (grad,) = torch.autograd.grad(function(x, w4).sum(), x)
        strides.append(grad.stride())
    assert strides[0] == strides[1]


def test_function_transforms_see_through_the_operator():
    x, weight = torch.randn(2, 3, 5, 5).double(), torch.randn(4, 3, 3, 3).double()
    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),)), torch.func.vmap):
        ours, stock = (
            transform(lambda x, f=f: f(x.view(-1, 3, 5, 5), weight).pow(3).sum())(x) for f in (conv2d, F.conv2d)
        )
        torch.testing.assert_close(ours, stock)


def test_meta_tensors_have_the_shape_of_the_result():
    assert conv2d(x4.to("meta"), w4.to("meta")).shape == (2, 4, 4, 4)


@needs_cpp
def test_stock_torch_serves_little_work_unless_a_backend_is_named(monkeypatch):
    def calls(function):
        return count_calls(function)["convolution"]

    many = torch.randn(8, 64, 64, 64), torch.randn(64, 64, 3, 3)
    assert calls(lambda: conv2d(x4, w4)) == 1
    monkeypatch.setattr(backend, "is_automatic", lambda: True)
    assert calls(lambda: conv2d(x4, w4)) == 0
    assert calls(lambda: conv2d(*many)) == 1


def test_patches_are_not_written_where_they_would_be_many_times_the_input():
    """Few channels in large patches, from few outputs: the input gradient of a 7×7 convolution 3→16."""
    geometry = _conv_cpu.Geometry(torch.float32, (2, 3, 128, 128), (2, 16, 128, 128), (7, 7), (1, 1), (3, 3), (1, 1), 1)
    assert _conv_cpu.choose_form(geometry, "image") == "vendor"


@pytest.mark.skipif(backend.obstacle("cpp", "cpu") is not None, reason="the C++ kernels are not there")
@pytest.mark.parametrize("outputs", [1, 2, 3, 4])
@pytest.mark.parametrize("inside", [16, 20, 33])
def test_few_channels_that_come_out_are_summed_as_exactly_as_eager(inside, outputs, poisoned):
    """An image, or a score, at any stride; and the gradient in an image, of a convolution at every pixel."""
    errors = Errors()
    for kernel, settings in (
        ((7, 7), dict(padding=3)),
        ((3, 4), dict(stride=(1, 2), padding=(0, 3), dilation=(2, 1))),
        ((4, 4), dict(stride=4)),
        ((1, 1), {}),
    ):
        geometry = (torch.randn(2, inside, 9, 11), torch.randn(outputs, inside, *kernel))
        add_two_orders(errors, list(geometry), False, **settings)
    add_two_orders(errors, [torch.randn(2, inside, 9, 11), torch.randn(inside, outputs, 3, 5)], True, padding=(1, 0))
    errors.check()
    for transposed in (False, True):
        shape = (inside, outputs, 3, 3) if transposed else (outputs, inside, 3, 3)
        settings = ((1, 1), (1, 1), (1, 1), transposed, (0, 0), 1)
        assert (
            _conv_cpu._plan(torch.float32, torch.Size((2, inside, 9, 11)), torch.Size(shape), *settings).form == "few"
        )


def test_the_patches_of_a_weight_gradient_are_written_some_images_at_a_time(monkeypatch):
    monkeypatch.setattr(
        _conv_cpu, "choose_form", lambda geometry, result: "patches" if result == "weight" else "vendor"
    )
    monkeypatch.setattr(_conv_cpu, "_PATCH_ELEMENTS", 1 << 12)
    errors = Errors()
    add_two_orders(errors, [torch.randn(7, 6, 9, 8), torch.randn(5, 6, 3, 3)], False, padding=1)
    errors.check()


def test_settings_may_be_any_sequence():
    x, weight = torch.randn(1, 2, 4, 5), torch.randn(3, 2, 3, 3)
    assert torch.equal(conv2d(x, weight, stride=collections.deque([2, 1])), conv2d(x, weight, stride=(2, 1)))
