"""The kernels of norm_act against its definition in plain torch, differentiated by autograd in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import oracle
import pytest
import torch
import triton
import triton.language as tl
from fastgan_kernels import norm_act
from fastgan_kernels.norm_act import (
    batch_norm_act_backward,
    batch_norm_act_double_backward,
    batch_norm_act_forward,
)
from oracle import assert_kernels_are_as_exact_as_eager, rms
from torch import Tensor
from torch.nn import functional as F

# The interpreter computes masked elements too, and NaN are put in on purpose: NumPy's warnings say nothing.
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, SLOPE = 1e-3, 0.2
ACTS = ("none", "relu", "leaky_relu", "prelu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("y", "grad_x", "grad_weight", "grad_bias", "grad_residual", "g_grad_y", "g_x", "g_weight")
PRELU_NAMES = (*NAMES[:5], "grad_prelu_weight", *NAMES[5:], "g_prelu_weight")
SUMS = ("grad_weight", "grad_bias", "g_weight")
ELEMENTWISE = tuple(name for name in NAMES if name not in SUMS)


# ------------------------------------------------------------------------------------------- problems and their answers


@dataclass
class Problem:
    """Inputs of all three orders. mean and var are those of evaluation; in training both are None."""

    act: str
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    grad_y: Tensor
    ggx: Tensor | None
    ggw: Tensor | None
    ggb: Tensor | None
    ggr: Tensor | None
    prelu_weight: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return PRELU_NAMES if self.act == "prelu" else NAMES

    @property
    def training(self) -> bool:
        return self.mean is None

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def problem(
    *shape: int,
    act: str = "leaky_relu",
    dtype: torch.dtype = torch.float32,
    rows: bool = False,
    training: bool = True,
    center: float = 0.5,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def data() -> Tensor:
        t = normal(*shape).to(dtype).to(DEVICE)
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if rows else t

    def vector(positive: bool = False) -> Tensor:
        t = normal(shape[1])
        return (t.abs() + 0.5 if positive else t).to(dtype).to(DEVICE)

    return Problem(
        act=act,
        x=data() + center,
        weight=vector(),
        bias=vector(),
        residual=data(),
        mean=None if training else vector(),
        var=None if training else vector(positive=True),
        grad_y=data(),
        ggx=data(),
        ggw=vector(),
        ggb=vector(),
        ggr=data(),
        prelu_weight=vector() if act == "prelu" else None,
    )


def definition(
    p: Problem, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, prelu_weight: Tensor | None = None
) -> Tensor:
    pre = F.batch_norm(x, p.mean, p.var, weight, bias, p.training, 0.0, EPS) + residual
    if prelu_weight is not None:
        return F.prelu(pre, prelu_weight)
    return {"none": lambda: pre, "relu": lambda: F.relu(pre), "leaky_relu": lambda: F.leaky_relu(pre, SLOPE)}[p.act]()


def by_autograd(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    p = p.to(dtype)
    channels = p.x.shape[1]
    weight = p.x.new_ones(channels) if p.weight is None else p.weight
    bias = p.x.new_zeros(channels) if p.bias is None else p.bias
    residual = torch.zeros_like(p.x) if p.residual is None else p.residual
    of_act = [] if p.prelu_weight is None else [p.prelu_weight]
    inputs = [t.detach().clone().requires_grad_() for t in (p.x, weight, bias, residual, *of_act)]
    grad_y = p.grad_y.clone().requires_grad_()
    y = definition(p, *inputs)
    grads = torch.autograd.grad(y, inputs, grad_y, create_graph=True)
    seeds = (p.ggx, p.ggw, p.ggb, p.ggr)
    scalar = sum((grad * seed).sum() for grad, seed in zip(grads[:4], seeds, strict=True) if seed is not None)
    seconds = torch.autograd.grad(scalar, (grad_y, *inputs[:2], *inputs[4:]), materialize_grads=True)
    return dict(zip(p.names, (t.detach() for t in (y, *grads, *seconds)), strict=True))


def forward(p: Problem) -> tuple[Tensor, Tensor, Tensor]:
    return batch_norm_act_forward(
        p.x, p.weight, p.bias, p.residual, p.prelu_weight, p.mean, p.var, p.training, EPS, p.act, SLOPE
    )


def saved(p: Problem, mean: Tensor, var: Tensor) -> tuple:
    """The arguments that both backwards have in common."""
    mean, var = (mean, var) if p.training else (p.mean, p.var)
    return p.grad_y, p.x, p.weight, p.bias, p.residual, p.prelu_weight, mean, var, p.training, EPS, p.act, SLOPE


def by_kernels(p: Problem) -> dict[str, Tensor]:
    y, mean, var = forward(p)
    grads = batch_norm_act_backward(*saved(p, mean, var), True, True, True)
    seconds = batch_norm_act_double_backward(p.ggx, p.ggw, p.ggb, p.ggr, *saved(p, mean, var))
    *grads, grad_prelu_weight = grads
    *seconds, g_prelu_weight = seconds
    if p.act == "prelu":
        return dict(zip(PRELU_NAMES, (y, *grads, grad_prelu_weight, *seconds, g_prelu_weight), strict=True))
    assert grad_prelu_weight.numel() == g_prelu_weight.numel() == 0
    return dict(zip(NAMES, (y, *grads, *seconds), strict=True))


def assert_as_exact_as_eager(p: Problem) -> None:
    terms = p.x[:, 0].numel() * rms(p.grad_y)
    sums = (*SUMS, "grad_prelu_weight", "g_prelu_weight")
    assert_kernels_are_as_exact_as_eager(by_kernels(p), by_autograd, p, dict.fromkeys(sums, terms))


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], names: tuple[str, ...] = NAMES) -> None:
    oracle.assert_same(ours, expected, names)


def cut_into_small_tiles(monkeypatch) -> None:
    """Several programs to a channel, each with several tiles, on tensors that the interpreter can cover."""
    monkeypatch.setattr(norm_act, "_TILE", 64)
    monkeypatch.setattr(norm_act, "ROW_CHANNELS", 2)
    monkeypatch.setattr(norm_act, "_TILES_IN_ONE_PROGRAM", 1)
    monkeypatch.setattr(norm_act, "PROGRAMS", 6)
    monkeypatch.setattr(norm_act, "_cached_plan", norm_act._Plan)


@pytest.fixture
def several_programs(monkeypatch):
    cut_into_small_tiles(monkeypatch)


@pytest.fixture(params=["one program", "several programs"])
def programs(request, monkeypatch):
    if request.param == "several programs":
        cut_into_small_tiles(monkeypatch)
    return request.param


layouts = pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


# ------------------------------------------------------------------------------------------------------------ exactness


@layouts
@modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_is_as_exact_as_eager(programs, rows, training, dtype):
    p = problem(3, 3, 6, 7, rows=rows, training=training, dtype=dtype)
    plan = norm_act._plan(p.x, reduces=True)
    assert plan.rows == rows
    assert (1 < plan.splits < plan.options["tiles"]) == (programs == "several programs")
    assert_as_exact_as_eager(p)


@layouts
@modes
@pytest.mark.parametrize("act", ACTS)
def test_every_activation_is_as_exact_as_eager(rows, training, act):
    assert_as_exact_as_eager(problem(4, 3, 5, 5, rows=rows, training=training, act=act))


@layouts
@modes
@pytest.mark.parametrize("count", [1, 3])
def test_a_slope_for_each_channel_or_one_for_all(programs, rows, training, count):
    p = problem(3, 3, 6, 7, rows=rows, training=training, act="prelu")
    assert_as_exact_as_eager(replace(p, prelu_weight=p.prelu_weight[:count]))


@layouts
@pytest.mark.parametrize(
    "shape",
    [(40, 3), (33, 1), (5, 3, 1), (4, 3, 9), (6, 40, 1, 1), (7, 1, 3, 3), (2, 2, 37, 61), (2, 3, 2, 3, 5)],
    ids=str,
)
def test_any_shape_from_two_to_five_dimensions(shape, rows):
    assert_as_exact_as_eager(problem(*shape, rows=rows))


@pytest.mark.parametrize("shape", [(3, 2048), (2, 33, 2, 2)], ids=str)
def test_many_channels(shape):
    assert_as_exact_as_eager(problem(*shape))


def test_more_than_one_tile_of_the_shipped_size():
    p = problem(3, 1, 90, 101)
    assert norm_act._plan(p.x, reduces=True).splits > 1
    assert_as_exact_as_eager(p)


@pytest.mark.parametrize(
    "absent",
    [("residual",), ("weight", "bias"), ("weight",), ("bias",), ("weight", "bias", "residual")],
    ids=" and ".join,
)
@layouts
def test_weight_bias_and_residual_may_be_absent(absent, rows):
    assert_as_exact_as_eager(replace(problem(4, 3, 5, 5, rows=rows), **dict.fromkeys(absent)))


@modes
@pytest.mark.parametrize("present", ["ggx", "ggw", "ggb", "ggr"])
def test_any_second_order_seed_may_be_absent(programs, training, present):
    absent = {"ggx", "ggw", "ggb", "ggr"} - {present}
    assert_as_exact_as_eager(replace(problem(3, 3, 6, 7, training=training), **dict.fromkeys(absent)))


def test_float32_parameters_serve_bfloat16_data():
    p = problem(4, 3, 5, 5, dtype=torch.bfloat16)
    wide = replace(p, weight=p.weight.float(), bias=p.bias.float(), ggw=p.ggw.float(), ggb=p.ggb.float())
    ours, expected = by_kernels(wide), by_kernels(p)
    assert_same(ours, expected, ELEMENTWISE)
    truth = by_autograd(p, torch.float64)
    for name in SUMS:
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- statistics


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    _, mean, var = batch_norm_act_forward(x, None, None, None, None, None, None, True, EPS, "none", 0.0)
    return mean, var


def assert_exact_statistics(x: Tensor) -> None:
    mean, var = statistics(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    rounding = torch.finfo(torch.float32).eps * exact_mean.abs()
    assert ((mean - exact_mean).abs() <= rounding + 1e-6 * exact_var.sqrt()).all()
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-6, atol=0)


@layouts
@pytest.mark.parametrize("center", [1e4, -1e6])
def test_statistics_survive_a_huge_mean(programs, rows, center):
    assert_exact_statistics(problem(3, 3, 6, 7, rows=rows, center=center).x)


@layouts
def test_statistics_survive_a_first_image_unlike_the_others(programs, rows):
    x = problem(6, 3, 6, 7, rows=rows).x
    x[0] += 3e4
    assert_exact_statistics(x)


@layouts
def test_every_order_survives_a_huge_mean(programs, rows):
    assert_as_exact_as_eager(problem(3, 3, 6, 7, rows=rows, center=1e4))


@layouts
def test_constant_channels_have_zero_variance_and_finite_gradients(programs, rows):
    p = problem(3, 3, 6, 7, rows=rows)
    p.x[:] = torch.tensor([0.0, 3.0, -1e4], device=DEVICE)[:, None, None]
    mean, var = statistics(p.x)
    assert mean.tolist() == [0.0, 3.0, -1e4]
    assert var.tolist() == [0.0, 0.0, 0.0]
    assert_as_exact_as_eager(p)


def test_statistics_come_back_in_the_dtype_of_accumulation_and_only_when_computed():
    for dtype, accumulation in zip(DTYPES, (torch.float32,) * 3 + (torch.float64,), strict=True):
        mean, var = statistics(problem(2, 3, 4, dtype=dtype).x)
        assert mean.dtype == var.dtype == accumulation
        _, mean, var = forward(problem(2, 3, 4, dtype=dtype, training=False))
        assert mean.numel() == var.numel() == 0
        assert mean.dtype == var.dtype == accumulation


# ------------------------------------------------------------------------------------------------ switches, NaN and inf


@layouts
@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pre_activation_of_exactly_zero_is_on_the_side_that_torch_puts_it(rows, act, dtype):
    p = problem(4, 3, 3, 3, rows=rows, act=act, dtype=dtype)
    p.x[:] = torch.tensor([-1.0, 0.0, 1.0], device=DEVICE)
    p = replace(p, bias=torch.zeros_like(p.bias), residual=None)
    ours, truth = by_kernels(p), by_autograd(p, torch.float64)
    slope = 0.0 if act == "relu" else SLOPE
    torch.testing.assert_close(ours["grad_residual"][..., 1], p.grad_y[..., 1] * slope, rtol=8e-3, atol=0)
    assert not ours["y"][..., 1].any()
    for name in NAMES:
        size = rms(truth[name])
        assert rms(ours[name] - truth[name]) <= 4 * torch.finfo(dtype).eps * size, name


@layouts
@modes
@pytest.mark.parametrize("act", ["relu", "leaky_relu", "prelu"])
def test_nan_and_inf_spread_as_in_torch(several_programs, rows, training, act):
    p = problem(3, 3, 6, 7, rows=rows, training=training, act=act)
    p.x[1, 1, 2, 3] = torch.nan
    p.x[1, 2, 2, 3] = torch.inf
    ours, eager = by_kernels(p), by_autograd(p, torch.float32)
    assert ours["y"].isnan().any(3).any(2).any(0).tolist() == [False, True, training]
    for name in p.names[: p.names.index("g_grad_y")]:
        torch.testing.assert_close(
            ours[name], eager[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_relu_stops_an_infinite_gradient():
    p = problem(4, 3, 5, 5, act="relu", training=False)
    ours, _, _ = forward(p)
    assert (ours == 0).any()
    p.grad_y[ours == 0] = torch.inf
    assert by_kernels(p)["grad_residual"].isfinite().all()


# ------------------------------------------------------------------------------------------------- memory and contracts


def every_second(dim: int):
    return lambda t: t.repeat_interleave(2, dim).movedim(dim, 0)[::2].movedim(0, dim)


VIEWS = {
    "features of": ((6, 3), every_second(1), False),
    "images of": ((3, 3, 5, 5), every_second(0), False),
    "channels of": ((3, 3, 5, 5), every_second(1), False),
    "a crop of": ((3, 3, 5, 5), lambda t: F.pad(t, (1, 2, 3, 4))[:, :, 3:-4, 1:-2], False),
    "a crop of rows of": (
        (3, 3, 5, 5),
        lambda t: F.pad(t.movedim(1, -1), (0, 0, 1, 2)).movedim(-1, 1)[..., 1:-2],
        True,
    ),
    "a 3-d transpose of": ((3, 3, 7), lambda t: t.mT.contiguous().mT, False),
    "a transpose of": ((3, 3, 5, 5), lambda t: t.mT.contiguous().mT, False),
}


@pytest.mark.parametrize(("shape", "view", "rows"), VIEWS.values(), ids=VIEWS)
def test_any_strides_give_the_result_of_dense_memory(shape, view, rows):
    dense = problem(*shape, rows=rows)
    viewed = replace(dense, **{k: view(getattr(dense, k)) for k in ("x", "residual", "grad_y", "ggx", "ggr")})
    assert viewed.x.stride() != dense.x.stride()
    ours = by_kernels(viewed)
    assert_same(ours, by_kernels(dense))
    for name in ELEMENTWISE:
        assert ours[name].stride() == dense.x.stride(), name


@layouts
@pytest.mark.parametrize("shape", [(3, 3, 5, 5), (2, 3, 2, 3, 2)], ids=str)
def test_operands_of_another_layout_than_x_are_read_right_and_the_layout_of_x_is_kept(shape, rows):
    p, other = problem(*shape, rows=rows), problem(*shape, rows=not rows)
    mixed = replace(p, **{k: getattr(other, k) for k in ("residual", "grad_y", "ggx", "ggr")})
    ours = by_kernels(mixed)
    assert_same(ours, by_kernels(p))
    for name in ELEMENTWISE:
        assert ours[name].stride() == p.x.stride(), name


def test_expanded_gradients_are_read_right():
    p = problem(3, 3, 5, 5)
    constant = torch.tensor(0.7, device=DEVICE)
    assert_as_exact_as_eager(replace(p, grad_y=constant.expand_as(p.x), ggw=constant.expand(3)))


@modes
@pytest.mark.parametrize(("wanted", "places"), [("x", [0]), ("params", [1, 2, 4]), ("residual", [3])])
def test_what_is_not_needed_comes_back_empty(programs, training, wanted, places):
    p = problem(3, 3, 6, 7, training=training, act="prelu")
    _, mean, var = forward(p)
    everything = batch_norm_act_backward(*saved(p, mean, var), True, True, True)
    needs = [wanted == name for name in ("x", "params", "residual")]
    for place, grad in enumerate(batch_norm_act_backward(*saved(p, mean, var), *needs)):
        assert torch.equal(grad, everything[place]) if place in places else grad.numel() == 0


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0), (2, 0, 4)], ids=str)
def test_empty_data_give_empty_results_and_zero_sums(shape):
    results = by_kernels(problem(*shape, training=False))
    for name in NAMES:
        if name in SUMS:
            assert torch.equal(results[name].cpu(), torch.zeros(shape[1])), name
        else:
            assert results[name].shape == shape, name


@triton.jit
def offsets_kernel(out, t, group, shape, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    at, _ = norm_act.tile(t, group, shape, ROWS, HEIGHT, WIDTH)
    tl.store(out + tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], at)


@pytest.mark.parametrize(
    ("rows", "t", "group", "shape", "first"),
    [
        (True, 2**29, 5, (2**32, 96, 1), 2**29 * 2 * 96 + 5 * 4),
        (False, 2**21 * 3 + 2, 7, (2**23, 64, 12), (2**22 * 64 + 7) * 12 + 8),
    ],
    ids=["rows", "planes"],
)
def test_offsets_past_two_to_the_31_are_exact(rows, t, group, shape, first):
    out = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    offsets_kernel[(1,)](out, t, group, shape, rows, 2, 4)
    step = 96 if rows else 64 * 12
    assert out.tolist() == [[first + row * step + col for col in range(4)] for row in range(2)]


# ---------------------------------------------------------------------------------------------- ahead of time, and CUDA


def compiled_cases() -> Iterator[tuple[str, Callable]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for rows in (False, True):
            for programs, shape in (("several", (8, 64, 64, 64)), ("one", (16, 64, 8, 4))):
                # What "prelu" adds is the same in every dtype.
                for act in ("leaky_relu", "prelu") if dtype == torch.float32 else ("leaky_relu",):
                    case = f"{dtype} {'rows' if rows else 'planes'} {programs} {act}"
                    yield case, partial(by_kernels, problem(*shape, rows=rows, dtype=dtype, act=act))
    # An integer argument of 1 is a constant to the compiler, and an absent tensor no argument.
    for shape in ((1, 1, 200, 200), (1, 3, 5), (5, 1)):
        p = problem(*shape, act="relu", training=shape != (1, 3, 5))
        p = replace(p, weight=None, bias=None, residual=None, ggw=None, ggb=None, ggr=None)
        yield f"bare {shape}", partial(by_kernels, p)


needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@needs_cuda
@layouts
def test_a_captured_graph_replays_every_order_bit_for_bit(rows):
    p = problem(8, 64, 64, 64, rows=rows)
    by_kernels(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by_kernels(p)
    p.x.copy_(problem(8, 64, 64, 64, seed=1).x)
    graph.replay()
    assert_same(captured, by_kernels(p))


@needs_cuda
@layouts
def test_data_past_two_to_the_31_elements(rows):
    x = torch.randn(33, 64, 1024, 1024, dtype=torch.bfloat16, device=DEVICE)
    x = x.to(memory_format=torch.channels_last) if rows else x
    y, mean, var = batch_norm_act_forward(x, None, None, None, None, None, None, True, EPS, "relu", 0.0)
    expected = F.relu(F.batch_norm(x[-1:].float(), mean, var, eps=EPS))
    torch.testing.assert_close(y[-1:].float(), expected, rtol=2**-8, atol=2**-8)
