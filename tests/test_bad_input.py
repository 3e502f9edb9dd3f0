"""Whatever an operator is given: it does what its definition does, or names the argument that does not fit."""

import functools
import inspect
import math
import os
import re

import numpy as np
import pytest
import torch
from calls import ACT, CONSTANTS, DTYPES, EPS, fitting, tensor, values
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgan import nn, ops, penalties

EXAMPLES = int(os.environ.get("FASTGAN_FUZZ", "80"))
DRAWN = settings(derandomize=EXAMPLES < 1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def spectral_norm(weights, u, v, dims, n_power_iterations, eps):
    """Of one weight."""
    return ops.spectral_norm([weights], [u], [v], [dims], n_power_iterations, eps)[0][0]


def path_length_penalty(mean, weight, decay):
    latents = torch.linspace(-1, 1, 6).view(2, 3).requires_grad_()
    images = latents.square().cumsum(1).view(2, 3, 1, 1)
    return penalties.path_length_penalty(images, latents, mean, weight=weight, decay=decay)


def critic(x):
    return x.square().flatten(1).cumsum(1)


def of_a_critic(penalty):
    return functools.wraps(penalty)(functools.partial(penalty, critic))


RAISE_STOCK_S_ERRORS = {"adaptive_avg_pool2d", "avg_pool2d", "hardtanh", "leaky_relu", "prelu", "relu"}
IMAGES, NUMBER = tensor(2, 4, 5, 6), st.sampled_from([1.0, 10, 0.0, -0.5])
DISTANCE = {"weight": NUMBER, "center": NUMBER, "one_sided": st.booleans(), "create_graph": st.booleans()}
CALLS = {
    **{name: call for name, call in fitting().items() if name not in RAISE_STOCK_S_ERRORS},
    "spectral_norm": {
        "weights": tensor(4, 2, 3), "u": tensor(4), "v": tensor(6), "dims": st.sampled_from([0, -3]),
        "n_power_iterations": st.sampled_from([0, 1, 3]), "eps": EPS,
    },
    "gradient_penalty": {"real": IMAGES, "fake": IMAGES, **DISTANCE},
    "dragan_penalty": {"real": IMAGES, "spread": NUMBER, **DISTANCE},
    "r1_penalty": {"real": IMAGES, "gamma": NUMBER, "create_graph": st.booleans()},
    "r2_penalty": {"fake": IMAGES, "gamma": NUMBER, "create_graph": st.booleans()},
    "path_length_penalty": {"mean": tensor(1), "weight": NUMBER, "decay": NUMBER},
}  # fmt: skip
FUNCTIONS = {name: getattr(ops, name) for name in CALLS if name in ops.__all__}
FUNCTIONS |= {name: of_a_critic(getattr(penalties, name)) for name in CALLS if name not in ops.__all__}
FUNCTIONS |= {"spectral_norm": spectral_norm, "path_length_penalty": path_length_penalty}


def test_every_operator_is_called():
    others = {"setup_filter", "sync_batch_norm_act"}  # of numbers, and of several processes
    assert set(fitting()) | others == set(ops.__all__)


@pytest.mark.parametrize("name", ["weights", "u", "v", "dims"])
@pytest.mark.parametrize("value", [3, torch.ones(2, 3), object()], ids=["a number", "a tensor", "an object"])
def test_a_spectral_norm_of_what_is_no_list_is_refused(name, value):
    given = {"weights": [torch.ones(2, 3)], "u": [torch.ones(2)], "v": [torch.ones(3)], "dims": [0]}
    with pytest.raises(TypeError, match=f"^{name} must be a list"):
        ops.spectral_norm(**given | {name: value})


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda x, size: ops.upfirdn2d(x, None, up=size), "up, down and padding"),
        (lambda x, size: ops.upfirdn2d(x, None, padding=size), "up, down and padding"),
        (lambda x, size: ops.conv2d(x, torch.ones(6, 3, 3, 3), padding=size), "stride, padding and dilation"),
        (lambda x, size: ops.conv_transpose2d(x, torch.ones(3, 6, 3, 3), stride=size), "stride, padding and dilation"),
    ],
    ids=["up", "padding", "padding of a convolution", "stride of a transposed one"],
)
@pytest.mark.parametrize("n", [0, 2])
def test_an_output_that_no_memory_could_hold_is_refused(call, names, n):
    with pytest.raises(ValueError, match=f"^{names} make an output of shape .*, more than any memory"):
        call(torch.ones(n, 3, 5, 5), 2**30)


# ── What may come instead ────────────────────────────────────────────────────────────────────────────────────────────

JUNK = st.sampled_from([
    None, "relu", "", True, -1, 0, 2, 7, 2**31, 2**63, 10**20, 0.5, -0.5, math.nan, math.inf, 1e400, 1j, (), (1, 2, 3), [0],
    (-1, 1), {}, torch.tensor(3), torch.tensor(0.5), torch.zeros(0), torch.float32, object(),
])  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5]), max_size=5).map(tuple)
OTHER_DTYPES = st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.complex64, torch.uint8])


def other_tensor(given):
    """Tensors like a given one but in something."""

    def changed(draw_shape, dtype, change):
        if given.is_sparse:
            return given
        if change == "shape":
            return values(draw_shape, 0).to(given.dtype)
        if change == "dtype":
            return given.to(dtype)
        if change == "meta":
            return given.to("meta")
        if change == "sparse":
            return given if given.is_meta else given.to_sparse()
        if change == "channels_last" and given.dim() == 4:
            return given.contiguous(memory_format=torch.channels_last)
        if change == "transposed" and given.dim() > 1:
            return given.mT.contiguous().mT
        if change == "sliced":
            return given.repeat_interleave(2, -1)[..., ::2] if given.dim() else given
        if change == "expanded" and given.dim():
            return given[:1].expand(given.shape)
        if change == "overlapping" and given.dim():
            return torch.as_strided(given.flatten(), given.shape, [1] * given.dim()) if given.numel() else given
        return special(given, change)

    changes = (
        "shape", "shape", "dtype", "dtype", "meta", "sparse", "channels_last", "transposed", "sliced", "expanded",
        "overlapping", "nan", "inf", "denormal", "huge", "far from zero", "constant",
    )  # fmt: skip
    return st.builds(changed, SHAPES, OTHER_DTYPES, st.sampled_from(changes))


SPECIAL = {"nan": math.nan, "inf": math.inf, "denormal": 1e-40, "huge": 1e30}


def special(given, change):
    flat = given.clone().flatten()
    if change == "far from zero":
        flat = flat + 100
    elif change == "constant":
        flat = torch.full_like(flat, 0.5)
    elif change in SPECIAL and flat.numel() and flat.is_floating_point():
        flat[:: max(1, flat.numel() // 3)] = torch.tensor(SPECIAL[change]).to(flat.dtype)
    return flat.view(given.shape)


class Arguments(dict):
    """Those of a call; hypothesis shows what they are like."""

    def __repr__(self):
        return ", ".join(f"{key}={self._described(value)}" for key, value in self.items())

    @staticmethod
    def _described(value):
        if not isinstance(value, Tensor):
            return repr(value)
        if value.is_sparse:
            return f"<{value.dtype} {tuple(value.shape)}, sparse>"
        values = value.flatten()[:2].tolist() if value.device.type == "cpu" else "…"
        return f"<{value.dtype} {tuple(value.shape)} strides {value.stride()} on {value.device}: {values}>"


@st.composite
def calls(draw, name):
    dtype = draw(st.sampled_from(DTYPES))
    arguments = {key: draw(strategy) for key, strategy in CALLS[name].items()}
    arguments = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    for key in draw(st.lists(st.sampled_from(sorted(arguments)), max_size=2)):
        value = arguments[key]
        if isinstance(value, Tensor) and draw(st.integers(0, 4)):
            arguments[key] = draw(other_tensor(value))
        else:
            arguments[key] = draw(JUNK)
    return Arguments(arguments)


# ── What comes of it ─────────────────────────────────────────────────────────────────────────────────────────────────


def outcome(name, arguments, backend_name, use_backend):
    """(y, gradients), or the error."""
    on_cpu = all(value.device.type == "cpu" for value in arguments.values() if isinstance(value, Tensor))
    use_backend(backend_name if on_cpu else "auto")  # by name there is none for meta tensors
    arguments, leaves = dict(arguments), {}
    for key, value in arguments.items():
        if not isinstance(value, Tensor) or value.device.type != "cpu":
            continue
        if key in CONSTANTS:
            arguments[key] = value.clone()
        elif value.is_floating_point():
            leaves[key] = arguments[key] = value.detach().requires_grad_()
    torch.default_generator.manual_seed(
        0
    )  # torch.manual_seed notes the call stack for CUDA, which takes longer than all else
    y = FUNCTIONS[name](**arguments)
    if y.device.type != "cpu" or not y.requires_grad or not leaves:
        return y, {}
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()), allow_unused=True)
    return y, dict(zip(leaves, grads, strict=True))


def _is_floating(value):
    return isinstance(value, Tensor) and value.is_floating_point()


def is_finite(value):
    return value.device.type != "cpu" or bool(value.isfinite().all())


def assert_agree(found, expected, what):
    assert (found is None) == (expected is None), what
    if found is None:
        return
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device), what
    if found.device.type == "meta":
        return
    tolerance = {torch.float64: 1e-6, torch.float32: 2e-3}.get(expected.dtype, 0.1)
    found, expected = (t if t.is_complex() else t.double() for t in (found, expected))
    ordinary = expected.isfinite() & (expected.abs() < 1e15)
    assert not (ordinary & ~found.isfinite()).any(), f"{what}: not finite where the definition is"
    found, expected = (torch.where(ordinary, t, 0) for t in (found, expected))
    size = expected.abs().max().item() if expected.numel() else 0.0
    assert (found - expected).abs().max().item() <= tolerance * (size + 1) if expected.numel() else True, what


@pytest.mark.parametrize("name", CALLS)
@given(data=st.data())
@settings(DRAWN, max_examples=EXAMPLES)
def test_a_call_does_what_its_definition_does_or_names_the_argument(name, data, use_backend):
    arguments = data.draw(calls(name))
    try:
        y, grads = outcome(name, arguments, "cpp", use_backend)
    except (TypeError, ValueError) as error:
        assert "\n" not in str(error), error
        names = inspect.signature(FUNCTIONS[name]).parameters
        assert re.search(rf"\b({'|'.join(names)})\b", str(error)), error
        return
    others = [value.double() for key, value in arguments.items() if _is_floating(value) and key != "x"]
    if any((value.device.type == "cpu" and not (value.abs() < 1e15).all()) for value in others):
        return  # what comes of infinite weights or statistics is left open, and large ones hide all else
    # In channels_last stock's group norm without eps gives 0 or NaN for what does not vary, depending on its value.
    contiguous = {key: value.contiguous() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    expected, expected_grads = outcome(name, contiguous, "reference", use_backend)
    if y.dtype.itemsize == 2:  # a small difference of large sums is another one there
        wide = {key: value.float() if _is_floating(value) else value for key, value in contiguous.items()}
        expected = outcome(name, wide, "reference", use_backend)[0].to(expected.dtype)
    assert_agree(y, expected, "y")
    overflows = not is_finite(expected) and all(map(is_finite, filter(_is_floating, arguments.values())))
    if y.dtype.itemsize > 2 and not overflows:  # in 16 bits rounding decides on which side of its kink an activation is
        for key, grad in grads.items():
            assert_agree(grad, expected_grads[key], f"gradient of {key}")


@pytest.mark.parametrize("name", [name for name in CALLS if name in fitting()])
@given(data=st.data())
@settings(DRAWN, max_examples=10)
def test_an_integer_of_numpy_s_counts_as_python_s(name, data, use_backend):
    arguments = Arguments({key: data.draw(strategy) for key, strategy in CALLS[name].items()})

    def of_numpy(value):
        if isinstance(value, list | tuple):
            return type(value)(map(of_numpy, value))
        return np.int8(value) if type(value) is int else value

    try:
        expected, _ = outcome(name, arguments, "cpp", use_backend)
    except ValueError:  # a PReLU without its weight, groups of another weight
        reject()
    found, _ = outcome(name, {key: of_numpy(value) for key, value in arguments.items()}, "cpp", use_backend)
    assert torch.equal(found, expected)


# ── Modules ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SLOPES, PRELU = {"act", "negative_slope"}, {"act", "negative_slope", "num_parameters", "init"}
MODULES = {
    "BatchNormAct2d": ((4,), PRELU),
    "Blur": ((), {"kernel", "normalize", "flip_filter", "gain"}),
    "ConvBnAct2d": ((4, 6, 3), PRELU),
    "ConvTransposeBnAct2d": ((4, 6, 3), PRELU),
    "EqualConv2d": ((4, 6, 3), {"gain"}),
    "EqualLinear": ((6, 3), {"gain", "lr_multiplier"}),
    "GradientReversal": ((), {"coeff"}),
    "GroupNormAct": ((2, 4), SLOPES),
    "InstanceNormAct2d": ((4,), SLOPES),
    "LayerNormAct": (((4, 5, 6),), SLOPES),
    "PixelShuffleAct": ((2,), PRELU),
    "ReversedLinear": ((6, 3), {"coeff"}),
    "WarmStartGradientReversal": ((), {"alpha", "lo", "hi", "max_iters", "auto_step"}),
}
"""What makes each, and the arguments that it has besides those of the layer of torch's that it is."""


@pytest.mark.parametrize("name", MODULES)
@given(data=st.data())
@settings(DRAWN, max_examples=EXAMPLES // 4)
def test_a_module_does_what_its_definition_does_or_names_the_argument(name, data, use_backend):
    positional, own = MODULES[name]

    def result(backend_name):
        use_backend(backend_name)
        torch.manual_seed(0)
        module = getattr(nn, name)(*positional, **drawn)
        return module(torch.linspace(-1, 1, 240).view(2, 4, 5, 6).requires_grad_())

    drawn = data.draw(
        st.dictionaries(st.sampled_from(sorted(own)), JUNK | ACT | st.just("prelu"), min_size=1, max_size=2)
    )
    try:
        y = result("cpp")
    except (TypeError, ValueError) as error:
        assert "\n" not in str(error), error
        assert re.search(rf"\b({'|'.join(own)}|prelu_weight|f)\b", str(error)), error
        return
    assert_agree(y, result("reference"), "y")


@pytest.mark.parametrize("value", [None, 3, [0.5]], ids=["nothing", "a number", "a list"])
@pytest.mark.parametrize("name", [*MODULES, "AdaIN", "LayerEpilogue", "NoiseInjection", "StyledConv"])
def test_a_module_says_that_its_input_is_no_tensor(name, value):
    styled = {"AdaIN": (4, 3), "LayerEpilogue": (4, 8, 3), "StyledConv": (4, 4, 8, 3, 3, True)}
    made = getattr(nn, name)(*styled.get(name) or MODULES.get(name, ((4,),))[0])
    w = [torch.ones(2, 3)] if name in styled else []
    with pytest.raises(TypeError, match=r"^x must be a tensor|argument 'input' .* must be Tensor"):
        made(value, *w)


@pytest.mark.parametrize("name", ["AdaIN", "LayerEpilogue"])
def test_a_style_that_is_no_tensor_is_refused(name):
    made = nn.AdaIN(4, 3) if name == "AdaIN" else nn.LayerEpilogue(4, 8, 3)
    with pytest.raises(TypeError, match=r"^w must be a tensor, not NoneType"):
        made(torch.ones(2, 4, 8, 8), None)
