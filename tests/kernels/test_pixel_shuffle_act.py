"""The Triton kernels of pixel_shuffle_act against its definition in plain torch, differentiated by autograd."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from fastgan_kernels import pixel_shuffle_act
from fastgan_kernels.pixel_shuffle_act import pixel_shuffle_act_backward, pixel_shuffle_act_forward
from torch import Tensor
from torch.nn import functional as F

# The interpreter computes masked elements too, and NaN are put in on purpose: NumPy's warnings say nothing.
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOPE = 0.2
ACTS = ("none", "relu", "leaky_relu", "prelu")
LAYOUTS = {"planes": torch.contiguous_format, "rows": torch.channels_last}
# y's channels, x's pixels, r.
SHAPES = ((2, 3, 3, 5, 2), (1, 66, 1, 2, 2), (2, 1, 3, 17, 3), (1, 5, 2, 1, 4), (2, 2, 4, 4, 1))

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def activated(y: Tensor, act: str, weight: Tensor) -> Tensor:
    functions: dict[str, Callable] = {
        "none": lambda: y,
        "relu": lambda: F.relu(y),
        "leaky_relu": lambda: F.leaky_relu(y, SLOPE),
        "prelu": lambda: F.prelu(y, weight),
    }
    return functions[act]()


def problem(shape, layout="planes", dtype=torch.float64, weights=None) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and grad_y."""
    n, channels, height, width, r = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels * r * r, height, width, generator=generator, dtype=torch.float64)
    grad_y = torch.randn(n, channels, height * r, width * r, generator=generator, dtype=torch.float64)
    x, grad_y = (t.to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout]) for t in (x, grad_y))
    return x, torch.linspace(-0.5, 1.5, weights or channels, dtype=torch.float64).to(DEVICE, dtype), grad_y


@pytest.fixture(params=["whole tiles", "small tiles"])
def tiles(request, monkeypatch):
    """Several programs to a channel, each with several tiles, on tensors that the interpreter can cover."""
    if request.param == "small tiles":
        monkeypatch.setattr(pixel_shuffle_act, "_TILE", 16)
        monkeypatch.setattr(pixel_shuffle_act, "ROW_CHANNELS", 2)
        monkeypatch.setattr(pixel_shuffle_act, "PROGRAMS", 6)
        monkeypatch.setattr(pixel_shuffle_act, "_cached_plan", pixel_shuffle_act._Plan)


@layouts
@pytest.mark.parametrize(("act", "weights"), [*((act, None) for act in ACTS), ("prelu", 1)])
def test_values_and_gradients_are_those_of_the_definition(tiles, act, weights, layout):
    for shape in SHAPES:
        x, weight, grad_y = problem(shape, layout, weights=weights)
        x.requires_grad_()
        weight.requires_grad_()
        expected = activated(F.pixel_shuffle(x, shape[-1]), act, weight)
        gradients = torch.autograd.grad(expected, (x, weight), grad_y, materialize_grads=True, allow_unused=True)
        own_weight = weight.detach() if act == "prelu" else None
        settings = (own_weight, shape[-1], act, SLOPE, True, layout == "rows")
        x = x.detach()
        y = pixel_shuffle_act_forward(x, None, *settings)
        torch.testing.assert_close(y, expected.detach())
        assert y.is_contiguous(memory_format=LAYOUTS[layout])
        sides = {"none": [None], "prelu": [x]}.get(act, [x, y])
        for side in sides:
            found = pixel_shuffle_act_backward(grad_y, x, side, *settings, True, act == "prelu")
            torch.testing.assert_close(found[0], gradients[0])
            assert found[0].is_contiguous(memory_format=LAYOUTS[layout])
            if act == "prelu":
                torch.testing.assert_close(found[1], gradients[1])


@layouts
@pytest.mark.parametrize("fine", [False, True], ids=["side as x", "side as y"])
def test_a_side_of_its_own_and_one_side_only(tiles, fine, layout):
    for shape in SHAPES:
        r = shape[-1]
        x, weight, grad_y = problem(shape, layout)
        side = torch.randn_like(x)
        given = F.pixel_shuffle(side, r) if fine else side
        settings = (given, weight, r, "prelu", SLOPE, False, layout == "rows")
        slopes = weight.repeat_interleave(r * r).view(-1, 1, 1)
        below = torch.where(side > 0, 0, x * slopes)
        torch.testing.assert_close(pixel_shuffle_act_forward(x, *settings), F.pixel_shuffle(below, r))
        coarse = F.pixel_unshuffle(grad_y, r)
        grad_x, grad_weight = pixel_shuffle_act_backward(grad_y, x, *settings, True, True)
        torch.testing.assert_close(grad_x, torch.where(side > 0, 0, coarse * slopes))
        products = torch.where(side > 0, 0, coarse * x).reshape(shape[0], shape[1], -1)
        torch.testing.assert_close(grad_weight, products.sum((0, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@layouts
def test_one_rounding_and_sums_in_float32(layout, dtype):
    x, weight, grad_y = problem((2, 3, 5, 7, 2), layout, dtype)
    settings = (2, "prelu", SLOPE, True, layout == "rows")
    y = pixel_shuffle_act_forward(x, None, weight, *settings)
    exact = pixel_shuffle_act_forward(x.double(), None, weight.double(), *settings)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)
    _, grad_weight = pixel_shuffle_act_backward(grad_y, x, x, weight, *settings, False, True)
    wide = [t.double() for t in (grad_y, x, x, weight)]
    _, exact = pixel_shuffle_act_backward(*wide, *settings, False, True)
    assert grad_weight.dtype == torch.float32
    torch.testing.assert_close(grad_weight.double(), exact, rtol=1e-5, atol=1e-5)


@layouts
@pytest.mark.parametrize("act", ACTS)
def test_nan_and_zero_are_on_torch_s_side(act, layout):
    x, weight, grad_y = problem((1, 2, 2, 3, 2), layout)
    x[0, 1] = torch.tensor([[value, 0.0, -0.0] for value in (float("nan"), float("inf"))])
    own_weight = weight if act == "prelu" else None
    settings = (own_weight, 2, act, SLOPE, True, layout == "rows")
    leaf = x.clone().requires_grad_()
    expected = activated(F.pixel_shuffle(leaf, 2), act, weight)
    torch.testing.assert_close(pixel_shuffle_act_forward(x, None, *settings), expected.detach(), equal_nan=True)
    (grad,) = torch.autograd.grad(expected, leaf, grad_y)
    found, _ = pixel_shuffle_act_backward(grad_y, None, None if act == "none" else x, *settings, True, False)
    torch.testing.assert_close(found, grad, equal_nan=True)


def test_what_is_not_needed_comes_back_empty():
    x, weight, grad_y = problem((2, 3, 5, 7, 2))
    arguments = (grad_y, x, x, weight, 2, "prelu", SLOPE, True, False)
    grad_x, grad_weight = pixel_shuffle_act_backward(*arguments, True, True)
    only_x, nothing = pixel_shuffle_act_backward(*arguments, True, False)
    assert torch.equal(only_x, grad_x) and nothing.numel() == 0
    nothing, only_weight = pixel_shuffle_act_backward(*arguments, False, True)
    assert torch.equal(only_weight, grad_weight) and nothing.numel() == 0


def compiled_cases() -> Iterator[tuple[str, Callable]]:
    def launch(x, weight, grad_y, r, act, rows):
        settings = (weight if act == "prelu" else None, r, act, SLOPE, True, rows)
        y = pixel_shuffle_act_forward(x, None, *settings)
        side = {"none": None, "relu": y}.get(act, x)
        pixel_shuffle_act_backward(grad_y, x, side, *settings, True, act == "prelu")

    for dtype, (layout, r, act) in itertools.product(
        (torch.float32, torch.bfloat16, torch.float64), itertools.product(LAYOUTS, (2, 3), ACTS)
    ):
        given = problem((8, 64, 24, 24, r), layout, dtype)
        yield f"{dtype} {layout} {r} {act}", partial(launch, *given, r, act, layout == "rows")
