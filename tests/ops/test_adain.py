"""adain and adain_from_features against their definitions, to the third derivative."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from needs import needs_cpp
from oracle import Errors, arange_like, two_orders

from fastgan import backend
from fastgan.ops import adain, adain_from_features
from fastgan.ops._autograd import operators
from fastgan.ops.adain import reference

ACTS = ("none", "relu", "leaky_relu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Ragged tails in channels and planes, tiny planes, planes cut into pieces, few and many samples.
SHAPES = ((4, 6, 5, 7), (2, 20, 8, 8), (70, 24, 2, 3), (2, 3, 130, 130), (3, 140, 9, 9), (9, 3, 33, 31))

TENSORS = ("x", "scale", "shift", "noise_weight", "bias")
# Which of noise_weight and bias there are, and the noise's batch: None for no noise, 0 for as many as x has.
GIVEN = {
    "all": (True, True, 0),
    "noise of batch 1": (True, True, 1),
    "noise as it is": (False, True, 0),
    "no bias": (True, False, 0),
    "no noise": (False, True, None),
    "style alone": (False, False, None),
}


def inputs_of(shape, given="all", dtype=torch.float64, layout=torch.contiguous_format):
    """([x, scale, shift, noise_weight, bias], noise), rounded to dtype, so that an upcast copy is the same input."""
    has_weight, has_bias, noise_batch = GIVEN[given]
    n, c, *pixels = shape

    def normal(*size):
        return torch.randn(size, dtype=torch.float64).to(dtype)

    x = (2 * torch.randn(shape, dtype=torch.float64) + 1).to(dtype).contiguous(memory_format=layout)
    style = [normal(n, c), normal(n, c)]
    parameters = [normal(c) if has_weight else None, normal(c) if has_bias else None]
    return [x, *style, *parameters], None if noise_batch is None else normal(noise_batch or n, 1, *pixels)


def leaves(inputs, dtype=None):
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]


def calling(function):
    """`function` as a maker of functions of the five differentiable tensors, of the noise and the activation."""

    def of(noise=None, act="none", eps=1e-3):
        def call(x, scale, shift, noise_weight=None, bias=None):
            noise_here = noise if noise is None or noise.dtype == x.dtype else noise.to(x.dtype)
            return function(
                x,
                scale,
                shift,
                eps,
                noise=noise_here,
                noise_weight=noise_weight,
                bias=bias,
                act=act,
                negative_slope=0.2,
            )

        return call

    return of


ours, stock = calling(adain), calling(reference)


def names_of(inputs):
    present = [name for name, tensor in zip(TENSORS, inputs, strict=True) if tensor is not None]
    return ["y", *(f"grad_{name}" for name in present), *(f"g_{name}" for name in present), "g_grad_y"]


def assert_same(found, expected):
    """A gradient that is absent counts as zero."""
    if found is None:
        assert expected is None or not expected.any()
    else:
        torch.testing.assert_close(found, torch.zeros_like(found) if expected is None else expected)


# ── Values and derivatives ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.instruction_sets
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_both_derivatives_are_as_exact_as_eager(shape, dtype, layout, poisoned):
    errors = Errors()
    for act, given in itertools.product(ACTS, GIVEN):
        inputs, noise = inputs_of(shape, given, dtype, LAYOUTS[layout])
        # Eager torch overflows in float16 sums of gradients where it need not: there bfloat16 is the peer.
        peer = torch.bfloat16 if dtype == torch.float16 else dtype
        errors.add(
            names_of(inputs),
            two_orders(ours(noise, act), leaves(inputs), dtype),
            two_orders(stock(noise, act), leaves(inputs, peer), dtype),
            two_orders(stock(noise, act), leaves(inputs, torch.float64), dtype),
        )
    errors.check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_is_computed_in_float64(shape, layout, poisoned):
    """As exactly as eager's, where no truth is at hand: bias moves a normalised plane so little that its gradient is what
    sums a hundred times as large leave."""
    for act, given in itertools.product(ACTS, GIVEN):
        inputs, noise = inputs_of(shape, given, layout=LAYOUTS[layout])
        results = [two_orders(f(noise, act), leaves(inputs)) for f in (ours, stock)]
        for found, expected in zip(*results, strict=True):
            if found is None or expected is None:
                assert_same(found, expected)
            else:
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_definition_is_the_papers():
    """Noise, bias, leaky ReLU, and (y − μ) / σ of each plane, scaled and shifted: in instance norm's own words."""
    (x, scale, shift, noise_weight, bias), noise = inputs_of((3, 4, 5, 6))
    y = x + noise_weight.view(1, 4, 1, 1) * noise + bias.view(1, 4, 1, 1)
    y = F.instance_norm(torch.where(y > 0, y, 0.2 * y), eps=1e-3)
    expected = scale.view(3, 4, 1, 1) * y + shift.view(3, 4, 1, 1)
    for function in (ours, stock):
        found = function(noise, "leaky_relu")(x, scale, shift, noise_weight, bias)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(6, 8), (3, 4, 7), (2, 4, 2, 3, 4), (2, 4, 2, 1, 2, 3)], ids=str)
def test_any_number_of_spatial_dimensions(shape):
    inputs, noise = inputs_of(shape)
    results = [two_orders(f(noise, "leaky_relu"), leaves(inputs)) for f in (ours, stock)]
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("act", ACTS)
def test_gradcheck_and_gradgradcheck(act, given, layout):
    inputs, noise = inputs_of((2, 3, 3, 2), given, layout=LAYOUTS[layout])
    present = [t is not None for t in inputs]

    def function(*arguments):
        rest = iter(arguments)
        return ours(noise, act)(*(next(rest) if there else None for there in present))

    arguments = [t for t in leaves(inputs) if t is not None]
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("given", ["all", "style alone"])
def test_the_third_derivative_agrees_with_differences_of_the_second(given):
    inputs, noise = inputs_of((2, 3, 3, 2), given)
    arguments = [t for t in leaves(inputs) if t is not None]

    def second(x, *rest):
        y = ours(noise, "leaky_relu")(x, *rest).pow(3).sum()
        first = torch.autograd.grad(y, (x, *rest), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (x, *rest), create_graph=True)

    assert torch.autograd.gradcheck(second, arguments, eps=1e-6, atol=1e-4, rtol=1e-4)


def penalty_gradients(score, penalised, parameters):
    """The gradients that a penalty on the gradient of what is `penalised` gives the parameters."""
    grads = torch.autograd.grad(score.sum(), penalised, create_graph=True)
    return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), parameters, allow_unused=True)


@pytest.mark.parametrize("last", [True, False], ids=["last layer", "parameters after it"])
def test_a_gradient_penalty_through_the_operator(last):
    def gradients(function):
        torch.manual_seed(0)
        inputs, noise = inputs_of((4, 6, 6, 6))
        x, *parameters = leaves(inputs)
        head = torch.linspace(-1, 1, 6 * 36, dtype=torch.float64).requires_grad_()
        y = function(noise, "leaky_relu")(x, *parameters).pow(2)
        return penalty_gradients(
            y if last else (y.flatten(1) @ head).tanh(), [x], parameters if last else [*parameters, head]
        )

    for found, expected in zip(gradients(ours), gradients(stock), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("last", [True, False], ids=["last layer", "parameters after it"])
def test_a_path_length_penalty_goes_through_scale_and_shift(last):
    """StyleGAN2's: the images' gradient in w, of which two layers take their styles."""

    def gradients(function):
        torch.manual_seed(0)
        inputs, noise = inputs_of((4, 6, 6, 6))
        x, _, _, noise_weight, bias = leaves(inputs)
        w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
        affine = torch.randn(2, 12, 5, dtype=torch.float64, requires_grad=True)
        mix = torch.randn(6, 6, 1, 1, dtype=torch.float64, requires_grad=True)
        layer, y = function(noise, "leaky_relu"), x
        for matrix in affine:
            y = F.conv2d(layer(y, *(w @ matrix.T).chunk(2, 1), noise_weight, bias), mix)
        images = y if last else y.tanh()
        weighted = images * arange_like(images)
        return penalty_gradients(weighted, [w], [affine, mix, x, noise_weight, bias])

    for found, expected in zip(gradients(ours), gradients(stock), strict=True):
        torch.testing.assert_close(found, expected)


def test_shift_has_no_second_gradient_as_in_stock():
    def gradients(function):
        torch.manual_seed(0)
        inputs, noise = inputs_of((4, 6, 6, 6))
        x, *parameters = leaves(inputs)
        y = function(noise, "leaky_relu")(x, *parameters)
        return penalty_gradients(y * arange_like(y), [x], parameters)

    for found, expected in zip(gradients(ours), gradients(stock), strict=True):
        assert (found is None) == (expected is None)
        assert_same(found, expected)


def test_a_penalty_does_not_ask_for_the_parameters_gradients(monkeypatch):
    """Which the first pass, the one to the input, throws away."""
    asked = []
    kernel = operators.adain_backward
    monkeypatch.setattr(operators, "adain_backward", lambda *args: asked.append(args[-3:]) or kernel(*args))
    inputs, noise = inputs_of((4, 6, 6, 6))
    x, *parameters = leaves(inputs)
    y = ours(noise)(x * 1, *(p * 1 for p in parameters))
    torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.autograd.grad(y.sum(), parameters[:1], retain_graph=True)
    assert asked == [(True, False, False), (False, True, False)]


@pytest.mark.parametrize("noise_batch", [1, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_noise_that_requires_a_gradient_has_both_orders(weighted, noise_batch):
    inputs, _ = inputs_of((3, 4, 3, 2), "all" if weighted else "noise as it is")
    arguments = [t for t in leaves(inputs) if t is not None]
    noise = torch.randn(noise_batch, 1, 3, 2, dtype=torch.float64, requires_grad=True)

    def function(noise, x, scale, shift, *rest):
        bias, *weight = reversed(rest)
        return ours(noise, "leaky_relu")(x, scale, shift, weight[0] if weight else None, bias)

    assert torch.autograd.gradcheck(function, [noise, *arguments])
    assert torch.autograd.gradgradcheck(function, [noise, *arguments])


# ── The operators ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("all", torch.float32), ("noise as it is", torch.bfloat16), ("style alone", torch.float32)],
    ids=str,
)
def test_opcheck(given, dtype):
    inputs, noise = inputs_of((3, 6, 4, 4), given, dtype)
    x, scale, shift, *parameters = leaves(inputs)
    # Halves of a tensor and transposed ones are how styles come.
    scale = scale.T.contiguous().T.detach().requires_grad_()
    settings = (1e-5, "leaky_relu", 0.2)
    tensors = (x, scale, shift, *parameters, noise)
    ops = torch.ops.fastgan
    torch.library.opcheck(ops.adain, (*tensors, *settings))
    mean, var = torch.zeros(3, 6, dtype=torch.float64), torch.ones(3, 6, dtype=torch.float64)
    backward = (torch.randn_like(x).requires_grad_(), *tensors, mean, var, *settings)
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        torch.library.opcheck(ops.adain_backward, (*backward, *needs))
    parameter_ggs = [None if p is None else torch.randn_like(p) for p in parameters]
    for ggs in ((torch.randn_like(x), None, None, None, None), (None, scale, shift, *parameter_ggs)):
        torch.library.opcheck(ops.adain_double_backward, (*ggs, *backward))


@needs_cpp
def test_another_backend_or_a_transform_runs_the_definition(use_backend, monkeypatch):
    served = []
    kernel = operators.adain
    monkeypatch.setattr(operators, "adain", lambda *args: served.append(True) or kernel(*args))
    inputs, noise = inputs_of((3, 4, 5, 5))
    by_kernel = ours(noise, "relu")(*inputs)
    assert served.pop()
    torch.func.vmap(lambda x: ours(noise, "relu")(x, *inputs[1:]))(inputs[0][None])
    use_backend("reference")
    assert torch.equal(ours(noise, "relu")(*inputs), stock(noise, "relu")(*inputs))
    assert not served
    torch.testing.assert_close(by_kernel, stock(noise, "relu")(*inputs))


@needs_cpp
def test_stock_torch_serves_small_tensors_unless_a_backend_is_named(monkeypatch):
    served = []
    kernel = operators.adain
    monkeypatch.setattr(operators, "adain", lambda *args: served.append(args[0].shape) or kernel(*args))
    small, large = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 1024, 1024)
    for automatic in (True, False):
        monkeypatch.setattr(backend, "is_automatic", lambda: automatic)  # noqa: B023
        for x in (small, large):
            ours()(x, *torch.randn(2, *x.shape[:2]))
    assert served == [large.shape, small.shape, large.shape]


@pytest.mark.parametrize("act", ACTS)
def test_saved_are_the_input_the_noise_and_numbers_of_planes(act):
    saved = []
    inputs, noise = inputs_of((4, 6, 5, 5), dtype=torch.float32)
    arguments = leaves(inputs)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(noise, act)(*arguments)
    assert [t.data_ptr() for t in saved if t.numel() > 24] == [arguments[0].data_ptr(), noise.data_ptr()]


# ── Where arithmetic is hard ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_the_switching_point_belongs_to_the_negative_side(act, layout):
    """x + noise + bias of exactly 0, in every vector lane and in the tail."""
    x = torch.tensor([-1.0, 0.0, 1.0]).repeat(4 * 37).view(1, 4, 3, 37) - 0.5
    x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    noise, bias = torch.full((1, 1, 3, 37), 0.25), torch.full((4,), 0.25)
    scale, shift = torch.randn(2, 1, 4)

    def gradient(function, *tensors):
        leaf, *rest = tensors
        y = function(noise.to(leaf.dtype), act)(leaf, *rest[:2], None, rest[2])
        return torch.autograd.grad(y, leaf, arange_like(y))[0]

    found = gradient(ours, x, scale, shift, bias)
    exact = gradient(stock, x.detach().double().requires_grad_(), scale.double(), shift.double(), bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("far", ["x", "noise", "bias"])
def test_huge_means_do_not_cancel(far, layout):
    signs = torch.randint(0, 2, (8, 20, 30, 30)) * 2.0 - 1
    x = ((1e4 if far == "x" else 0) + signs).contiguous(memory_format=LAYOUTS[layout])
    noise = torch.full((1, 1, 30, 30), 1e4 if far == "noise" else 0.0)
    bias = torch.full((20,), 1e4 if far == "bias" else 0.0)
    tensors = [x, torch.randn(8, 20), torch.randn(8, 20), torch.ones(20), bias]
    exact = stock(noise, "leaky_relu")(*(t.double() for t in tensors))
    torch.testing.assert_close(ours(noise, "leaky_relu")(*tensors).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", [(0, 0), (3, 11)], ids=["first", "inside"])
def test_one_outlier_does_not_spoil_the_variance(place, layout):
    (x, *rest), noise = inputs_of((8, 4, 16, 16), dtype=torch.float32, layout=LAYOUTS[layout])
    x[0, :, place[0], place[1]] = 1e4
    exact = stock(noise)(*(t.double() for t in (x, *rest)))
    torch.testing.assert_close(ours(noise)(x, *rest).double(), exact, rtol=1e-5, atol=1e-5)


def first_and_second(function, arguments):
    """Gradients, and those of their squares' sum."""
    y = function(*arguments)
    first = torch.autograd.grad(y, arguments, arange_like(y), create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), arguments, materialize_grads=True)
    return y, first, second


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_variance_gives_shift_and_finite_gradients(layout):
    (x, scale, shift, _, bias), _ = inputs_of((4, 6, 5, 5), dtype=torch.float32, layout=LAYOUTS[layout])
    arguments = leaves([torch.full_like(x, 7.1), scale, shift, None, bias])
    y = ours(None, "leaky_relu")(*arguments)
    torch.testing.assert_close(y, shift.view(4, 6, 1, 1).expand_as(y))
    _, first, second = first_and_second(
        lambda x, scale, shift, bias: ours(None, "leaky_relu")(x, scale, shift, None, bias),
        [t for t in arguments if t is not None],
    )
    assert all(grad.isfinite().all() for grad in (*first, *second))


@pytest.mark.parametrize("shape", [(5, 4, 1, 1), (5, 4), (5, 1, 1, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planes_of_one_element_give_shift_and_gradients_of_exactly_zero(shape, dtype):
    inputs, noise = inputs_of(shape, dtype=dtype)
    arguments = leaves(inputs)
    y, first, second = first_and_second(ours(noise, "leaky_relu", 1e-8), arguments)
    assert torch.equal(y, arguments[2].view_as(y))
    grad_x, grad_scale, grad_shift, grad_noise_weight, grad_bias = first
    assert not any(grad.any() for grad in (grad_x, grad_scale, grad_noise_weight, grad_bias))
    assert torch.equal(grad_shift, arange_like(y).view_as(grad_shift))
    assert not any(grad.any() for grad in second)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-42])
@pytest.mark.parametrize("place", ["x", "noise", "bias"])
@pytest.mark.parametrize("act", ACTS)
def test_special_values_go_where_eager_sends_them(act, place, value, layout):
    inputs, noise = inputs_of((4, 6, 5, 5), dtype=torch.float32, layout=LAYOUTS[layout])
    x, *_, bias = inputs
    {"x": x[1, 1], "noise": noise[1, 0], "bias": bias[None]}[place].select(0, -1).fill_(value)
    results = []
    for function in (ours, stock):
        arguments = leaves(inputs)
        y = function(noise, act)(*arguments)
        results.append([y, *torch.autograd.grad(y, arguments, arange_like(y))])
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-4)


# ── Layouts, shapes and types ────────────────────────────────────────────────────────────────────────────────────────


def test_the_output_and_the_gradient_keep_the_layout():
    x, volume = torch.randn(2, 6, 4, 4), torch.randn(2, 6, 3, 4, 4)
    formats = (x, x.contiguous(memory_format=torch.channels_last), volume)
    style = torch.randn(2, 2, 6)
    for given in (*formats, volume.contiguous(memory_format=torch.channels_last_3d)):
        leaf = given.clone().requires_grad_()
        y = ours()(leaf, *style)
        assert y.stride() == given.stride()
        assert torch.autograd.grad(y.sum(), leaf)[0].stride() == given.stride()


def test_any_strides_give_the_same_numbers():
    base = torch.randn(8, 6, 5, 7)
    views = (
        base.transpose(2, 3),
        base[::2],
        base[:, :, 1:4, ::2],
        base[:, :1].expand(8, 6, 5, 7),
        base.permute(0, 2, 1, 3)[:, :4],
    )
    for view in views:
        (_, scale, shift, weight, bias), noise = inputs_of(tuple(view.shape), dtype=torch.float32)
        tensors = [view, scale.T.contiguous().T, shift[:, :1].expand_as(shift), weight.flip(0), bias.repeat(2)[::2]]
        noise = noise.expand(-1, 2, *noise.shape[2:])[:, 1:]
        results = [two_orders(f(noise, "relu"), leaves(tensors)) for f in (ours, stock)]
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4), (0, 6)], ids=str)
def test_an_empty_tensor_gives_an_empty_result(shape):
    inputs, noise = inputs_of(shape)
    arguments = leaves(inputs)
    y = ours(noise, "leaky_relu")(*arguments)
    assert y.shape == shape
    for argument, grad in zip(arguments, torch.autograd.grad(y.sum(), arguments), strict=True):
        assert grad.shape == argument.shape and not grad.any()


@pytest.mark.parametrize("style_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_types_as_autocast_mixes_them(style_dtype, parameter_dtype, noise_dtype):
    (x, *style_and_parameters), noise = inputs_of((4, 6, 5, 5), dtype=torch.bfloat16)
    types = [torch.bfloat16, style_dtype, style_dtype, parameter_dtype, parameter_dtype]
    arguments = leaves([t.to(dtype) for t, dtype in zip((x, *style_and_parameters), types, strict=True)])
    results = []
    for function in (adain, reference):
        y = function(
            *arguments[:3], noise=noise.to(noise_dtype), noise_weight=arguments[3], bias=arguments[4], act="leaky_relu"
        )
        assert y.dtype == torch.bfloat16
        first = torch.autograd.grad(y, arguments, torch.ones_like(y), create_graph=True)
        assert [grad.dtype for grad in first] == types
        second = torch.autograd.grad(first[0].float().pow(2).sum(), arguments, materialize_grads=True)
        assert [grad.dtype for grad in second] == types
        results.append(y)
    exact = stock(noise.double(), "leaky_relu", 1e-5)(*(t.double() for t in arguments))
    torch.testing.assert_close(results[0].double(), exact, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(*results, rtol=2**-5, atol=2**-4)


# ── Threads, instruction sets, compilers and transforms ──────────────────────────────────────────────────────────────


@needs_cpp
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 24, 40, 40), (150, 24, 6, 6), (1, 2, 200, 200)], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(shape, layout):
    inputs, noise = inputs_of(shape, dtype=torch.float32, layout=LAYOUTS[layout])
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7, 40):
            torch.set_num_threads(n)
            results.append(two_orders(ours(noise, "leaky_relu"), leaves(inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_whole(layout):
    inputs, noise = inputs_of((4, 6, 5, 5), dtype=torch.float32, layout=LAYOUTS[layout])

    def step(x, scale, shift, noise_weight, bias):
        # A style that is no contiguous tensor, as a chunk of an affine layer's output is none.
        scale = (scale.T * 1).T
        return ours(noise, "leaky_relu")(x, scale, shift, noise_weight, bias).square().mean()

    arguments = leaves(inputs)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(*arguments)
        results.append([loss, *torch.autograd.grad(loss, arguments)])
    torch.testing.assert_close(*results)


def test_function_transforms_see_through_the_operator():
    (x, scale, shift, noise_weight, bias), noise = inputs_of((4, 4, 2, 2))

    def score(function, x, scale):
        return function(noise, "leaky_relu")(x, scale, shift, noise_weight, bias).pow(2).sum()

    for transform in (torch.func.grad, torch.func.hessian):
        for argnums in (0, 1):
            found, expected = (
                transform(lambda *a, f=f: score(f, *a), argnums=argnums)(x, scale) for f in (ours, stock)
            )
            torch.testing.assert_close(found, expected)
    batches = torch.randn(3, *x.shape, dtype=torch.float64)
    found, expected = (torch.func.vmap(lambda x, f=f: score(f, x, scale))(batches) for f in (ours, stock))
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.cos())
        tangents = [torch.autograd.forward_ad.unpack_dual(score(f, dual, scale)).tangent for f in (ours, stock)]
    torch.testing.assert_close(*tangents)


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────

x4, style4, noise4 = torch.randn(2, 6, 4, 4), torch.randn(2, 6), torch.randn(2, 1, 4, 4)
BAD = {
    "x no tensor": (dict(x=[1.0]), TypeError, "x must be a tensor, not list"),
    "x of integers": (dict(x=torch.ones(2, 6, 4, 4, dtype=torch.int64)), TypeError, "x must be float32"),
    "x of one dimension": (dict(x=torch.randn(6)), ValueError, "x must have at least 2 dimensions"),
    "x without channels": (dict(x=torch.randn(2, 0, 4, 4)), ValueError, "x must have channels"),
    "scale no tensor": (dict(scale=1.0), TypeError, "scale must be a tensor, not float"),
    "no scale": (dict(scale=None), TypeError, "scale must be a tensor, not NoneType"),
    "no shift": (dict(shift=None), TypeError, "shift must be a tensor, not NoneType"),
    "scale of a channel": (dict(scale=torch.ones(6)), ValueError, r"scale must have shape \(2, 6\), .*, not \(6,\)"),
    "scale with pixels": (dict(scale=torch.ones(2, 6, 1, 1)), ValueError, r"scale must have shape \(2, 6\)"),
    "shift of another batch": (dict(shift=torch.ones(1, 6)), ValueError, r"shift must have shape \(2, 6\)"),
    "shift of another dtype": (dict(shift=style4.double()), TypeError, "shift must be torch.float32"),
    "scale on another device": (dict(scale=style4.to("meta")), ValueError, "scale is on meta, x on cpu"),
    "noise no tensor": (dict(noise=1.0), TypeError, "noise must be a tensor, not float"),
    "noise of each channel": (dict(noise=x4), ValueError, r"noise must have shape \(2, 1, 4, 4\)"),
    "noise of other pixels": (dict(noise=torch.ones(1, 1, 4, 5)), ValueError, r"noise must have shape \(1, 1, 4, 4\)"),
    "noise of another batch": (dict(noise=torch.ones(3, 1, 4, 4)), ValueError, r"noise must have shape \(2, 1, 4, 4\)"),
    "noise of no dimension": (dict(noise=torch.ones(())), ValueError, "noise must have shape"),
    "noise of another dtype": (dict(noise=noise4.double()), TypeError, "noise must be torch.float32"),
    "weight without noise": (dict(noise=None), ValueError, "noise_weight needs noise"),
    "weight too long": (dict(noise_weight=torch.ones(7)), ValueError, r"noise_weight must have shape \(6,\)"),
    "weight no tensor": (dict(noise_weight=0.1), TypeError, "noise_weight must be a tensor, not float"),
    "bias of two dimensions": (dict(bias=torch.ones(6, 1)), ValueError, r"bias must have shape \(6,\)"),
    "bias of another dtype": (dict(bias=torch.ones(6).half()), TypeError, "bias must be torch.float32"),
    "unknown act": (dict(act="gelu"), ValueError, "act must be one of none, relu, leaky_relu, not 'gelu'"),
    "negative eps": (dict(eps=-1.0), ValueError, "eps must not be negative"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    changes, error, message = BAD[case]
    good = dict(x=x4, scale=style4, shift=style4, noise=noise4, noise_weight=torch.ones(6), bias=torch.ones(6))
    adain(**good)
    with pytest.raises(error, match=message):
        adain(**(good | changes))


# ── Statistics of a style's features ─────────────────────────────────────────────────────────────────────────────────


def huang_belongie(content, style, eps=1e-3):
    """Equation 8 as written; σ = √(σ² + eps) as in the published code, of the biased σ²."""
    axes = tuple(range(2, content.dim()))

    def moments(x):
        return x.mean(axes, keepdim=True), (x.var(axes, correction=0, keepdim=True) + eps).sqrt()

    (mean, deviation), (style_mean, style_deviation) = moments(content), moments(style)
    return style_deviation * (content - mean) / deviation + style_mean


def features(dtype=torch.float64, layout=torch.contiguous_format, size=(3, 20)):
    content = 2 * torch.randn(*size, 8, 9, dtype=torch.float64) + 1
    style = torch.randn(*size, 6, 5, dtype=torch.float64) * 3 - 1
    return [t.to(dtype).contiguous(memory_format=layout) for t in (content, style)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_give_the_papers_values_and_both_derivatives(dtype, layout, poisoned):
    errors = Errors()
    peer = torch.bfloat16 if dtype == torch.float16 else dtype
    inputs = features(dtype, LAYOUTS[layout])
    errors.add(
        ["y", "grad_content", "grad_style", "g_content", "g_style", "g_grad_y"],
        two_orders(lambda c, s: adain_from_features(c, s, 1e-3), leaves(inputs), dtype),
        two_orders(huang_belongie, leaves(inputs, peer), dtype),
        two_orders(huang_belongie, leaves(inputs, torch.float64), dtype),
    )
    errors.check()


def test_features_pass_gradcheck_and_gradgradcheck():
    inputs = leaves(features(size=(2, 3)))
    assert torch.autograd.gradcheck(adain_from_features, inputs)
    inputs = leaves(t[..., :2, :3] for t in inputs)
    assert torch.autograd.gradgradcheck(adain_from_features, inputs)


def test_features_with_far_means_and_large_deviations_stay_in_float16():
    """Their squares do not: they are summed in float32, and only the result is rounded."""
    content, style = features()
    content, style = (content * 4e3 - 1e4).half(), (style * 2e3 + 2e4).half()
    found = adain_from_features(content, style)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), huang_belongie(content.double(), style.double()), rtol=2**-10, atol=16.0)


def test_features_of_another_number_of_dimensions_and_one_pixel():
    content, style = features(size=(2, 4))
    expected = huang_belongie(content, style, 1e-5)
    torch.testing.assert_close(adain_from_features(content, style.flatten(2)), expected)
    one = torch.full((2, 4, 1, 1), 3.0, dtype=torch.float64)
    found = adain_from_features(content, one)
    torch.testing.assert_close(found, huang_belongie(content, one, 1e-5))
    torch.testing.assert_close(adain_from_features(one, style), style.mean((2, 3), keepdim=True), rtol=0, atol=2**-51)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_statistics_of_planes_pass_opcheck(layout):
    x = features(torch.float32, LAYOUTS[layout])[0].requires_grad_()
    statistics = [torch.rand(3, 20, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(torch.ops.fastgan.plane_statistics, (x, 1e-3))
    torch.library.opcheck(torch.ops.fastgan.plane_statistics_backward, (x, *statistics))


def test_features_of_an_empty_batch():
    content, style = features(size=(0, 4))
    assert adain_from_features(content, style).shape == content.shape


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(content=[1.0]), TypeError, "content must be a tensor, not list"),
        (dict(content=torch.ones(2, 6, 4, 4, dtype=torch.int64)), TypeError, "content must be float32"),
        (dict(style=1.0), TypeError, "style must be a tensor, not float"),
        (dict(content=torch.randn(2, 6)), ValueError, "content must have at least 3 dimensions"),
        (dict(style=torch.randn(2, 6)), ValueError, r"style must have .* \(2, 6\) and pixels, not shape \(2, 6\)"),
        (dict(style=torch.randn(1, 6, 4, 4)), ValueError, r"style must have content's batch and channels \(2, 6\)"),
        (dict(style=torch.randn(2, 6, 0, 4)), ValueError, "style must have .* pixels"),
        (dict(style=x4.double()), TypeError, "style must be torch.float32 like content, not torch.float64"),
        (dict(style=x4.to("meta")), ValueError, "style is on meta, content on cpu"),
        (dict(eps=-1.0), ValueError, "eps must not be negative"),
    ],
)
def test_bad_features_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        adain_from_features(**(dict(content=x4, style=x4) | changes))
