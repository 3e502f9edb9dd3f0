"""The convolutions with batch norm and activation against their definition in plain torch."""

import itertools

import pytest
import torch
from oracle import Errors, two_orders

from fastgan.ops import _autotune, _conv_cuda, conv2d_batch_norm_act, conv_norm_act, conv_transpose2d_batch_norm_act
from fastgan.ops.conv_norm_act import _Form, reference

FUNCTIONS = {False: conv2d_batch_norm_act, True: conv_transpose2d_batch_norm_act}
KINDS = pytest.mark.parametrize("transposed", [False, True], ids=["conv2d", "conv_transpose2d"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def inputs_of(transposed, groups=1, bias=True, affine=True):
    """[x, weight, bias, bn_weight, bn_bias] of a k4 s2 p1 layer from 6 to 8 channels."""
    ends = (6, 8 // groups) if transposed else (8, 6 // groups)
    tensors = [torch.randn(3, 6, 6, 6), torch.randn(*ends, 4, 4), torch.randn(8) if bias else None]
    return [*tensors, *([torch.rand(8) + 0.5, torch.randn(8)] if affine else [None, None])]


def leaves(inputs, dtype):
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]


def layer(function, training, running=None, **settings):
    settings = dict(stride=2, padding=1, act="leaky_relu", negative_slope=0.2) | settings

    def call(x, weight, bias, bn_weight, bn_bias):
        mean, var = running or (torch.full((8,), value, dtype=x.dtype) for value in (0.5, 2.0))
        return function(x, weight, bias, mean, var, bn_weight, bn_bias, training, 0.3, 1e-3, **settings)

    return call


@KINDS
@TRAINING
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_and_both_derivatives_are_as_exact_as_eager(dtype, training, transposed, poisoned):
    errors = Errors()
    for groups, bias, affine in itertools.product((1, 2), (True, False), (True, False)):
        inputs = [None if t is None else t.to(dtype) for t in inputs_of(transposed, groups, bias, affine)]
        ours = layer(FUNCTIONS[transposed], training, groups=groups)
        stock = layer(reference, training, groups=groups, transposed=transposed)
        results = [
            two_orders(ours, leaves(inputs, dtype), dtype),
            two_orders(stock, leaves(inputs, dtype), dtype),
            two_orders(stock, leaves(inputs, torch.float64), dtype),
        ]
        named = ["x", "weight", *["bias"] * bias, *["bn_weight", "bn_bias"] * affine]
        names = ["y", *named, *(f"g_{name}" for name in named), "g_grad_y"]
        if bias and training:  # The bias cancels: what eager torch gives it is rounding alone.
            for i in (names.index("bias"), names.index("g_bias")):
                assert not results[0][i].any()
            kept = [i for i, name in enumerate(names) if name not in ("bias", "g_bias")]
            names, results = [names[i] for i in kept], [[r[i] for i in kept] for r in results]
        errors.add(names, *results)
    errors.check()


@KINDS
@TRAINING
def test_gradcheck_and_gradgradcheck(training, transposed):
    inputs = leaves(inputs_of(transposed), torch.float64)
    function = layer(FUNCTIONS[transposed], training)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@KINDS
@TRAINING
@pytest.mark.parametrize("last", [True, False], ids=["last layer", "parameters after it"])
def test_a_gradient_penalty_through_the_layer(last, training, transposed):
    def gradients(call):
        torch.manual_seed(0)
        x, *parameters = leaves(inputs_of(transposed), torch.float64)
        head = torch.linspace(-1, 1, 8, dtype=torch.float64).requires_grad_()
        y = call(x, *parameters).pow(2).mean((2, 3))
        score = y if last else (y @ head).tanh()
        (grad_x,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        wanted = parameters if last else [*parameters, head]
        return torch.autograd.grad(grad_x.pow(2).sum(), wanted, allow_unused=True, materialize_grads=True)

    ours = gradients(layer(FUNCTIONS[transposed], training))
    torch.testing.assert_close(ours, gradients(layer(reference, training, transposed=transposed)))


@pytest.fixture
def moments_on_the_way(monkeypatch):
    """As on CUDA where that is faster: the convolution finds the moments of what it computes."""
    monkeypatch.setattr(conv_norm_act, "_fastest_form", lambda *_: _Form("any"))


@KINDS
def test_moments_found_on_the_way_leave_both_derivatives_exact(transposed, moments_on_the_way):
    inputs = inputs_of(transposed)
    ours, stock = layer(FUNCTIONS[transposed], True), layer(reference, True, transposed=transposed)
    results = [two_orders(call, leaves(inputs, torch.float64)) for call in (ours, stock)]
    torch.testing.assert_close(*results)
    assert torch.autograd.gradgradcheck(ours, leaves(inputs, torch.float64), fast_mode=True)


@KINDS
@pytest.mark.parametrize("last", [True, False], ids=["last layer", "parameters after it"])
def test_moments_found_on_the_way_leave_a_gradient_penalty_exact(last, transposed, moments_on_the_way):
    test_a_gradient_penalty_through_the_layer(last, True, transposed)


@KINDS
def test_moments_found_on_the_way_move_the_running_statistics(transposed, moments_on_the_way):
    test_running_mean_counts_the_bias(transposed)


@KINDS
def test_measuring_computes_nothing_twice_that_anybody_sees(transposed, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTGAN_AUTOTUNE", "1")
    monkeypatch.setenv("FASTGAN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_conv_cuda, "takes", lambda x, *_: True)
    monkeypatch.setattr(_conv_cuda, "tiles_with_moments", lambda dtype: ["any"])
    faster_and_faster = itertools.count(0, -1)
    monkeypatch.setattr(_autotune, "_milliseconds", lambda *_: float(next(faster_and_faster)))
    _autotune.reset()
    test_running_mean_counts_the_bias(transposed)
    ((operator, times),) = _autotune.chosen()
    assert (operator, list(times)) == ("conv_norm_act", ["any", "vendor"])
    _autotune.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form_on_cuda_is_as_exact_as_eager(dtype, transposed, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTGAN_AUTOTUNE", "1")
    monkeypatch.setenv("FASTGAN_CACHE_DIR", str(tmp_path))
    _autotune.reset()
    ends = (64, 32) if transposed else (32, 64)
    given = [torch.randn(8, 64, 16, 16), torch.randn(*ends, 4, 4) / 16, None, torch.rand(32) + 0.5, torch.randn(32)]
    given = [None if t is None else t.cuda().to(dtype) for t in given]
    given[0] = given[0].contiguous(memory_format=torch.channels_last)
    settings = {"stride": 2, "padding": 1, "act": "leaky_relu", "negative_slope": 0.2}

    def call(function, **more):
        def run(x, weight, _, bn_weight, bn_bias):
            return function(x, weight, None, None, None, bn_weight, bn_bias, True, 0.1, 1e-3, **settings, **more)

        return run

    stock = call(reference, transposed=transposed)
    eager = two_orders(stock, leaves(given, dtype), dtype)
    truth = two_orders(stock, leaves(given, torch.float64), dtype)
    names = [str(i) for i in range(len(eager))]
    choice = conv_norm_act._fastest_form
    for tile in (None, "measured", *_conv_cuda.tiles_with_moments(dtype)):
        monkeypatch.setattr(
            conv_norm_act, "_fastest_form", choice if tile == "measured" else lambda *_, tile=tile: _Form(tile)
        )
        errors = Errors()
        errors.add(names, two_orders(call(FUNCTIONS[transposed]), leaves(given, dtype), dtype), eager, truth)
        errors.check()
    assert {"conv_norm_act", "convolution"} <= {operator for operator, _ in _autotune.chosen()}
    _autotune.reset()


@KINDS
def test_running_mean_counts_the_bias(transposed):
    inputs = inputs_of(transposed)
    ours, stock = ([torch.zeros(8), torch.ones(8)] for _ in range(2))
    layer(FUNCTIONS[transposed], True, ours)(*inputs)
    layer(reference, True, stock, transposed=transposed)(*inputs)
    torch.testing.assert_close(ours, stock)


@KINDS
def test_without_a_gradient_evaluation_gives_the_same_numbers(transposed):
    inputs = inputs_of(transposed)
    with torch.no_grad():
        ours = layer(FUNCTIONS[transposed], False)(*inputs)
        torch.testing.assert_close(ours, layer(reference, False, transposed=transposed)(*inputs), rtol=1e-4, atol=1e-4)


@KINDS
@TRAINING
def test_autocast_keeps_statistics_and_parameters_in_float32(training, transposed):
    inputs = leaves(inputs_of(transposed), torch.float32)
    running = [torch.zeros(8), torch.ones(8)]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(FUNCTIONS[transposed], training, running)(*inputs)
        stock = layer(reference, training, transposed=transposed, running=[torch.zeros(8), torch.ones(8)])(*inputs)
    assert y.dtype == stock.dtype == torch.bfloat16
    assert {t.dtype for t in running} == {torch.float32}
    start = [torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)]
    exact = layer(reference, training, transposed=transposed, running=start)(*leaves(inputs, torch.float64))
    errors = Errors()
    errors.add(["y"], [y], [stock], [exact])
    errors.check()
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), inputs))


@KINDS
@TRAINING
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_the_layout_is_the_one_stock_torch_returns(layout, training, transposed):
    x, *parameters = inputs_of(transposed)
    x = x.contiguous(memory_format=layout)
    stock = layer(reference, training, transposed=transposed)(x, *parameters)
    assert layer(FUNCTIONS[transposed], training)(x, *parameters).stride() == stock.stride()
    fast = layer(FUNCTIONS[transposed], training, keep_layout=False)(x, *parameters)
    assert fast.is_contiguous(memory_format=torch.channels_last)


@KINDS
def test_compiled_whole(transposed):
    inputs = leaves(inputs_of(transposed), torch.float32)
    step = layer(FUNCTIONS[transposed], True, [torch.zeros(8), torch.ones(8)])
    compiled = torch.compile(lambda *t: step(*t).square().mean(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(step(*inputs).square().mean(), inputs)
    )


x4 = torch.randn(3, 6, 6, 6)
BAD = {
    "integers": (dict(x=x4.long()), TypeError, "x must be float32"),
    "channels of x": (dict(x=torch.randn(3, 5, 6, 6)), ValueError, "x must have 6 channels"),
    "channels of the norm": (dict(bn_weight=torch.ones(6)), ValueError, r"bn_weight must have shape \(8,\)"),
    "no statistics": (dict(running_mean=None, running_var=None, training=False), ValueError, "needed outside training"),
    "one value": (dict(x=torch.randn(1, 6, 4, 4), padding=0), ValueError, "more than 1 value per channel"),
    "another device": (dict(bn_bias=torch.ones(8, device="meta")), ValueError, "bn_bias is on meta"),
    "unknown act": (dict(act="tanh"), ValueError, "act must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument_and_changes_nothing(case):
    changes, error, message = BAD[case]
    mean, var = torch.zeros(8), torch.ones(8)
    arguments = dict(
        x=x4, weight=torch.randn(8, 6, 4, 4), bias=None, running_mean=mean, running_var=var,
        bn_weight=torch.ones(8), bn_bias=torch.zeros(8), training=True, stride=2, padding=1,
    ) | changes  # fmt: skip
    with pytest.raises(error, match=message):
        conv2d_batch_norm_act(**arguments)
    assert not mean.any() and var.eq(1).all()
