"""The kernels of adain against its definition in plain torch, differentiated by autograd in float64."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import oracle
import pytest
import torch
import triton
import triton.language as tl
from fastgan_kernels import _units, adain
from fastgan_kernels.adain import adain_backward, adain_double_backward, adain_forward
from oracle import assert_kernels_are_as_exact_as_eager, rms
from torch import Tensor
from torch.nn import functional as F

# The interpreter computes masked elements too, and NaN are put in on purpose: NumPy's warnings say nothing.
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, SLOPE = 1e-3, 0.2
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PARAMETERS = ("scale", "shift", "noise_weight", "bias")
SEEDS = ("ggx", "gg_scale", "gg_shift", "gg_noise_weight", "gg_bias")
OF_STYLE = ("grad_scale", "grad_shift", "g_scale")
OF_CHANNELS = ("grad_noise_weight", "grad_bias", "g_noise_weight", "g_bias")
ELEMENTWISE = ("out", "grad_x", "g_grad_out", "g_x")
FIRST = ("grad_x", "grad_scale", "grad_shift", "grad_noise_weight", "grad_bias")
SECOND = ("g_grad_out", "g_x", "g_scale", "g_noise_weight", "g_bias")


# ------------------------------------------------------------------------------------------- problems and their answers


@dataclass
class Problem:
    """Inputs of all three orders."""

    act: str
    x: Tensor
    scale: Tensor
    shift: Tensor
    noise_weight: Tensor | None
    bias: Tensor | None
    noise: Tensor | None
    grad_out: Tensor
    ggx: Tensor | None
    gg_scale: Tensor | None
    gg_shift: Tensor | None
    gg_noise_weight: Tensor | None
    gg_bias: Tensor | None

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def problem(
    *shape: int,
    act: str = "leaky_relu",
    dtype: torch.dtype = torch.float32,
    rows: bool = False,
    center: float = 0.5,
    shared_noise: bool = False,
    seed: int = 0,
) -> Problem:
    """With `shared_noise`, all samples have the same."""
    generator = torch.Generator().manual_seed(seed)
    n, c, *pixels = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    def data() -> Tensor:
        t = normal(*shape)
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if rows else t

    return Problem(
        act=act,
        x=data() + center,
        scale=normal(n, c),
        shift=normal(n, c),
        noise_weight=normal(c),
        bias=normal(c),
        noise=normal(1 if shared_noise else n, 1, *pixels),
        grad_out=data(),
        ggx=data(),
        gg_scale=normal(n, c),
        gg_shift=normal(n, c),
        gg_noise_weight=normal(c),
        gg_bias=normal(c),
    )


def without(p: Problem, *absent: str) -> Problem:
    """p without these parameters, and the seeds of their gradients."""
    return replace(p, **dict.fromkeys(absent), **{f"gg_{name}": None for name in absent if name in PARAMETERS})


def definition(p: Problem, x: Tensor, scale: Tensor, shift: Tensor, noise_weight: Tensor, bias: Tensor) -> Tensor:
    def over_planes(parameter: Tensor) -> Tensor:
        return parameter.view(*parameter.shape, *[1] * (x.dim() - 2))

    pre = x + over_planes(bias)
    if p.noise is not None:
        pre = x + over_planes(noise_weight) * p.noise + over_planes(bias)
    y = {"none": lambda: pre, "relu": lambda: F.relu(pre), "leaky_relu": lambda: F.leaky_relu(pre, SLOPE)}[p.act]()
    return over_planes(scale) * torch.group_norm(y, y.shape[1], eps=EPS) + over_planes(shift)


def by_autograd(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    p = p.to(dtype)
    channels = p.scale.new_ones(p.x.shape[1])
    noise_weight = channels if p.noise_weight is None else p.noise_weight
    bias = torch.zeros_like(channels) if p.bias is None else p.bias
    inputs = [t.detach().clone().requires_grad_() for t in (p.x, p.scale, p.shift, noise_weight, bias)]
    grad_out = p.grad_out.clone().requires_grad_()
    out = definition(p, *inputs)
    grads = torch.autograd.grad(out, inputs, grad_out, create_graph=True, materialize_grads=True)
    seeds = (getattr(p, name) for name in SEEDS)
    scalar = sum((grad * seed).sum() for grad, seed in zip(grads, seeds, strict=True) if seed is not None)
    x, scale, _, *parameters = inputs
    seconds = torch.autograd.grad(scalar, (grad_out, x, scale, *parameters), materialize_grads=True)
    return dict(zip(("out", *FIRST, *SECOND), (t.detach() for t in (out, *grads, *seconds)), strict=True))


def tensors(p: Problem) -> tuple:
    return p.x, p.scale, p.shift, p.noise_weight, p.bias, p.noise


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return adain_forward(*tensors(p), EPS, p.act, SLOPE)


def saved(p: Problem, mean: Tensor, var: Tensor) -> tuple:
    """The arguments that both backwards have in common."""
    return p.grad_out, *tensors(p), mean, var, EPS, p.act, SLOPE


def by_kernels(p: Problem) -> dict[str, Tensor]:
    """The results, without what comes back empty as there is no such parameter."""
    out, mean, var = forward(p)
    grads = adain_backward(*saved(p, mean, var), True, True, True)
    seconds = adain_double_backward(*(getattr(p, name) for name in SEEDS), *saved(p, mean, var))
    found = dict(zip(("out", *FIRST, *SECOND), (out, *grads, *seconds), strict=True))
    absent = [name for name in ("noise_weight", "bias") if getattr(p, name) is None]
    for name in absent:
        assert not found.pop(f"grad_{name}").numel() and not found.pop(f"g_{name}").numel()
    return found


def assert_as_exact_as_eager(p: Problem) -> None:
    # What a parameter's second gradient sums has the size of grad_out times ggx / sqrt(var).
    plane = math.prod(p.x.shape[2:]) * rms(p.grad_out) * max(1, 1 / rms(p.x - p.x.mean()))
    terms = dict.fromkeys(OF_STYLE, plane) | dict.fromkeys(OF_CHANNELS, plane * p.x.shape[0])
    assert_kernels_are_as_exact_as_eager(by_kernels(p), by_autograd, p, terms)


layouts = pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])


# ------------------------------------------------------------------------------------------------------------ exactness


@layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_is_as_exact_as_eager(programs, rows, dtype):
    assert_as_exact_as_eager(problem(2, 5, 5, 7, rows=rows, dtype=dtype))


@layouts
def test_a_plane_of_several_programs_has_several_tiles_to_each(several_programs, rows):
    p = problem(1, 2, 11, 13, rows=rows)
    plan = _units.plan_of("forward", p.x, 2)
    assert not plan.whole
    assert 1 < plan.splits < plan.reduce_options["tiles"]
    assert_as_exact_as_eager(p)


@layouts
@pytest.mark.parametrize("act", ["none", "relu"])
def test_every_activation_is_as_exact_as_eager(programs, rows, act):
    assert_as_exact_as_eager(problem(2, 3, 4, 5, rows=rows, act=act))


@pytest.mark.parametrize(
    "shape", [(6, 8), (2, 6, 9), (2, 40, 2, 2), (3, 1, 5, 1), (2, 3, 2, 3, 5), (2, 4, 2, 1, 2, 3)], ids=str
)
def test_any_shape_of_two_dimensions_or_more(shape):
    for rows in (False, True) if len(shape) in (4, 5) else (False,):
        assert_as_exact_as_eager(problem(*shape, rows=rows))


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((1, 2, 64, 64), False),  # the largest plane that every order holds whole
        ((1, 2, 91, 93), False),  # one that only the forward does
        ((1, 3, 129, 131), False),  # and one that none does
        ((1, 20, 15, 17), True),
        ((1, 33, 33, 33), True),
    ],
    ids=str,
)
def test_shipped_sizes_of_tiles(shape, rows):
    assert_as_exact_as_eager(problem(*shape, rows=rows))


@layouts
@pytest.mark.parametrize(
    "absent",
    [
        ("noise_weight",),
        ("bias",),
        ("noise_weight", "noise"),
        ("noise_weight", "bias"),
        ("noise_weight", "bias", "noise"),
    ],
    ids=" and ".join,
)
def test_noise_its_weight_and_bias_may_be_absent(programs, absent, rows):
    assert_as_exact_as_eager(without(problem(2, 2, 4, 5, rows=rows), *absent))


@layouts
def test_all_samples_may_share_their_noise(programs, rows):
    p = problem(2, 2, 4, 5, rows=rows, shared_noise=True)
    assert_as_exact_as_eager(p)
    repeated = replace(p, noise=p.noise.repeat(2, 1, 1, 1))
    oracle.assert_same(by_kernels(p), by_kernels(repeated), ("out", *FIRST, *SECOND))


@pytest.mark.parametrize("present", SEEDS)
def test_any_second_order_seed_may_be_absent(programs, present):
    assert_as_exact_as_eager(replace(problem(2, 2, 4, 5), **dict.fromkeys(set(SEEDS) - {present})))


def test_float32_parameters_serve_bfloat16_data():
    p = problem(4, 3, 5, 5, dtype=torch.bfloat16)
    names = (*PARAMETERS, *SEEDS[1:], "noise")
    wide = replace(p, **{name: getattr(p, name).float() for name in names})
    ours = by_kernels(wide)
    oracle.assert_same(ours, by_kernels(p), ELEMENTWISE)
    truth = by_autograd(p, torch.float64)
    for name in (*OF_STYLE, *OF_CHANNELS):
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-5, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- statistics


@layouts
@pytest.mark.parametrize("far", ["x", "noise", "bias"])
def test_statistics_survive_a_huge_mean(programs, rows, far):
    """The mean to a millionth of the deviation: float32 has no such number at 10⁴."""
    p = problem(2, 4, 5, 6, rows=rows, act="relu")
    p = replace(p, x=p.x.round(decimals=2), noise_weight=torch.ones_like(p.bias), noise=p.noise * 0, bias=p.bias * 0)
    getattr(p, far).add_(1e4)
    pre = (p.x + p.noise + p.bias.view(-1, 1, 1)).double()  # as float32 rounds it
    exact_var, exact_mean = torch.var_mean(F.relu(pre), (2, 3), correction=0)
    _, mean, var = forward(p)
    assert mean.dtype == var.dtype == torch.float64
    assert ((mean - exact_mean).abs() <= 1e-6 * exact_var.sqrt()).all()
    torch.testing.assert_close(var, exact_var, rtol=1e-6, atol=0)


@layouts
def test_constant_planes_give_shift_and_finite_gradients(programs, rows):
    p = without(problem(2, 3, 4, 5, rows=rows), "noise_weight", "noise")
    p.x[:] = torch.tensor([0.0, 3.0, -1e4], device=DEVICE)[:, None, None]
    assert not forward(p)[2].any()
    ours = by_kernels(p)
    torch.testing.assert_close(ours["out"], p.shift[:, :, None, None].expand_as(p.x))
    assert all(found.isfinite().all() for found in ours.values())


@pytest.mark.parametrize("shape", [(3, 4, 1, 1), (3, 4), (5, 1)], ids=str)
def test_planes_of_one_element_give_shift_and_gradients_of_exactly_zero(shape):
    p = problem(*shape)
    ours = by_kernels(p)
    assert torch.equal(ours["out"], p.shift.view(shape))
    assert torch.equal(ours["grad_shift"], p.grad_out.view(p.shift.shape))
    assert torch.equal(ours["g_grad_out"], p.gg_shift.view(shape))
    assert not any(ours[name].any() for name in (*FIRST, *SECOND) if name not in ("grad_shift", "g_grad_out"))


# ------------------------------------------------------------------------------------------------ switches, NaN and inf


@layouts
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_a_pre_activation_of_exactly_zero_is_on_the_side_that_torch_puts_it(rows, act):
    p = problem(4, 3, 3, 3, rows=rows, act=act)
    p.x[:] = torch.tensor([-1.0, 0.0, 1.0], device=DEVICE) - 0.5
    p.bias[:], p.noise_weight[:], p.noise[:] = 0.25, 0.5, 0.5
    assert_as_exact_as_eager(p)


@layouts
@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu"])
def test_nan_and_inf_stay_in_their_plane_and_spread_there_as_in_torch(several_programs, rows, act):
    p = problem(2, 3, 4, 5, rows=rows, act=act)
    p.x[1, 1, 2, 3] = torch.nan
    p.x[1, 2, 2, 3] = torch.inf
    ours, eager = by_kernels(p), by_autograd(p, torch.float32)
    assert ours["out"].isnan().flatten(2).any(2).tolist() == [[False, False, False], [False, True, True]]
    for name in ("out", *FIRST):
        torch.testing.assert_close(
            ours[name], eager[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


# ------------------------------------------------------------------------------------------------- memory and contracts


@layouts
def test_any_strides_give_the_result_of_dense_memory(rows):
    p, other = problem(2, 4, 5, 6, rows=rows), problem(2, 4, 5, 6, rows=not rows)
    expected = by_kernels(p)
    mixed = replace(
        p, grad_out=other.grad_out, ggx=other.ggx, scale=p.scale.T.contiguous().T, bias=p.bias.repeat(2)[:4]
    )
    crops = {
        name: F.pad(getattr(p, name), (1, 2, 3, 4))[:, :, 3:-4, 1:-2] for name in ("x", "noise", "grad_out", "ggx")
    }
    for given in (mixed, *[replace(p, **crops)] * (not rows)):
        ours = by_kernels(given)
        oracle.assert_same(ours, expected, ("out", *FIRST, *SECOND))
        for name in ELEMENTWISE:
            assert ours[name].stride() == p.x.stride(), name


def test_expanded_gradients_are_read_right():
    p = problem(3, 3, 5, 5)
    constant = torch.tensor(0.7, device=DEVICE)
    assert_as_exact_as_eager(replace(p, grad_out=constant.expand_as(p.x), gg_scale=constant.expand(3, 3)))


@pytest.mark.parametrize(("wanted", "places"), [("x", [0]), ("style", [1, 2]), ("parameters", [3, 4])])
def test_what_is_not_needed_comes_back_empty(programs, wanted, places):
    p = problem(2, 2, 4, 5)
    _, mean, var = forward(p)
    everything = adain_backward(*saved(p, mean, var), True, True, True)
    needs = [wanted == name for name in ("x", "style", "parameters")]
    for place, grad in enumerate(adain_backward(*saved(p, mean, var), *needs)):
        assert torch.equal(grad, everything[place]) if place in places else grad.numel() == 0


@triton.jit
def offsets_kernel(out, n, p, noise_step, shape, LAYOUT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    at, _ = adain._noise_at(n.to(tl.int64), p.to(tl.int64), noise_step, shape, LAYOUT, HEIGHT, WIDTH)
    tl.store(out + tl.arange(0, HEIGHT)[None, :, None] + tl.arange(0, WIDTH)[None, None, :], at)


@pytest.mark.parametrize(("layout", "tile"), [("planes", (1, 4)), ("rows", (4, 1))])
def test_offsets_of_noise_past_two_to_the_31_are_exact(layout, tile):
    out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    offsets_kernel[(1,)](out, 2**17, 3, 2**16, (8, 2**16, 64), layout, *tile)
    assert out.tolist() == [2**33 + 4 * 3 + i for i in range(4)]


# ---------------------------------------------------------------------------------------------- ahead of time, and CUDA


def compiled_cases() -> Iterator[tuple[str, Callable]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for rows in (False, True):
            layout = "rows" if rows else "planes"
            for shape in ((2, 64, 16, 16), (2, 64, 128, 128)):
                yield f"{dtype} {layout} {shape}", partial(by_kernels, problem(*shape, rows=rows, dtype=dtype))
        yield f"{dtype} planes plane of 64", partial(by_kernels, problem(1, 64, 64, 64, dtype=dtype))
    # An integer argument of 1 is a constant to the compiler, and an absent tensor no argument.
    for shape in ((1, 1, 200, 200), (1, 3, 5), (5, 1)):
        p = without(problem(*shape, act="relu"), "noise_weight", "bias", "noise")
        yield f"bare {shape}", partial(by_kernels, replace(p, gg_scale=None, gg_shift=None))


needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@needs_cuda
@layouts
@pytest.mark.parametrize("side", [16, 160])
def test_a_captured_graph_replays_every_order_bit_for_bit(rows, side):
    p = problem(4, 4, side, side, rows=rows)
    by_kernels(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by_kernels(p)
    p.x.copy_(problem(4, 4, side, side, seed=1).x)
    graph.replay()
    oracle.assert_same(captured, by_kernels(p), ("out", *FIRST, *SECOND))


@needs_cuda
@layouts
def test_data_past_two_to_the_31_elements(rows):
    x = torch.randn(33, 64, 1024, 1024, dtype=torch.bfloat16, device=DEVICE)
    x = x.to(memory_format=torch.channels_last) if rows else x
    scale, shift = torch.randn(2, 33, 64, dtype=torch.bfloat16, device=DEVICE)
    noise = torch.randn(33, 1, 1024, 1024, dtype=torch.bfloat16, device=DEVICE)
    out, _, _ = adain_forward(x, scale, shift, None, None, noise, EPS, "relu", 0.0)
    y = torch.group_norm(F.relu(x[-1:].float() + noise[-1:].float()), 64, eps=EPS)
    expected = scale[-1, :, None, None].float() * y + shift[-1, :, None, None].float()
    torch.testing.assert_close(out[-1:].float(), expected, rtol=2**-7, atol=2**-7)
