"""Spectral normalisation of many weights at once against its definition."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import Errors, two_orders

from fastgan import ops
from fastgan.ops.spectral_norm import reference

# (shape, axis of the rows, layout): a linear layer, convolutions, transposed ones, one row, one column, one element.
NCHW, NHWC = torch.contiguous_format, torch.channels_last
WEIGHTS = [
    ((5, 7), 0, NCHW), ((6, 3, 3, 3), 0, NCHW), ((4, 5, 4, 4), 1, NCHW), ((4, 6, 3), 1, NCHW), ((1, 9), 0, NCHW),
    ((9, 1), 0, NCHW), ((1, 1), 0, NCHW), ((3, 8), 1, NCHW), ((4, 5, 3, 3), 0, NHWC), ((4, 5, 3, 3), 1, NHWC),
    ((3, 4, 5, 6), 2, NHWC), ((3, 2, 2, 3, 2), 0, NCHW),
]  # fmt: skip
# With more rows, and longer ones, than a block has; with more columns than are added up at once.
LARGE = [
    ((600, 130), 0, NCHW), ((20, 9000), 0, NCHW), ((130, 40, 4, 4), 1, NCHW), ((70, 600), 1, NCHW),
    ((21, 150, 3, 3), 1, NCHW), ((6, 70, 5, 7), 1, NCHW),
]  # fmt: skip


def problem(weights, dtype=torch.float64, iterations=3):
    """weights, u and v near the singular vectors, and the axes."""
    made = [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for shape, _, layout in weights]
    dims = [dim for _, dim, _ in weights]
    u, v = [], []
    for weight, dim in zip(made, dims, strict=True):
        u.append(F.normalize(torch.randn(weight.shape[dim]), dim=0).to(dtype))
        v.append(F.normalize(torch.randn(weight.numel() // weight.shape[dim]), dim=0).to(dtype))
    _, u, v = reference(made, u, v, dims, iterations)
    return made, u, v, dims


def normalise(u, v, dims):
    """The operator as a function of the weights alone, with u and v as they are."""
    return lambda *weights: tuple(ops.spectral_norm(weights, u, v, dims, n_power_iterations=0)[0])


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_and_vectors_are_as_exact_as_eager(dtype, iterations, poisoned):
    weights, u, v, dims = problem(WEIGHTS + LARGE, dtype)
    wide = [[t.double() for t in kind] for kind in (weights, u, v)]
    results = [
        ops.spectral_norm(weights, u, v, dims, iterations),
        reference(weights, u, v, dims, iterations),
        reference(*wide, dims, iterations),
    ]
    errors = Errors()
    for kind, *found in zip(("W / σ", "u", "v"), *results, strict=True):
        for ours, eager, truth in zip(*found, strict=True):
            errors.add([kind], [ours], [eager], [truth])
    errors.check()
    for given, made in zip(weights, results[0][0], strict=True):
        assert made.stride() == given.stride() and made.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_both_derivatives_are_as_exact_as_eager(dtype, poisoned):
    errors = Errors()
    for description in WEIGHTS + LARGE:
        (weight,), u, v, dims = problem([description], dtype)
        results = []
        for function, to in ((ops.spectral_norm, dtype), (reference, dtype), (reference, torch.float64)):
            settings = [[t.to(to) for t in u], [t.to(to) for t in v], dims, 0]
            normalise_one = partial(lambda function, settings, w: function([w], *settings)[0][0], function, settings)
            results.append(two_orders(normalise_one, [weight.to(to).requires_grad_()], dtype))
        if weight.numel() > 1:  # of one element, all derivatives are rounding
            errors.add(["W / σ", "W", "g_W", "g_G"], *results)
    errors.check()


@pytest.mark.parametrize("served_by", ["automatic", "triton", "reference"])
def test_gradcheck_and_gradgradcheck_over_the_whole_list(served_by, use_backend):
    """Triton through the interpreter where there is no GPU."""
    if served_by == "triton":
        pytest.importorskip("fastgan_kernels.spectral_norm")
    if served_by != "automatic":
        use_backend(served_by)
    weights, u, v, dims = problem([WEIGHTS[i] for i in (0, 1, 8)] if served_by == "triton" else WEIGHTS)
    weights = [weight.requires_grad_() for weight in weights]
    assert torch.autograd.gradcheck(normalise(u, v, dims), weights, fast_mode=True)
    assert torch.autograd.gradgradcheck(normalise(u, v, dims), weights, fast_mode=True)


def test_the_third_derivative_is_the_definitions():
    weights, u, v, dims = problem(WEIGHTS[:4])

    def third(function):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        total = sum(w.pow(3).sum() for w in function(leaves, u, v, dims, 0)[0])
        for _ in range(2):
            grads = torch.autograd.grad(total, leaves, create_graph=True)
            total = sum(grad.square().sum() for grad in grads)
        return torch.autograd.grad(total, leaves)

    torch.testing.assert_close(third(ops.spectral_norm), third(reference))


def test_a_penalty_of_gradients_of_the_weights_themselves():
    """With the operator as the last layer: what must not become a silent zero."""
    weights, u, v, dims = problem(WEIGHTS[:3])

    def penalty(function):
        leaves = [weight.clone().requires_grad_() for weight in weights]
        grads = torch.autograd.grad(
            sum(w.sin().sum() for w in function(leaves, u, v, dims, 0)[0]), leaves, create_graph=True
        )
        sum(grad.square().sum() for grad in grads).backward()
        return [leaf.grad for leaf in leaves]

    torch.testing.assert_close(penalty(ops.spectral_norm), penalty(reference))


def test_opcheck():
    weights, u, v, dims = problem([WEIGHTS[i] for i in (0, 2, 8)])
    sigma = torch.ops.fastgan.spectral_norm(weights, u, v, dims, 1, 1e-12)[3]
    grads, ggs = ([torch.randn_like(w).requires_grad_() for w in weights] for _ in range(2))
    leaves = [w.requires_grad_() for w in weights]
    torch.library.opcheck(torch.ops.fastgan.spectral_norm, (leaves, u, v, dims, 1, 1e-12))
    torch.library.opcheck(torch.ops.fastgan.spectral_norm_backward, (grads, leaves, u, v, sigma, dims))
    torch.library.opcheck(torch.ops.fastgan.spectral_norm_double_backward, (ggs, grads, leaves, u, v, sigma, dims))


def test_what_is_given_stays_and_what_is_returned_is_new():
    weights, u, v, dims = problem(WEIGHTS)
    for iterations in (0, 1):
        before = [t.clone() for t in (*weights, *u, *v)]
        normalised, new_u, new_v = ops.spectral_norm(weights, u, v, dims, iterations)
        addresses = {t.data_ptr() for t in (*weights, *u, *v)}
        assert all(torch.equal(a, b) for a, b in zip(before, (*weights, *u, *v), strict=True))
        assert addresses.isdisjoint(t.data_ptr() for t in (*normalised, *new_u, *new_v))


def test_only_weights_that_take_part_get_a_gradient():
    weights, u, v, dims = problem(WEIGHTS[:4])
    frozen, unused, first, second = weights
    for weight in (unused, first, second):
        weight.requires_grad_()
    normalised, _, _ = ops.spectral_norm(weights, u, v, dims)
    (normalised[0].sum() + normalised[2].square().sum() + normalised[3].sum()).backward()
    expected = reference(weights, u, v, dims)[0]
    (grad,) = torch.autograd.grad(expected[2].square().sum(), first)
    torch.testing.assert_close(first.grad, grad)
    assert frozen.grad is None and unused.grad is None and second.grad is not None


def test_independent_weights_can_be_differentiated_one_after_the_other():
    weights, u, v, dims = problem(WEIGHTS[:2])
    leaves = [weight.requires_grad_() for weight in weights]
    for weight in ops.spectral_norm(leaves, u, v, dims)[0]:
        weight.square().sum().backward()
    assert all(leaf.grad.any() for leaf in leaves)


def test_a_weight_that_has_changed_since_raises_as_in_torch():
    weights, u, v, dims = problem(WEIGHTS[:2])
    leaves = [weight.requires_grad_() for weight in weights]
    normalised, _, _ = ops.spectral_norm(leaves, u, v, dims)
    with torch.no_grad():
        leaves[1].add_(1)
    normalised[0].sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normalised[1].sum().backward()


def test_the_bits_depend_neither_on_the_number_of_threads_nor_on_the_company():
    weights, u, v, dims = problem(LARGE + WEIGHTS, torch.float32)
    grads = [torch.randn_like(weight) for weight in weights]
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            *results, sigma = torch.ops.fastgan.spectral_norm(weights, u, v, dims, 2, 1e-12)
            results.append(torch.ops.fastgan.spectral_norm_backward(grads, weights, *results[1:], sigma, dims))
            found.append([t for kind in results for t in kind])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for i, weight in enumerate(weights):
        alone, _, _ = ops.spectral_norm([weight], [u[i]], [v[i]], [dims[i]], 2)
        assert torch.equal(alone[0], found[0][i])


def test_any_strides_are_taken():
    wide = torch.randn(6, 8, 10, dtype=torch.float64)
    for weight in (wide[:, ::2, 1:], wide.transpose(0, 2), wide[:1].expand(3, -1, -1)):
        u, v = (torch.randn(n, dtype=torch.float64) for n in (len(weight), weight[0].numel()))
        for ours, stock in zip(ops.spectral_norm([weight], [u], [v]), reference([weight], [u], [v], [0]), strict=True):
            torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("scale", [0.0, 1e-13, 1e-12, 1e15])
def test_weights_of_any_size_become_what_torch_makes_of_them(scale):
    """Of 0, and below eps, that is no unit norm."""
    weights, u, v, dims = problem(WEIGHTS[:3], torch.float32)
    weights = [weight * scale for weight in weights]
    for ours, stock in zip(ops.spectral_norm(weights, u, v, dims), reference(weights, u, v, dims), strict=True):
        for a, b in zip(ours, stock, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_a_nan_stays_in_its_weight():
    weights, u, v, dims = problem(WEIGHTS[:3])
    weights[1].view(-1)[3] = float("nan")
    normalised, _, _ = ops.spectral_norm(weights, u, v, dims)
    assert [w.isnan().any().item() for w in normalised] == [False, True, False] and normalised[1].isnan().all()


def test_no_weights_and_empty_ones():
    assert ops.spectral_norm([], [], []) == ([], [], [])
    (weight,), _, _ = ops.spectral_norm([torch.ones(3, 0)], [torch.ones(3)], [torch.ones(0)])
    assert weight.shape == (3, 0)


def test_function_transforms_see_through_the_operator():
    (weight,), u, v, dims = problem(WEIGHTS[:1])
    jacobian = torch.func.jacrev(lambda w: ops.spectral_norm([w], u, v, dims, 0)[0][0])(weight)
    torch.testing.assert_close(jacobian, torch.func.jacrev(lambda w: reference([w], u, v, dims, 0)[0][0])(weight))


def test_bad_input_names_the_argument():
    w, u, v = torch.ones(3, 4), torch.ones(3), torch.ones(4)
    with pytest.raises(TypeError, match=r"weights\[0\] must be float32"):
        ops.spectral_norm([w.to(torch.complex64)], [u], [v])
    with pytest.raises(TypeError, match=r"u\[0\] must be torch.float32 like weights\[0\], not torch.float64"):
        ops.spectral_norm([w], [u.double()], [v])
    with pytest.raises(ValueError, match=r"weights\[0\] must have 2 axes or more"):
        ops.spectral_norm([u], [u], [v])
    with pytest.raises(ValueError, match=r"v\[1\] must have shape \(4,\), not \(3,\)"):
        ops.spectral_norm([w, w], [u, u], [v, u])
    with pytest.raises(ValueError, match="u must have one for each of 1 weights, not 2"):
        ops.spectral_norm([w], [u, u], [v])
    with pytest.raises(ValueError, match=r"dims\[0\] must be an axis of a weight with 2, not 2"):
        ops.spectral_norm([w], [u], [v], [2])
    with pytest.raises(ValueError, match="n_power_iterations must be 0 or more"):
        ops.spectral_norm([w], [u], [v], n_power_iterations=-1)
    with pytest.raises(ValueError, match="eps must not be negative"):
        ops.spectral_norm([w], [u], [v], eps=-1.0)
