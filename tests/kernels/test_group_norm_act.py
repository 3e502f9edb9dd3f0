"""The kernels of group_norm_act against its definition in plain torch, differentiated by autograd in float64."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import oracle
import pytest
import torch
import triton
import triton.language as tl
from fastgan_kernels import _units, group_norm_act
from fastgan_kernels.group_norm_act import (
    group_norm_act_backward,
    group_norm_act_double_backward,
    group_norm_act_forward,
)
from oracle import assert_kernels_are_as_exact_as_eager, rms
from torch import Tensor
from torch.nn import functional as F

# The interpreter computes masked elements too, and NaN are put in on purpose: NumPy's warnings say nothing.
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, SLOPE = 1e-3, 0.2
ACTS = ("none", "relu", "leaky_relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("y", "grad_x", "grad_weight", "grad_bias", "grad_residual", "g_grad_y", "g_x", "g_weight")
SUMS = ("grad_weight", "grad_bias", "g_weight")
ELEMENTWISE = tuple(name for name in NAMES if name not in SUMS)


# ------------------------------------------------------------------------------------------- problems and their answers


@dataclass
class Problem:
    """Inputs of all three orders."""

    groups: int
    act: str
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    grad_y: Tensor
    ggx: Tensor | None
    ggw: Tensor | None
    ggb: Tensor | None
    ggr: Tensor | None

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def problem(
    *shape: int,
    groups: int = 1,
    elements: bool = False,
    act: str = "leaky_relu",
    dtype: torch.dtype = torch.float32,
    rows: bool = False,
    center: float = 0.5,
    seed: int = 0,
) -> Problem:
    """With `elements`, every element of a sample has its own weight and bias, as in layer norm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def data() -> Tensor:
        t = normal(*shape).to(dtype).to(DEVICE)
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if rows else t

    def parameter() -> Tensor:
        return normal(*(shape[1:] if elements else shape[1:2])).to(dtype).to(DEVICE)

    return Problem(
        groups=groups,
        act=act,
        x=data() + center,
        weight=parameter(),
        bias=parameter(),
        residual=data(),
        grad_y=data(),
        ggx=data(),
        ggw=parameter(),
        ggb=parameter(),
        ggr=data(),
    )


def definition(p: Problem, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    if weight.dim() > 1:
        pre = F.layer_norm(x, x.shape[1:], weight, bias, EPS) + residual
    else:
        pre = torch.group_norm(x, p.groups, weight, bias, EPS) + residual
    return {"none": lambda: pre, "relu": lambda: F.relu(pre), "leaky_relu": lambda: F.leaky_relu(pre, SLOPE)}[p.act]()


def by_autograd(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    p = p.to(dtype)
    given = next((t for t in (p.weight, p.bias) if t is not None), p.x[0].reshape(p.x.shape[1], -1)[:, 0])
    weight = torch.ones_like(given) if p.weight is None else p.weight
    bias = torch.zeros_like(given) if p.bias is None else p.bias
    residual = torch.zeros_like(p.x) if p.residual is None else p.residual
    inputs = [t.detach().clone().requires_grad_() for t in (p.x, weight, bias, residual)]
    grad_y = p.grad_y.clone().requires_grad_()
    y = definition(p, *inputs)
    grads = torch.autograd.grad(y, inputs, grad_y, create_graph=True)
    seeds = (p.ggx, p.ggw, p.ggb, p.ggr)
    scalar = sum((grad * seed).sum() for grad, seed in zip(grads, seeds, strict=True) if seed is not None)
    seconds = torch.autograd.grad(scalar, (grad_y, *inputs[:2]), materialize_grads=True)
    return dict(zip(NAMES, (t.detach() for t in (y, *grads, *seconds)), strict=True))


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return group_norm_act_forward(p.x, p.weight, p.bias, p.residual, p.groups, EPS, p.act, SLOPE)


def saved(p: Problem, mean: Tensor, var: Tensor) -> tuple:
    """The arguments that both backwards have in common."""
    return p.grad_y, p.x, p.weight, p.bias, p.residual, mean, var, EPS, p.act, SLOPE


def by_kernels(p: Problem) -> dict[str, Tensor]:
    y, mean, var = forward(p)
    grads = group_norm_act_backward(*saved(p, mean, var), True, True, True)
    seconds = group_norm_act_double_backward(p.ggx, p.ggw, p.ggb, p.ggr, *saved(p, mean, var))
    return dict(zip(NAMES, (y, *grads, *seconds), strict=True))


def assert_as_exact_as_eager(p: Problem) -> None:
    # What a weight's gradient sums has the size of grad_y times ggx / sqrt(var).
    terms = p.x.shape[0] * rms(p.grad_y) * max(1, 1 / rms(p.x - p.x.mean()))
    if p.weight is None or p.weight.dim() == 1:
        terms *= math.prod(p.x.shape[2:])
    assert_kernels_are_as_exact_as_eager(by_kernels(p), by_autograd, p, dict.fromkeys(SUMS, terms))


layouts = pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
NORMS = {"group": dict(groups=2), "instance": dict(groups=4), "layer": {}, "layer of elements": dict(elements=True)}
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


# ------------------------------------------------------------------------------------------------------------ exactness


@layouts
@norms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_is_as_exact_as_eager(rows, norm, dtype):
    assert_as_exact_as_eager(problem(3, 4, 5, 7, rows=rows, dtype=dtype, **norm))


@layouts
@norms
def test_units_of_several_programs_are_as_exact_as_eager(several_programs, rows, norm):
    p = problem(3, 4, 5, 7, rows=rows, **norm)
    plan = group_norm_act._plan("forward", p.x, p.groups, p.weight)
    assert not plan.whole
    assert 1 < plan.splits < plan.reduce_options["tiles"] or norm == NORMS["instance"]
    assert_as_exact_as_eager(p)


@layouts
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("elements", [False, True], ids=["channels", "elements"])
def test_every_activation_is_as_exact_as_eager(rows, act, elements):
    assert_as_exact_as_eager(problem(4, 3, 5, 5, rows=rows, act=act, elements=elements))


SHAPES = [
    ((6, 8), 2),
    ((5, 7), 1),
    ((33, 1, 3), 1),
    ((2, 6, 9), 3),
    ((2, 40, 2, 2), 40),
    ((3, 6, 1, 1), 2),
    ((2, 12, 3, 3), 4),
    ((2, 3, 2, 3, 5), 3),
    ((2, 4, 2, 1, 2, 3), 2),
]


@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_any_shape_of_two_dimensions_or_more(shape, groups):
    for rows in (False, True) if len(shape) in (4, 5) else (False,):
        assert_as_exact_as_eager(problem(*shape, groups=groups, rows=rows))
        assert_as_exact_as_eager(problem(*shape, elements=True, rows=rows))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 2, 64, 64), dict(groups=2)),  # the largest plane that every order holds whole
        ((1, 2, 91, 93), dict(groups=2)),  # one that only the forward does
        ((1, 3, 129, 131), dict(groups=3)),  # and one that none does
        ((2, 3, 70, 70), dict(elements=True)),
        ((2, 40, 33, 31), dict(groups=2, rows=True)),
        ((1, 48, 40, 41), dict(groups=48, rows=True)),
    ],
    ids=str,
)
def test_shipped_sizes_of_tiles(shape, options):
    assert_as_exact_as_eager(problem(*shape, **options))


@pytest.mark.parametrize(
    "absent",
    [("residual",), ("weight", "bias"), ("weight",), ("bias",), ("weight", "bias", "residual")],
    ids=" and ".join,
)
@pytest.mark.parametrize("elements", [False, True], ids=["channels", "elements"])
def test_weight_bias_and_residual_may_be_absent(absent, elements):
    p = replace(problem(4, 3, 5, 5, elements=elements), **dict.fromkeys(absent))
    if p.weight is None and p.bias is None:
        p = replace(p, ggw=None, ggb=None)
    assert_as_exact_as_eager(p)


@pytest.mark.parametrize("present", ["ggx", "ggw", "ggb", "ggr"])
@pytest.mark.parametrize("elements", [False, True], ids=["channels", "elements"])
def test_any_second_order_seed_may_be_absent(several_programs, elements, present):
    absent = {"ggx", "ggw", "ggb", "ggr"} - {present}
    assert_as_exact_as_eager(replace(problem(2, 2, 4, 5, elements=elements), **dict.fromkeys(absent)))


@pytest.mark.parametrize("elements", [False, True], ids=["channels", "elements"])
def test_float32_parameters_serve_bfloat16_data(elements):
    p = problem(4, 3, 5, 5, dtype=torch.bfloat16, elements=elements)
    wide = replace(p, weight=p.weight.float(), bias=p.bias.float(), ggw=p.ggw.float(), ggb=p.ggb.float())
    ours = by_kernels(wide)
    oracle.assert_same(ours, by_kernels(p), ELEMENTWISE)
    truth = by_autograd(p, torch.float64)
    for name in SUMS:
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- statistics


def assert_exact_statistics(p: Problem) -> None:
    _, mean, var = forward(p)
    units = p.x.double().reshape(p.x.shape[0], p.groups, -1)
    exact_var, exact_mean = torch.var_mean(units, -1, correction=0)
    assert mean.dtype == var.dtype == torch.float64
    assert ((mean - exact_mean).abs() <= 1e-6 * exact_var.sqrt()).all()
    torch.testing.assert_close(var, exact_var, rtol=1e-6, atol=0)


@layouts
@norms
def test_statistics_survive_a_huge_mean(programs, rows, norm):
    """The mean to a millionth of the deviation: float32 has no such number at 10⁴."""
    assert_exact_statistics(problem(2, 4, 5, 6, rows=rows, center=1e4, **norm))


@layouts
def test_statistics_survive_a_first_channel_unlike_the_others(programs, rows):
    p = problem(2, 4, 6, 7, rows=rows)
    p.x[:, 0] += 3e4
    p.x[:, :, 0] -= 1e4
    assert_exact_statistics(p)


@layouts
@norms
def test_every_order_survives_a_huge_mean(rows, norm):
    """Where eager torch rounds the mean to float32, which costs it three digits."""
    p = problem(2, 4, 5, 6, rows=rows, center=1e4, **norm)
    ours, truth = by_kernels(p), by_autograd(p, torch.float64)
    for name in NAMES:
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m)


@layouts
def test_constant_units_give_bias_and_finite_gradients(programs, rows):
    p = problem(2, 3, 4, 5, groups=3, rows=rows)
    p.x[:] = torch.tensor([0.0, 3.0, -1e4], device=DEVICE)[:, None, None]
    _, mean, var = forward(p)
    assert mean.tolist() == [[0.0, 3.0, -1e4]] * 2
    assert not var.any()
    assert_as_exact_as_eager(p)


@pytest.mark.parametrize("eps", [EPS, 0.0])
def test_units_of_one_element_give_bias_and_no_gradient(eps):
    p = replace(problem(3, 4, 1, 1, groups=4, act="none"), residual=None)
    y, mean, var = group_norm_act_forward(p.x, p.weight, p.bias, None, 4, eps, "none", 0.0)
    assert torch.equal(y, p.bias.view(4, 1, 1).expand_as(y))
    common = (p.grad_y, p.x, p.weight, p.bias, None, mean, var, eps, "none", 0.0)
    grad_x, grad_weight, _, _ = group_norm_act_backward(*common, True, True, False)
    _, g_x, g_weight = group_norm_act_double_backward(p.ggx, p.ggw, p.ggb, None, *common)
    assert not grad_x.any() and not grad_weight.any() and not g_x.any() and not g_weight.any()


# ------------------------------------------------------------------------------------------------ switches, NaN and inf


@layouts
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
@pytest.mark.parametrize("elements", [False, True], ids=["channels", "elements"])
def test_a_pre_activation_of_exactly_zero_is_on_the_side_that_torch_puts_it(rows, act, elements):
    p = problem(4, 3, 3, 3, rows=rows, act=act, elements=elements)
    p.x[:] = torch.tensor([-1.0, 0.0, 1.0], device=DEVICE)
    ours = by_kernels(replace(p, bias=torch.zeros_like(p.bias), residual=None))
    slope = 0.0 if act == "relu" else SLOPE
    assert not ours["y"][..., 1].any()
    torch.testing.assert_close(ours["grad_residual"][..., 1], p.grad_y[..., 1] * slope)


@layouts
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
def test_nan_and_inf_stay_in_their_unit_and_spread_there_as_in_torch(several_programs, rows, act):
    p = problem(2, 3, 4, 5, groups=3, rows=rows, act=act)
    p.x[1, 1, 2, 3] = torch.nan
    p.x[1, 2, 2, 3] = torch.inf
    ours, eager = by_kernels(p), by_autograd(p, torch.float32)
    assert ours["y"].isnan().flatten(2).any(2).tolist() == [[False, False, False], [False, True, True]]
    for name in ("y", "grad_x", "grad_weight", "grad_bias", "grad_residual"):
        torch.testing.assert_close(
            ours[name], eager[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


# ------------------------------------------------------------------------------------------------- memory and contracts


@layouts
@norms
def test_any_strides_give_the_result_of_dense_memory(rows, norm):
    p, other = problem(2, 4, 5, 6, rows=rows, **norm), problem(2, 4, 5, 6, rows=not rows, **norm)
    expected = by_kernels(p)
    mixed = replace(p, **{k: getattr(other, k) for k in ("residual", "grad_y", "ggx", "ggr")})
    crops = {k: F.pad(getattr(p, k), (1, 2, 3, 4))[:, :, 3:-4, 1:-2] for k in ("x", "residual", "grad_y", "ggx", "ggr")}
    for given in (mixed, *[replace(p, **crops)] * (not rows)):
        ours = by_kernels(given)
        oracle.assert_same(ours, expected, NAMES)
        for name in ELEMENTWISE:
            assert ours[name].stride() == p.x.stride(), name


def test_expanded_gradients_are_read_right():
    p = problem(3, 3, 5, 5)
    constant = torch.tensor(0.7, device=DEVICE)
    assert_as_exact_as_eager(replace(p, grad_y=constant.expand_as(p.x), ggw=constant.expand(3)))


@pytest.mark.parametrize("elements", [False, True], ids=["channels", "elements"])
@pytest.mark.parametrize(("wanted", "places"), [("x", [0]), ("params", [1, 2]), ("residual", [3])])
def test_what_is_not_needed_comes_back_empty(programs, elements, wanted, places):
    p = problem(2, 2, 4, 5, elements=elements)
    _, mean, var = forward(p)
    everything = group_norm_act_backward(*saved(p, mean, var), True, True, True)
    needs = [wanted == name for name in ("x", "params", "residual")]
    for place, grad in enumerate(group_norm_act_backward(*saved(p, mean, var), *needs)):
        assert torch.equal(grad, everything[place]) if place in places else grad.numel() == 0


@triton.jit
def offsets_kernel(out, k, p, n, group, shape, LAYOUT: tl.constexpr):
    at, _ = _units.tile_at(
        n.to(tl.int64), group.to(tl.int64) + tl.arange(0, 1)[:, None, None], k.to(tl.int64), p.to(tl.int64), shape,
        LAYOUT, 8, 2, 4,
    )  # fmt: skip
    tl.store(out + tl.arange(0, 2)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :], at)


@pytest.mark.parametrize(
    ("layout", "first", "step"),
    [
        ("planes", ((2**14 * 64 + 5 * 8 + 2 * 1) * 2**16 + 4 * 3), 2**16),
        ("rows", (2**14 * 2**16 + 2 * 3) * 64 + 5 * 8 + 4 * 1, 64),
    ],
)
def test_offsets_past_two_to_the_31_are_exact(layout, first, step):
    out = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    offsets_kernel[(1,)](out, 1, 3, 2**14, 5, (8, 2**16, 64), layout)
    assert out.tolist() == [[first + row * step + col for col in range(4)] for row in range(2)]


# ---------------------------------------------------------------------------------------------- ahead of time, and CUDA


def compiled_cases() -> Iterator[tuple[str, Callable]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for rows in (False, True):
            layout = "rows" if rows else "planes"
            for shape in ((2, 64, 16, 16), (2, 64, 128, 128)):
                # What several units to a tile add is the same in every dtype.
                for groups in (8, 64) if dtype == torch.float32 else (8,):
                    p = problem(*shape, rows=rows, dtype=dtype, groups=groups)
                    yield f"{dtype} {layout} {groups} {shape}", partial(by_kernels, p)
        for shape in ((8, 16, 16, 16), (8, 64, 32, 32)):
            yield f"{dtype} elements {shape}", partial(by_kernels, problem(*shape, elements=True, dtype=dtype))
        yield f"{dtype} planes plane of 64", partial(by_kernels, problem(1, 64, 64, 64, groups=64, dtype=dtype))
    # An integer argument of 1 is a constant to the compiler, and an absent tensor no argument.
    for shape in ((1, 1, 200, 200), (1, 3, 5), (5, 1)):
        p = replace(problem(*shape, act="relu"), weight=None, bias=None, residual=None, ggw=None, ggb=None, ggr=None)
        yield f"bare {shape}", partial(by_kernels, p)


needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@needs_cuda
@layouts
@norms
@pytest.mark.parametrize("side", [16, 160])
def test_a_captured_graph_replays_every_order_bit_for_bit(rows, norm, side):
    p = problem(4, 4, side, side, rows=rows, **norm)
    by_kernels(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by_kernels(p)
    p.x.copy_(problem(4, 4, side, side, seed=1, **norm).x)
    graph.replay()
    oracle.assert_same(captured, by_kernels(p), NAMES)


@needs_cuda
@layouts
@pytest.mark.parametrize("groups", [1, 64])
def test_data_past_two_to_the_31_elements(rows, groups):
    x = torch.randn(33, 64, 1024, 1024, dtype=torch.bfloat16, device=DEVICE)
    x = x.to(memory_format=torch.channels_last) if rows else x
    y, _, _ = group_norm_act_forward(x, None, None, None, groups, EPS, "relu", 0.0)
    expected = F.relu(torch.group_norm(x[-1:].float(), groups, eps=EPS))
    torch.testing.assert_close(y[-1:].float(), expected, rtol=2**-8, atol=2**-8)
