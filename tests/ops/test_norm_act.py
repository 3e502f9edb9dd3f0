"""batch_norm_act against its definition, to the third derivative."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from needs import needs_cpp
from oracle import Errors, two_orders

from fastgan import backend
from fastgan.ops import batch_norm_act
from fastgan.ops._autograd import operators
from fastgan.ops.norm_act import reference

ACTS = ("none", "relu", "leaky_relu", "prelu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Ragged tails in channels and planes, one-element planes, several blocks, a plane cut into pieces, few and many channels.
SHAPES = (
    (4, 3, 5, 7),
    (2, 19, 8, 8),
    (64, 16, 1, 1),
    (2, 3, 130, 130),
    (3, 70, 9, 9),
    (9, 1, 33, 31),
    (1, 130, 20, 21),
)

INPUTS = ["x", "weight", "bias", "residual", "prelu_weight"]


def inputs_of(shape, dtype=torch.float64, layout=torch.contiguous_format, residual=False, affine=True, slopes=0):
    """[x, weight, bias, residual, prelu_weight]; rounded to dtype, so that an upcast copy is the same input."""
    x = (2 * torch.randn(shape, dtype=torch.float64) + 3).to(dtype).contiguous(memory_format=layout)
    channels = (torch.randn(shape[1], dtype=torch.float64).to(dtype) for _ in range(2))
    weight, bias = channels if affine else (None, None)
    prelu_weight = torch.randn(slopes, dtype=torch.float64).to(dtype) if slopes else None
    return [x, weight, bias, torch.randn_like(x) if residual else None, prelu_weight]


def names_of(inputs):
    """What `two_orders` returns of them."""
    present = [name for name, tensor in zip(INPUTS, inputs, strict=True) if tensor is not None]
    return ["y", *(f"grad_{name}" for name in present), *(f"g_{name}" for name in present), "g_grad_y"]


def leaves(inputs, dtype=None):
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]


def with_statistics(function, training, act, momentum=0.3):
    def call(x, weight, bias, residual, prelu_weight=None):
        running_mean, running_var = (torch.full((x.shape[1],), value, dtype=x.dtype) for value in (2.0, 3.0))
        return function(
            x, running_mean, running_var, weight, bias, training, momentum, 1e-3,
            act=act, negative_slope=0.2, prelu_weight=prelu_weight, residual=residual,
        )  # fmt: skip

    return call


@pytest.mark.instruction_sets
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_both_derivatives_are_as_exact_as_eager(shape, dtype, layout, poisoned):
    errors = Errors()
    for act, training, residual in itertools.product(ACTS, (True, False), (False, True)):
        slopes = (1 if residual else shape[1]) if act == "prelu" else 0
        inputs = inputs_of(shape, dtype, LAYOUTS[layout], residual, slopes=slopes)
        ours, stock = (with_statistics(f, training, act) for f in (batch_norm_act, reference))
        # Eager torch overflows in float16 sums of gradients where it need not: there bfloat16 is the peer.
        peer = torch.bfloat16 if dtype == torch.float16 else dtype
        errors.add(
            names_of(inputs),
            two_orders(ours, leaves(inputs), dtype),
            two_orders(stock, leaves(inputs, peer), dtype),
            two_orders(stock, leaves(inputs, torch.float64), dtype),
        )
    errors.check()


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 7), (2, 3, 2, 3, 4)], ids=str)
def test_any_number_of_spatial_dimensions(shape):
    inputs = inputs_of(shape)
    ours, stock = (with_statistics(f, True, "relu") for f in (batch_norm_act, reference))
    torch.testing.assert_close(two_orders(ours, leaves(inputs))[:-1], two_orders(stock, leaves(inputs))[:-1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("act", "slopes"), [*((act, 0) for act in ACTS[:3]), ("prelu", 1), ("prelu", 4)])
def test_gradcheck_and_gradgradcheck(act, slopes, training, layout):
    inputs = leaves(inputs_of((3, 4, 3, 2), layout=LAYOUTS[layout], residual=True, slopes=slopes))
    function = with_statistics(batch_norm_act, training, act)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_gradgradcheck_without_affine_parameters():
    x = leaves(inputs_of((3, 4, 3, 2), affine=False))[0]
    assert torch.autograd.gradgradcheck(lambda x: batch_norm_act(x, None, None, training=True, act="leaky_relu"), (x,))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_third_derivative_agrees_with_differences_of_the_second(training, affine):
    """With torch's own batch norm it would not, in training."""
    x, weight, bias, residual, prelu_weight = leaves(inputs_of((3, 4, 3, 2), residual=True, slopes=4))
    given = [x, weight, bias, residual, prelu_weight] if affine else [x, residual]

    def second(*tensors):
        x, weight, bias, residual, prelu_weight = tensors if affine else (tensors[0], None, None, tensors[1], None)
        act = "leaky_relu" if prelu_weight is None else "prelu"
        y = with_statistics(batch_norm_act, training, act)(x, weight, bias, residual, prelu_weight).pow(3).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        targets = [x, weight, prelu_weight] if affine else [x]
        return torch.autograd.grad(first.pow(2).sum(), targets, create_graph=True)

    assert torch.autograd.gradcheck(second, given, eps=1e-6, atol=1e-4, rtol=1e-4)


def r1(critic, x, parameters):
    """The gradients that a zero-centred penalty gives the parameters."""
    (grad_x,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return torch.autograd.grad(grad_x.pow(2).sum(), parameters, allow_unused=True)


@pytest.mark.parametrize("last", [True, False], ids=["last layer", "parameters after it"])
@pytest.mark.parametrize("act", ["leaky_relu", "prelu"])
@pytest.mark.parametrize("training", [True, False])
def test_a_gradient_penalty_through_the_operator(training, act, last):
    def gradients(function):
        torch.manual_seed(0)
        x, weight, bias, _, prelu_weight = leaves(inputs_of((4, 3, 6, 6), slopes=3 if act == "prelu" else 0))
        parameters = [weight, bias] if prelu_weight is None else [weight, bias, prelu_weight]
        head = torch.linspace(-1, 1, 36 * 3, dtype=torch.float64).requires_grad_()

        def critic(x):
            y = with_statistics(function, training, act)(x, weight, bias, None, prelu_weight).pow(2)
            return y if last else (y.flatten(1) @ head).tanh()

        return r1(critic, x, parameters if last else [*parameters, head])

    for ours, stock in zip(gradients(batch_norm_act), gradients(reference), strict=True):
        torch.testing.assert_close(ours, stock)


def test_bias_has_a_zero_second_gradient_not_none():
    x, weight, bias, *_ = leaves(inputs_of((4, 3, 6, 6)))
    grads = r1(lambda x: batch_norm_act(x, None, None, weight, bias, training=True), x, (weight, bias))
    assert grads[1] is not None and not grads[1].any()


@pytest.mark.parametrize(
    ("slopes", "dtype", "training"),
    [(0, torch.float32, True), (5, torch.float32, False), (5, torch.bfloat16, True), (0, torch.bfloat16, False)],
    ids=str,
)
def test_opcheck(slopes, dtype, training):
    x, weight, bias, residual, prelu_weight = leaves(inputs_of((3, 5, 4, 4), dtype, residual=True, slopes=slopes))
    mean, var = (None, None) if training else (torch.zeros(5), torch.ones(5))
    settings = (1e-5, "prelu" if slopes else "leaky_relu", 0.2)
    ops = torch.ops.fastgan
    inputs = (x, weight, bias, residual, prelu_weight)
    torch.library.opcheck(ops.batch_norm_act, (*inputs, mean, var, training, *settings))
    mean, var = torch.zeros(5), torch.ones(5)
    grads = (torch.randn_like(x).requires_grad_(), *inputs, mean, var, training)
    torch.library.opcheck(ops.batch_norm_act_backward, (*grads, *settings, True, True, True))
    torch.library.opcheck(
        ops.batch_norm_act_double_backward, (torch.randn_like(x), None, None, None, *grads, *settings)
    )


@pytest.mark.parametrize("act", ["relu", "leaky_relu", "prelu"])
def test_the_switching_point_belongs_to_the_negative_side(act):
    """x equal to its mean, in every vector lane and in the tail."""
    x = torch.tensor([-1.0, 0.0, 1.0]).repeat(37).view(1, 1, 1, -1).requires_grad_()
    mean, var = torch.zeros(1), torch.ones(1)
    prelu_weight = torch.tensor([-0.3]) if act == "prelu" else None

    def gradients(function):
        y = function(x, mean, var, eps=0.0, act=act, negative_slope=0.2, prelu_weight=prelu_weight)
        return torch.autograd.grad(y, x, torch.ones_like(y))[0]

    assert torch.equal(gradients(batch_norm_act), gradients(reference))


@pytest.mark.instruction_sets
@pytest.mark.parametrize("layout", LAYOUTS)
def test_huge_means_do_not_cancel(layout):
    signs = torch.randint(0, 2, (8, 20, 30, 30)) * 2.0 - 1
    x = (1e4 + signs).contiguous(memory_format=LAYOUTS[layout])
    mean, var = torch.zeros(20), torch.ones(20)
    y = batch_norm_act(x, mean, var, training=True, momentum=1.0, act="none")
    truth = reference(x.double(), None, None, training=True, act="none")
    assert (y - truth).abs().max() <= 2 * (
        reference(x, None, None, training=True, act="none") - truth
    ).abs().max() + 1e-3
    # float32 sums of up to 512 terms to a lane, of squares that are near 1
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)


def test_one_outlier_does_not_spoil_the_variance():
    x = torch.randn(8, 4, 16, 16)
    x[0, :, 0, 0] = 1e4
    var = torch.ones(4)
    batch_norm_act(x, torch.zeros(4), var, training=True, momentum=1.0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3)), rtol=1e-6, atol=0)


def test_zero_variance_gives_bias_and_finite_gradients():
    x = torch.full((4, 3, 5, 5), 7.0, requires_grad=True)
    bias = torch.tensor([1.0, 0.0, -1.0])
    y = batch_norm_act(x, None, None, torch.ones(3), bias, training=True, act="none")
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand_as(y))
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert grad.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-42], ids=["nan", "inf", "denormal"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTS)
def test_special_values_go_where_eager_sends_them(act, training, value):
    x = torch.randn(4, 3, 5, 5)
    x[1, 1, 2, 3] = value

    def results(function):
        leaf, prelu_weight = x.clone().requires_grad_(), torch.full((3,), 0.2, requires_grad=True)
        kind = dict(prelu_weight=prelu_weight) if act == "prelu" else dict(negative_slope=0.2)
        y = function(leaf, torch.zeros(3), torch.ones(3), training=training, act=act, **kind)
        return y, *torch.autograd.grad(y, [leaf, *([prelu_weight] if act == "prelu" else [])], torch.ones_like(y))

    for ours, stock in zip(results(batch_norm_act), results(reference), strict=True):
        torch.testing.assert_close(ours, stock, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_without_eps_a_channel_that_does_not_vary_gives_the_bias_as_in_stock():
    x = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    y = batch_norm_act(x, None, None, torch.ones(3), torch.ones(3), training=True, eps=0.0, act="none")
    assert torch.equal(y, torch.ones_like(y))
    assert not torch.autograd.grad(y.square().sum(), x)[0].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_parameters_with_gaps_give_the_gradients_of_those_without(backend, training, use_backend):
    """Stock's batch norm gives others in channels_last."""
    use_backend(backend)
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=torch.channels_last).requires_grad_()

    def grads(weight, mean, var):
        weight = weight.detach().requires_grad_()
        y = batch_norm_act(x, mean, var, weight, None, training=training, act="relu")
        return torch.autograd.grad(y, (x, weight), torch.linspace(-1, 1, x.numel()).view_as(x))

    parameters = torch.randn(6), torch.randn(6), torch.rand(6) + 0.5
    torch.testing.assert_close(grads(*(t.repeat_interleave(2)[::2] for t in parameters)), grads(*parameters))


@pytest.mark.parametrize("momentum", [0.1, 1.0, torch.tensor(0.25)], ids=str)
def test_running_statistics_move_as_in_stock_torch(momentum):
    x = torch.randn(6, 5, 4, 4) * 3 + 1
    ours, stock = ([torch.full((5,), 2.0), torch.full((5,), 3.0)] for _ in range(2))
    batch_norm_act(x, *ours, training=True, momentum=momentum)
    F.batch_norm(x, *stock, training=True, momentum=float(momentum))
    torch.testing.assert_close(ours, stock)


def test_running_statistics_of_another_dtype_than_x():
    x = torch.randn(6, 5, 4, 4)
    mean, var = torch.zeros(5), torch.ones(5)
    batch_norm_act(x.bfloat16(), mean, var, training=True, momentum=1.0)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, x.bfloat16().float().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    half = torch.zeros(5, dtype=torch.bfloat16), torch.ones(5, dtype=torch.bfloat16)
    batch_norm_act(x.bfloat16(), *half, training=True, momentum=1.0)
    assert torch.equal(half[0], mean.bfloat16())


@pytest.mark.parametrize("training", [True, False])
def test_the_output_keeps_the_layout(training):
    x = torch.randn(2, 6, 4, 4)
    for given in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(2, 6, 3, 4, 4)):
        y = batch_norm_act(given, torch.zeros(6), torch.ones(6), training=training)
        assert y.stride() == given.stride()


def test_any_strides_give_the_same_numbers():
    base = torch.randn(8, 6, 5, 7)
    views = (
        base.transpose(2, 3),
        base[::2],
        base[:, :, 1:4, ::2],
        base[:, :1].expand(8, 6, 5, 7),
        base.permute(0, 2, 1, 3),
    )
    for view in views:
        y = batch_norm_act(view, None, None, training=True)
        torch.testing.assert_close(y, reference(view, None, None, training=True))


def test_an_empty_batch_gives_an_empty_result():
    mean = torch.zeros(3)
    y = batch_norm_act(torch.randn(0, 3, 4, 4), mean, torch.ones(3), training=True)
    assert y.shape == (0, 3, 4, 4) and not mean.any()


@needs_cpp
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_the_number_of_threads(layout):
    inputs = inputs_of((16, 24, 40, 40), torch.float32, LAYOUTS[layout], residual=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(two_orders(with_statistics(batch_norm_act, True, "relu"), leaves(inputs)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a is b is None or torch.equal(a, b)


@needs_cpp
def test_torch_set_num_threads_holds_for_the_kernels():
    from fastgan import _C

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert _C.max_threads() == 3
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_triton_kernels_serve_the_operator(layout, use_backend):
    """Through the interpreter where there is no GPU."""
    use_backend("triton")
    inputs = leaves(inputs_of((2, 3, 2, 3), layout=LAYOUTS[layout], residual=True))
    function = with_statistics(batch_norm_act, True, "leaky_relu")
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_compiled_whole():
    def step(x, mean, var, weight, bias):
        return batch_norm_act(x, mean, var, weight, bias, training=True, act="leaky_relu").square().mean()

    x, weight, bias, *_ = leaves(inputs_of((4, 6, 5, 5), torch.float32))
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        mean, var = torch.zeros(6), torch.ones(6)
        loss = function(x, mean, var, weight, bias)
        results.append([loss, mean, var, *torch.autograd.grad(loss, (x, weight, bias))])
    torch.testing.assert_close(*results)


def test_only_vectors_are_saved_beside_the_input():
    saved = []
    x, weight, bias, *_ = leaves(inputs_of((4, 6, 5, 5), torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        batch_norm_act(x, None, None, weight, bias, training=True)
    assert [t.data_ptr() for t in saved if t.numel() > 6] == [x.data_ptr()]


x4 = torch.randn(2, 3, 4, 4)
BAD = {
    "no tensor": (dict(x=[1.0]), TypeError, "x must be a tensor, not list"),
    "residual no tensor": (dict(residual=1.0), TypeError, "residual must be a tensor, not float"),
    "weight no tensor": (dict(weight=1.0), TypeError, "weight must be a tensor, not float"),
    "integers": (dict(x=torch.ones(2, 3, 4, 4, dtype=torch.int64)), TypeError, "x must be float32"),
    "one dimension": (dict(x=torch.randn(3)), ValueError, "x must have 2 to 5 dimensions"),
    "weight too long": (dict(weight=torch.ones(4)), ValueError, r"weight must have shape \(3,\)"),
    "weight of two dimensions": (dict(weight=torch.ones(3, 1)), ValueError, "weight must have shape"),
    "bias of another dtype": (dict(bias=torch.ones(3).double()), TypeError, "bias must be torch.float32"),
    "weight on another device": (dict(weight=torch.ones(3, device="meta")), ValueError, "weight is on meta"),
    "half of the statistics": (dict(running_var=None), ValueError, "must be given together"),
    "no statistics": (dict(running_mean=None, running_var=None, training=False), ValueError, "needed outside training"),
    "one value": (dict(x=torch.randn(1, 3, 1, 1)), ValueError, "more than 1 value per channel"),
    "unknown act": (dict(act="gelu"), ValueError, "act must be one of none, relu, leaky_relu, prelu, not 'gelu'"),
    "prelu without its weight": (dict(act="prelu"), ValueError, "act 'prelu' needs prelu_weight"),
    "a weight without prelu": (dict(prelu_weight=torch.ones(3)), ValueError, "prelu_weight is for act 'prelu', not"),
    "two slopes": (
        dict(act="prelu", prelu_weight=torch.ones(2)),
        ValueError,
        r"prelu_weight must have shape \(3,\), one",
    ),
    "slope no tensor": (dict(act="prelu", prelu_weight=0.1), TypeError, "prelu_weight must be a tensor, not float"),
    "negative eps": (dict(eps=-1.0), ValueError, "eps must not be negative"),
    "residual of another shape": (dict(residual=torch.randn(2, 3, 4, 5)), ValueError, "residual must have x's shape"),
    "residual of another dtype": (dict(residual=x4.double()), TypeError, "residual must be torch.float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    changes, error, message = BAD[case]
    arguments = dict(x=x4, running_mean=torch.zeros(3), running_var=torch.ones(3), training=True) | changes
    with pytest.raises(error, match=message):
        batch_norm_act(**arguments)


@pytest.mark.parametrize("momentum", [torch.tensor(0.25), torch.tensor([0.25])], ids=["0-d", "one element"])
def test_a_momentum_on_the_device_moves_statistics_of_any_dtype(momentum):
    x = torch.randn(8, 3, 4, 4)
    for dtype in (torch.float32, torch.float64):
        moved, expected = ([torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)] for _ in range(2))
        batch_norm_act(x.to(dtype), *moved, training=True, momentum=momentum)
        reference(x.to(dtype), *expected, training=True, momentum=0.25)
        torch.testing.assert_close(moved, expected)


def test_function_transforms_see_through_the_operator():
    x, weight, bias, *_ = inputs_of((4, 3, 2, 2))

    def score(function, x):
        return with_statistics(function, True, "leaky_relu")(x, weight, bias, None).pow(2).sum()

    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),)), torch.func.hessian):
        ours, stock = (transform(lambda x, f=f: score(f, x))(x) for f in (batch_norm_act, reference))
        torch.testing.assert_close(ours, stock)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.cos())
        tangents = [torch.autograd.forward_ad.unpack_dual(score(f, dual)).tangent for f in (batch_norm_act, reference)]
    torch.testing.assert_close(*tangents)


@needs_cpp
def test_stock_torch_serves_small_tensors_unless_a_backend_is_named(monkeypatch):
    served = []
    kernel = operators.batch_norm_act
    monkeypatch.setattr(operators, "batch_norm_act", lambda *args: served.append(args[0].shape) or kernel(*args))
    small, large = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 1024, 1024)
    for automatic in (True, False):
        monkeypatch.setattr(backend, "is_automatic", lambda: automatic)  # noqa: B023
        for x in (small, large):
            batch_norm_act(x, None, None, training=True)
    assert served == [large.shape, small.shape, large.shape]


def test_what_does_not_lie_in_memory_is_read_through_the_dispatcher():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    y = batch_norm_act(x, None, None, training=True, act="none")
    torch.testing.assert_close(batch_norm_act(torch._neg_view(x), None, None, training=True, act="none"), -y)
    zeros = torch._efficientzerotensor(x.shape, dtype=x.dtype)
    assert not batch_norm_act(zeros, None, None, training=True, act="none").any()


def test_gradients_in_a_batch():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    y = batch_norm_act(x, None, None, training=True)
    cotangents = torch.randn(2, *y.shape, dtype=y.dtype)
    (batched,) = torch.autograd.grad(y, x, cotangents, retain_graph=True, is_grads_batched=True)
    expected = [torch.autograd.grad(y, x, cotangent, retain_graph=True)[0] for cotangent in cotangents]
    torch.testing.assert_close(batched, torch.stack(expected))


@needs_cpp
def test_a_gradient_of_evaluation_is_of_the_statistics_that_it_saw():
    """Stock's is of what training has made of them since."""
    x, mean, var = torch.randn(4, 3, 8, 8, requires_grad=True), torch.zeros(3), torch.full((3,), 4.0)
    y = batch_norm_act(x, mean, var, act="none", eps=0.0)
    batch_norm_act(x.detach() * 9, mean, var, training=True, momentum=0.5)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, torch.full_like(grad, 0.5))
