"""The Triton kernels of bias_act against its definition in plain torch, differentiated by autograd in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from fastgan_kernels import bias_act
from fastgan_kernels.bias_act import bias_act_backward, bias_act_double_backward, bias_act_forward
from torch import Tensor
from torch.nn import functional as F

# The interpreter computes masked elements too, and NaN are put in on purpose: NumPy's warnings say nothing.
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALPHA, GAIN = 0.2, 1.5
PIECEWISE_LINEAR = ("linear", "relu", "lrelu")
ACTS = {
    "linear": lambda u: u,
    "relu": F.relu,
    "lrelu": lambda u: F.leaky_relu(u, ALPHA),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "swish": F.silu,
}
NAMES = ("y", "grad_x", "grad_b", "g_grad_y", "g_x", "g_b")
ELEMENTWISE = ("y", "grad_x", "g_grad_y", "g_x")


@dataclass
class Problem:
    """Inputs of all three orders."""

    act: str
    clamp: float | None
    dim: int
    x: Tensor
    b: Tensor | None
    grad_y: Tensor
    ggx: Tensor | None
    ggb: Tensor | None

    @property
    def is_smooth(self) -> bool:
        return self.act not in PIECEWISE_LINEAR

    @property
    def settings(self) -> tuple:
        return self.dim, self.act, ALPHA, GAIN, self.clamp

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def problem(*shape: int, act="swish", clamp=None, dim=1, dtype=torch.float32, rows=False) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    def data() -> Tensor:
        t = normal(*shape)
        return t.movedim(1, -1).contiguous().movedim(-1, 1) if rows else t

    return Problem(act, clamp, dim, 3 * data(), normal(shape[dim]), data(), data(), normal(shape[dim]))


def by_kernels(p: Problem) -> dict[str, Tensor]:
    y = bias_act_forward(p.x, p.b, *p.settings)
    side = (p.x, p.b) if p.is_smooth else (None if p.act == "linear" and p.clamp is None else y, None)
    grads = bias_act_backward(p.grad_y, *side, *p.settings, True, p.b is not None)
    needs = p.is_smooth, p.is_smooth and p.b is not None
    seconds = bias_act_double_backward(p.ggx, p.ggb, p.grad_y, *side, *p.settings, *needs)
    return dict(zip(NAMES, (y, *grads, *seconds), strict=True))


def by_autograd(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    p = p.to(dtype)
    b = p.x.new_zeros(p.x.shape[p.dim]) if p.b is None else p.b
    x, b, grad_y = (t.detach().clone().requires_grad_() for t in (p.x, b, p.grad_y))
    y = ACTS[p.act](x + b.view([-1 if i == p.dim else 1 for i in range(x.dim())])) * GAIN
    y = y if p.clamp is None else F.hardtanh(y, -p.clamp, p.clamp)
    grads = torch.autograd.grad(y, (x, b), grad_y, create_graph=True)
    scalar = sum((g * seed).sum() for g, seed in zip(grads, (p.ggx, p.ggb), strict=True) if seed is not None)
    seconds = torch.autograd.grad(scalar, (grad_y, x, b), materialize_grads=True)
    return dict(zip(NAMES, (t.detach() for t in (y, *grads, *seconds)), strict=True))


def assert_as_exact_as_eager(p: Problem) -> None:
    """Root-mean-square error at most twice that of eager torch in the same dtype, and two rounding steps: the interpreter
    truncates to bfloat16. A sum is given one rounding step of its terms besides: the order of adding is free."""
    ours, truth = by_kernels(p), by_autograd(p, torch.float64)
    eager = by_autograd(p, p.x.dtype)
    for name in NAMES:
        if ours[name].numel() == 0:
            assert name.endswith("_b") or (name == "g_x" and not p.is_smooth)
            continue
        error, peer, size = ((t.double()).square().mean().sqrt() for t in
                             (ours[name] - truth[name], eager[name] - truth[name], truth[name]))  # fmt: skip
        rounding = 2 * torch.finfo(p.x.dtype).eps * (8 if p.x.dtype == torch.float64 else 1)
        terms = 0 if name in ELEMENTWISE else p.x.numel() ** 0.5 * torch.finfo(p.x.dtype).eps
        assert error <= 2 * peer + rounding * size + terms, f"{name}: {error / size:.2e}, eager's {peer / size:.2e}"


@pytest.fixture(params=["whole tiles", "small tiles"])
def tiles(request, monkeypatch):
    """Several programs to a channel, each with several tiles, on tensors that the interpreter can cover."""
    if request.param == "small tiles":
        monkeypatch.setattr(bias_act, "_TILE", 64)
        monkeypatch.setattr(bias_act, "ROW_CHANNELS", 2)
        monkeypatch.setattr(bias_act, "PROGRAMS", 6)
        monkeypatch.setattr(bias_act, "_cached_plan", bias_act._Plan)


layouts = pytest.mark.parametrize("rows", [False, True], ids=["planes", "rows"])


@layouts
@pytest.mark.parametrize("clamp", [None, 1.25])
@pytest.mark.parametrize("act", ACTS)
def test_every_activation_is_as_exact_as_eager(tiles, act, clamp, rows):
    assert_as_exact_as_eager(problem(3, 3, 6, 7, act=act, clamp=clamp, rows=rows))


@pytest.mark.parametrize("act", ["lrelu", "tanh", "selu", "softplus"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_every_dtype_is_as_exact_as_eager(dtype, act):
    assert_as_exact_as_eager(problem(3, 3, 6, 7, act=act, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "dim", "rows"),
    [((40, 3), 1, False), ((40, 3), 0, False), ((7,), 0, False), ((5, 3, 1), 1, False), ((2, 2, 37, 61), 1, False),
     ((3, 4, 5, 6), 2, True), ((3, 4, 5, 6), 0, True), ((2, 3, 2, 3, 5), 1, True), ((3, 1, 70, 70), 1, False)],
    ids=str,
)  # fmt: skip
def test_the_bias_lies_along_any_axis(shape, dim, rows):
    assert_as_exact_as_eager(problem(*shape, dim=dim, rows=rows))


@pytest.mark.parametrize("absent", [("b", "ggb"), ("ggx",), ("ggb",)], ids=" and ".join)
@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
def test_what_may_be_absent(tiles, act, absent):
    assert_as_exact_as_eager(replace(problem(3, 3, 6, 7, act=act), **dict.fromkeys(absent)))


@layouts
def test_the_layout_of_x_is_kept_whatever_that_of_the_gradients(rows):
    p, other = problem(3, 3, 5, 5, rows=rows), problem(3, 3, 5, 5, rows=not rows)
    expected = by_kernels(p)
    for name, result in by_kernels(replace(p, grad_y=other.grad_y, ggx=other.ggx)).items():
        assert torch.equal(result, expected[name]), name
        assert name not in ELEMENTWISE or result.stride() == p.x.stride(), name


def test_what_is_not_needed_comes_back_empty():
    p = problem(3, 3, 6, 7)
    grad_x, grad_b = bias_act_backward(p.grad_y, p.x, p.b, *p.settings, True, True)
    only_x, nothing = bias_act_backward(p.grad_y, p.x, p.b, *p.settings, True, False)
    assert torch.equal(only_x, grad_x) and nothing.numel() == 0
    nothing, only_b = bias_act_backward(p.grad_y, p.x, p.b, *p.settings, False, True)
    assert torch.equal(only_b, grad_b) and nothing.numel() == 0


def compiled_cases() -> Iterator[tuple[str, Callable]]:
    for act in ACTS:
        yield f"float32 {act}", partial(by_kernels, problem(8, 64, 64, 64, act=act, clamp=1.0))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for rows in (False, True):
            for act in ("lrelu", "selu", "softplus"):
                p = problem(8, 64, 32, 32, act=act, rows=rows, dtype=dtype)
                yield f"{dtype} {'rows' if rows else 'planes'} {act}", partial(by_kernels, p)
    # An integer argument of 1 is a constant to the compiler, and an absent tensor no argument.
    yield "bare", partial(by_kernels, replace(problem(1, 1, 200, 200), b=None, ggb=None))
