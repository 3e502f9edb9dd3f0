"""upfirdn2d and its family against a naive sum over pixels and taps, to the third derivative."""

import itertools
from functools import partial

import pytest
import torch
from needs import needs_cpp
from oracle import Errors, two_orders

from fastgan.ops import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d
from fastgan.ops.upfirdn2d import _get_filter_size, _parse_padding, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def naive(x, f, up=(1, 1), down=(1, 1), padding=(0, 0, 0, 0), flip_filter=False, gain=1.0):
    """The matrix of the operator, entry by entry, times x."""
    f = torch.ones(1, 1) if f is None else f
    if f.dim() == 1:
        f = torch.outer(f, f)
    f = f.double() * gain
    f = f if flip_filter else f.flip((0, 1))
    height, width = x.shape[2:]
    out_w, out_h = (
        (size * up[i] + padding[2 * i] + padding[2 * i + 1] - f.shape[1 - i]) // down[i] + 1
        for i, size in enumerate((width, height))
    )
    matrix = torch.zeros(out_h, out_w, height, width, dtype=torch.float64)
    for (oy, ox), (ky, kx) in itertools.product(
        itertools.product(range(out_h), range(out_w)), itertools.product(range(f.shape[0]), range(f.shape[1]))
    ):
        py, px = oy * down[1] + ky - padding[2], ox * down[0] + kx - padding[0]
        if py % up[1] == px % up[0] == 0 and 0 <= py < height * up[1] and 0 <= px < width * up[0]:
            matrix[oy, ox, py // up[1], px // up[0]] += f[ky, kx]
    return torch.einsum("pqhw,nchw->ncpq", matrix.to(x.dtype), x)


FILTERS = {
    "binomial": torch.outer(torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 3, 3, 1])) / 64,
    "separable": torch.randn(5, generator=torch.Generator().manual_seed(0)),
    "any": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)),
    "wide": torch.randn(1, 6, generator=torch.Generator().manual_seed(2)),
    "one tap": torch.tensor([[0.7]]),
}
# up, down, padding
RESAMPLINGS = [
    ([1, 1], [1, 1], [2, 3, 1, 2]),
    ([2, 2], [1, 1], [2, 1, 2, 1]),
    ([1, 1], [2, 2], [1, 1, 1, 1]),
    ([2, 2], [2, 2], [3, 3, 3, 3]),
    ([4, 2], [2, 1], [5, 4, 3, 6]),
    ([3, 1], [2, 3], [-2, 5, 4, -1]),
    ([1, 5], [3, 4], [9, -3, -7, 12]),
]
# Ragged tails, planes and rows shorter and longer than a vector, a single channel.
SHAPES = [(2, 3, 6, 7), (1, 20, 5, 8), (2, 1, 5, 35), (1, 70, 6, 6)]


def inputs_of(shape, dtype=torch.float64, layout="nchw"):
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.instruction_sets
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filter_name", FILTERS)
@pytest.mark.parametrize(("up", "down", "padding"), RESAMPLINGS, ids=str)
def test_values_and_gradients_are_those_of_the_naive_sum(up, down, padding, filter_name, layout, poisoned):
    f = FILTERS[filter_name].double()
    for shape, flip in itertools.product(SHAPES, (False, True)):
        x = inputs_of(shape, layout=layout).requires_grad_()
        for function in (upfirdn2d, reference):
            found, expected = (
                two_orders(partial(g, f=f, up=up, down=down, padding=padding, flip_filter=flip, gain=1.7), [x])
                for g in (function, naive)
            )
            torch.testing.assert_close(found, expected)


@pytest.mark.instruction_sets
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_both_derivatives_are_as_exact_as_eager(dtype, layout, poisoned):
    errors = Errors()
    for (up, down, padding), f, shape in itertools.product(RESAMPLINGS, FILTERS.values(), SHAPES):
        x = inputs_of(shape, dtype, layout)
        f = f.to(dtype).to(torch.float64 if dtype == torch.float64 else torch.float32)
        errors.add(
            ["y", "grad_x", "g_x", "g_grad_y"],
            *(
                two_orders(lambda x, g=g: g(x, f, up, down, padding), [x.to(d).requires_grad_()], dtype)  # noqa: B023
                for g, d in ((upfirdn2d, dtype), (reference, dtype), (reference, torch.float64))
            ),
        )
    errors.check()


@pytest.mark.instruction_sets
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps", [(32, 32), (31, 2), (24,)], ids=str)
def test_large_filters(taps, layout):
    f = torch.randn(taps, dtype=torch.float64)
    for up, down in (([1, 1], [1, 1]), ([2, 2], [1, 1]), ([1, 1], [2, 2])):
        x = inputs_of((2, 3, 19, 18), layout=layout)
        torch.testing.assert_close(
            upfirdn2d(x, f, up, down, 16), reference(x, f, up, down, [16] * 4), rtol=1e-10, atol=1e-10
        )


@pytest.mark.instruction_sets
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "up", "down"),
    [
        ((3, 40, 90, 50), 1, 1),  # planes that are turned in several bands, of which the last is short
        ((3, 40, 90, 50), 1, 2),
        ((2, 9, 9, 131), 2, 1),  # rows of several vectors; pixels of fewer channels than a vector has lanes
        ((2, 9, 9, 131), 3, 2),
        ((1, 17, 360, 361), 2, 1),  # more than any cache holds
    ],
    ids=str,
)
def test_large_images(shape, up, down, layout, poisoned):
    x, f = inputs_of(shape, torch.float32, layout), FILTERS["binomial"]
    found = upfirdn2d(x, f, up, down, [2, 1, 2, 1])
    expected = reference(x.double(), f.double(), [up, up], [down, down], [2, 1, 2, 1])
    torch.testing.assert_close(found, expected.float())


def test_an_outer_product_gives_what_its_two_factors_give():
    x, taps = torch.randn(2, 3, 9, 11), torch.rand(6) + 0.1
    found = upfirdn2d(x, torch.outer(taps, taps), 2, 1, 5)
    torch.testing.assert_close(found, upfirdn2d(x, taps, 2, 1, 5))


def test_no_filter_filters_nothing():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(upfirdn2d(x, None), x)
    assert torch.equal(upfirdn2d(x, None, up=2)[:, :, ::2, ::2], x)
    assert torch.equal(upfirdn2d(x, None, down=[2, 1]), x[..., ::2])
    assert torch.equal(upfirdn2d(x, None, padding=[-1, 0, -2, 1]), torch.nn.functional.pad(x, [-1, 0, -2, 1]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("up", "down", "padding"), RESAMPLINGS[1:5], ids=str)
def test_gradcheck_gradgradcheck_and_the_third_derivative(up, down, padding, layout):
    x = inputs_of((2, 2, 4, 3), layout=layout).requires_grad_()

    def function(x):
        return upfirdn2d(x, FILTERS["any"].double(), up, down, padding)

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)

    def second(x):
        (first,) = torch.autograd.grad(function(x).pow(4).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)

    assert torch.autograd.gradcheck(second, x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("last", [True, False], ids=["last layer", "parameters after it"])
def test_a_gradient_penalty_through_the_operator(last):
    def gradients(function):
        torch.manual_seed(0)
        x, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6, 6), (4, 3, 3, 3)))
        head = torch.randn(4 * 9, dtype=torch.float64, requires_grad=True)
        y = torch.nn.functional.conv2d(x, weight, padding=1).tanh()
        y = function(y, FILTERS["binomial"], [1, 1], [2, 2], [1, 1, 1, 1])
        score = y if last else (y.flatten(1) @ head).tanh()
        (grad_x,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        return torch.autograd.grad(grad_x.pow(2).sum(), [weight] if last else [weight, head])

    for found, expected in zip(gradients(upfirdn2d), gradients(naive), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, dtype):
    x = inputs_of((2, 3, 5, 6), dtype, layout).requires_grad_()
    for f in (FILTERS["any"], FILTERS["separable"]):
        torch.library.opcheck(torch.ops.fastgan.upfirdn2d, (x, f, [2, 2], [1, 1], [3, 2, 2, 3], False, 4.0))


def test_only_the_filter_is_saved():
    saved = []
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        upfirdn2d(x, FILTERS["any"], 2, padding=2)
    assert [t.data_ptr() for t in saved] == [FILTERS["any"].data_ptr()]


# ── Memory, devices, other ways to call ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_keeps_the_layout(layout):
    x = inputs_of((2, 6, 4, 4), layout=layout).requires_grad_()
    for function in (upfirdn2d, reference):
        y = function(x, FILTERS["any"], [2, 2], [1, 1], [2, 2, 2, 2])
        assert y.is_contiguous(memory_format=LAYOUTS[layout])
    y = upfirdn2d(x, FILTERS["any"], 2, padding=2)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.is_contiguous(memory_format=LAYOUTS[layout])


def test_any_strides_give_the_same_numbers():
    base, f = torch.randn(8, 6, 5, 7), FILTERS["any"]
    views = (
        base.transpose(2, 3),
        base[::2],
        base[:, :, 1:4, ::2],
        base[:, :1].expand(8, 6, 5, 7),
        base.permute(0, 2, 1, 3)[:, :4],
    )
    for view in views:
        torch.testing.assert_close(upfirdn2d(view, f, 2, padding=3), upfirdn2d(view.clone(), f, 2, padding=3))
        torch.testing.assert_close(upfirdn2d(view, f.mT, 2, padding=3), upfirdn2d(view, f.mT.clone(), 2, padding=3))


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 0, 4, 4)], ids=str)
def test_an_empty_batch_gives_an_empty_result(shape):
    x = torch.randn(shape, requires_grad=True)
    for function in (upfirdn2d, reference):
        y = function(x, FILTERS["binomial"], [2, 2], [1, 1], [2, 1, 2, 1])
        assert y.shape == (*shape[:2], 8, 8)
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-42], ids=["nan", "inf", "denormal"])
def test_special_values_reach_the_outputs_under_whose_taps_they_lie(value, layout):
    x = inputs_of((1, 3, 6, 7), torch.float32, layout)
    x[0, 1, 3, 4] = value
    for f in (FILTERS["any"], FILTERS["binomial"]):
        y = upfirdn2d(x, f, 2, padding=3)
        ones = torch.zeros_like(x)
        ones[0, 1, 3, 4] = 1
        reached = upfirdn2d(ones, torch.ones_like(f), 2, padding=3) != 0
        assert torch.equal(~y.isfinite(), reached & (not torch.isfinite(torch.tensor(value))))


@needs_cpp
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_the_number_of_threads(layout):
    x = inputs_of((3, 20, 33, 35), torch.float32, layout).requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append([
                t for f in FILTERS.values() for t in two_orders(lambda x, f=f: upfirdn2d(x, f, 2, padding=3), [x])
            ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_a_filter_of_another_dtype_than_x():
    x = torch.randn(2, 3, 5, 5, dtype=torch.bfloat16)
    found = upfirdn2d(x, FILTERS["any"], 2, padding=3)
    assert found.dtype == torch.bfloat16
    exact = upfirdn2d(x.double(), FILTERS["any"], 2, padding=3)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert upfirdn2d(torch.randn(2, 3, 5, 5), FILTERS["any"]).dtype == torch.float32


def test_function_transforms_see_through_the_operator():
    x, f = torch.randn(3, 2, 4, 4, dtype=torch.float64), FILTERS["any"]

    def score(function, x):
        return function(x, f, [2, 2], [1, 1], [2, 2, 2, 2]).pow(2).sum()

    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(*(transform(lambda x, g=g: score(g, x))(x) for g in (upfirdn2d, reference)))
    found = torch.func.vmap(lambda x: upfirdn2d(x[None], f, 2, padding=2)[0])(x)
    torch.testing.assert_close(found, upfirdn2d(x, f, 2, padding=2))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.cos())
        tangents = [torch.autograd.forward_ad.unpack_dual(score(g, dual)).tangent for g in (upfirdn2d, reference)]
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_whole(layout):
    def step(x):
        return downsample2d(upsample2d(x, FILTERS["binomial"]).tanh(), FILTERS["separable"]).square().mean()

    x = inputs_of((2, 3, 6, 5), torch.float32, layout).requires_grad_()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(x)
        results.append([loss, *torch.autograd.grad(loss, x)])
    torch.testing.assert_close(*results)


# ── The family ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_upsampling_keeps_a_constant_image_inside_and_places_pixels_alike():
    x = torch.ones(1, 2, 6, 6)
    y = upsample2d(x, setup_filter([1, 3, 3, 1]))
    assert y.shape == (1, 2, 12, 12)
    torch.testing.assert_close(y[:, :, 2:-2, 2:-2], torch.ones(1, 2, 8, 8))
    x = torch.randn(1, 1, 4, 4)
    for taps in ([1.0, 1], [1.0, 3, 3, 1]):
        mirrored = upsample2d(x.flip(3), setup_filter(taps)).flip(3)
        torch.testing.assert_close(upsample2d(x, setup_filter(taps)), mirrored)
    nearest = torch.nn.functional.interpolate(x, scale_factor=2)
    torch.testing.assert_close(upsample2d(x, setup_filter([1, 1])), nearest)


def test_downsampling_by_a_box_is_average_pooling():
    x = torch.randn(2, 3, 8, 6)
    torch.testing.assert_close(downsample2d(x, setup_filter([1, 1])), torch.nn.functional.avg_pool2d(x, 2))
    assert downsample2d(x, setup_filter([1, 3, 3, 1]), down=[1, 2]).shape == (2, 3, 4, 6)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7])
def test_each_keeps_the_size_that_it_promises(taps):
    x, f = torch.randn(1, 2, 8, 12), torch.rand(taps, taps)
    assert filter2d(x, f).shape == x.shape
    assert filter2d(x, f, padding=[1, 2]).shape == (1, 2, 12, 14)
    if taps > 1:
        assert upsample2d(x, f, up=[2, 1]).shape == (1, 2, 8, 24)
        assert downsample2d(x, f, down=2).shape == (1, 2, 4, 6)


def test_filtering_is_a_convolution_around_each_pixel():
    x = torch.zeros(1, 1, 7, 7)
    x[..., 3, 3] = 1
    f = torch.arange(9.0).view(3, 3)
    assert torch.equal(filter2d(x, f)[0, 0, 2:5, 2:5], f)
    assert torch.equal(filter2d(x, f, flip_filter=True, gain=2)[0, 0, 2:5, 2:5], 2 * f.flip(0, 1))


def test_setup_filter():
    assert torch.equal(setup_filter(None), torch.ones(1, 1))
    assert torch.equal(setup_filter(3, normalize=False), torch.full((1, 1), 9.0)), "its outer product"
    taps = torch.tensor([1.0, 3, 3, 1])
    assert torch.equal(setup_filter([1, 3, 3, 1]), torch.outer(taps, taps) / 64)
    assert torch.equal(setup_filter(taps, separable=True, gain=4), taps / 4)
    assert torch.equal(setup_filter(taps, gain=4), torch.outer(taps, taps) / 16)
    assert taps.tolist() == [1, 3, 3, 1]
    assert setup_filter(torch.rand(8)).shape == (8,)
    assert torch.equal(setup_filter([[1, 2], [3, 4]], flip_filter=True), torch.tensor([[0.4, 0.3], [0.2, 0.1]]))


def test_a_stylegan_code_base_changes_its_import_line_only():
    """What NVIDIA's networks, augmentations and conv2d_resample call, with the sizes and sums that it gives there."""
    from fastgan.compat import upfirdn2d as module

    f = module.setup_filter([1, 3, 3, 1])
    x = torch.ones(1, 2, 8, 8)
    edge = torch.tensor(
        [0.75, 1, 1, 1]
    )  # each output is 3/4 of one pixel and 1/4 of the other, which lacks at the edge
    torch.testing.assert_close(module.upsample2d(x, f)[0, 0, :4, :4], edge.outer(edge))
    assert module.downsample2d(x=x, f=f, down=2, padding=-1, flip_filter=True).shape == (1, 2, 3, 3)
    assert module.filter2d(x=x, f=f, gain=2)[0, 0, 4, 4] == 2
    y = module.upfirdn2d(x=x, f=f, up=2, down=[1, 2], padding=[2, 1, 2, 1], gain=4)
    assert torch.equal(y, upfirdn2d(x, f, 2, [1, 2], [2, 1, 2, 1], gain=4))
    assert (_get_filter_size(f), _get_filter_size(None)) == ((4, 4), (1, 1))
    px0, px1, py0, py1 = _parse_padding([1, 2])
    assert (px0, px1, py0, py1) == (1, 1, 2, 2)


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────

x4 = torch.randn(2, 3, 4, 4)
BAD = {
    "no tensor": (dict(x=[1.0]), TypeError, "x must be a tensor, not list"),
    "integers": (dict(x=torch.ones(2, 3, 4, 4, dtype=torch.int64)), TypeError, "x must be float32"),
    "three dimensions": (dict(x=x4[0]), ValueError, "x must have 4 dimensions"),
    "filter no tensor": (dict(f=[1.0]), TypeError, "f must be a tensor, not list"),
    "filter of integers": (dict(f=torch.ones(2, 2, dtype=torch.int64)), TypeError, "f must be float32"),
    "filter of three axes": (dict(f=torch.ones(1, 2, 2)), ValueError, r"f must be \(taps,\) or \(h, w\)"),
    "filter without taps": (dict(f=torch.ones(0)), ValueError, "f must be"),
    "filter elsewhere": (dict(f=torch.ones(2, 2, device="meta")), ValueError, "f is on meta, x on cpu"),
    "filter to be learnt": (dict(f=torch.ones(2, 2, requires_grad=True)), ValueError, "f must not require a gradient"),
    "filter too large": (dict(f=torch.ones(2, 5)), ValueError, "f has 5 taps along x, where the padded x has 4"),
    "cropped away": (dict(padding=[0, 0, -2, -2]), ValueError, "f has 2 taps along y, where the padded x has 0"),
    "no upsampling": (dict(up=0), ValueError, "up must be 1 or more, not 0"),
    "three factors": (dict(down=[1, 2, 3]), ValueError, "down must be a positive integer, or two"),
    "three paddings": (dict(padding=[1, 2, 3]), ValueError, "padding must be one integer"),
    "negative gain of two passes": (dict(f=torch.ones(2), gain=-1), ValueError, "gain must not be negative"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=message):
        upfirdn2d(**dict(x=x4, f=torch.ones(2, 2)) | changes)


def test_upsample2d_names_a_gain_that_is_no_number():
    with pytest.raises(TypeError, match="gain must be a number, not NoneType"):
        upsample2d(x4, None, gain=None)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(f=torch.ones(1, 2, 2)), ValueError, "f must be one tap"),
        (dict(f=[]), ValueError, "f must be one tap"),
        (dict(f=[1, -1]), ValueError, "f must not add up to 0 to be normalised"),
        (dict(f=torch.ones(2, 2), separable=True), ValueError, "to be separable"),
        (dict(f=torch.ones(2), separable=True, gain=-1), ValueError, "gain must not be negative"),
        (dict(f=torch.ones(2), gain=None), TypeError, "gain must be a number, not NoneType"),
        (dict(f=torch.ones(2), normalize=torch.ones(0)), TypeError, "normalize must be True or False, not Tensor"),
        (dict(f=torch.ones(2), flip_filter="yes"), TypeError, "flip_filter must be True or False, not str"),
        (dict(f=torch.ones(2), separable=1), TypeError, "separable must be True or False, not int"),
    ],
)
def test_bad_taps_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        setup_filter(**arguments)
