"""The kernels of conv against torch's own convolutions, differentiated by autograd in float64."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from fastgan_kernels import _norm, conv
from fastgan_kernels.conv import TILES, WEIGHT_TILES, Tile, convolution, convolution_moments, convolution_weight_grad
from oracle import assert_kernels_are_as_exact_as_eager, rms
from torch import Tensor, nn
from torch.nn import functional as F

import fastgan
from fastgan import chains
from fastgan.ops import _autotune, _conv_cuda, conv_norm_act
from fastgan.ops._kernels import KERNELS
from fastgan.ops.conv_norm_act import _Form

# The interpreter computes masked elements too: NumPy's warnings say nothing.
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, SLOPE = 1e-3, 0.2
# kernel, stride, padding, output_padding; and an x of an odd size, channels that fill no tile, or one image.
LAYERS = {
    "k4 s2 p1": ((4, 2, 1, 0), (3, 5, 17, 3, 2)),
    "k3 s2 p1 op1": ((3, 2, 1, 1), (1, 18, 5, 3, 3)),
    "k4 s1 p0 from 1×1": ((4, 1, 0, 0), (3, 6, 5, 1, 1)),
    "k3 s1 p1": ((3, 1, 1, 0), (2, 3, 4, 3, 3)),
    "k2 s3 p0 op1": ((2, 3, 0, 1), (1, 2, 3, 2, 2)),  # a phase without taps
    "k5 s2 p2 to an odd size": ((5, 2, 2, 0), (1, 3, 2, 3, 2)),
}


@dataclass
class Problem:
    """A transposed convolution from x to y, and the convolution back."""

    layer: tuple[int, int, int, int]
    x: Tensor
    weight: Tensor
    bias: Tensor
    grad_y: Tensor
    before: tuple | None = None

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        before = self.before and tuple(v.to(dtype) if isinstance(v, Tensor) else v for v in self.before)
        return replace(self, **tensors, before=before)

    @property
    def settings(self) -> tuple:
        _, stride, padding, output_padding = self.layer
        return (stride,) * 2, (padding,) * 2, True, (output_padding,) * 2


def problem(
    layer: str, dtype: torch.dtype = torch.float32, act: str | None = None, center: float = 0.0, shape: tuple = ()
) -> Problem:
    settings, given = LAYERS[layer]
    kernel, stride, padding, output_padding = settings
    n, inputs, outputs, height, width = shape or given
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    def rows(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last)

    before = None
    if act is not None:
        mean, weight, bias, slopes = (normal(inputs).float() for _ in range(4))
        before = (mean + center, weight.abs() + 0.5, weight, bias, slopes if act == "prelu" else None, EPS, act, SLOPE)
    size = [(s - 1) * stride - 2 * padding + kernel + output_padding for s in (height, width)]
    return Problem(
        settings,
        rows(normal(n, inputs, height, width) + center),
        normal(inputs, outputs, kernel, kernel),
        normal(outputs),
        rows(normal(n, outputs, *size)),
        before,
    )


def by_autograd(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    p = p.to(dtype)
    x = p.x
    if p.before is not None:
        mean, var, weight, bias, slopes, eps, act, slope = p.before
        x = F.batch_norm(x, mean, var, weight, bias, eps=eps)
        slopes = {
            "none": x.new_ones(1),
            "relu": x.new_zeros(1),
            "leaky_relu": x.new_full((1,), slope),
            "prelu": slopes,
        }[act]
        x = F.prelu(x, slopes)
    x, weight, bias = (t.detach().clone().requires_grad_() for t in (x, p.weight, p.bias))
    stride, padding, _, output_padding = p.settings
    y = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), p.grad_y)
    without = (y - bias.view(-1, 1, 1)).detach()
    var, mean = torch.var_mean(without, (0, 2, 3), correction=0)
    found = {"y": y, "without bias": without, "mean": mean, "var": var, "grad_x": grad_x, "grad_weight": grad_weight}
    return {name: t.detach() for name, t in found.items()}


def by_kernels(p: Problem, tile: str, weight_tile: str, allow_tf32: bool = False) -> dict[str, Tensor]:
    stride, padding, _, _ = p.settings
    y = convolution(p.x, p.weight, p.bias, *p.settings, tile, allow_tf32, p.before)
    without, mean, var = convolution_moments(p.x, p.weight, *p.settings, tile, allow_tf32, p.before)
    grad_x = convolution(p.grad_y, p.weight, None, stride, padding, False, (0, 0), tile, allow_tf32)
    grad_weight = convolution_weight_grad(
        p.grad_y, p.x, p.weight.shape, stride, padding, True, weight_tile, allow_tf32, p.before
    )
    return {"y": y, "without bias": without, "mean": mean, "var": var, "grad_x": grad_x, "grad_weight": grad_weight}


def assert_as_exact_as_eager(p: Problem, ours: dict[str, Tensor]) -> None:
    # A mean may be small beside what it is of, each of which has been rounded.
    terms = {"mean": 4 * rms(ours["without bias"])} if "mean" in ours else {}
    assert_kernels_are_as_exact_as_eager(ours, by_autograd, p, terms)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles, blocks and splits of tensors that the interpreter can cover. A depth of 16 is the least on a GPU."""
    for tiles in (TILES, WEIGHT_TILES):
        monkeypatch.setitem(tiles, "small", Tile(16, 16, 32, 2))
    monkeypatch.setattr(conv, "_SUMMING_PROGRAMS", 64)
    monkeypatch.setattr(conv, "_LEAST_STEPS", 1)


# ── Exactness ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_and_its_gradients_are_as_exact_as_eager(small_tiles, layer):
    p = problem(layer)
    assert_as_exact_as_eager(p, by_kernels(p, "small", "small"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_16_bit_data_are_float32(small_tiles, dtype):
    p = problem("k4 s2 p1", dtype)
    ours = by_kernels(p, "small", "small")
    assert ours["mean"].dtype == ours["var"].dtype == torch.float32
    assert_as_exact_as_eager(p, ours)


@pytest.mark.parametrize("tile", TILES)
def test_every_tile_computes_the_same(tile):
    p = problem("k4 s2 p1", shape=(1, 33, 5, 3, 2))
    assert_as_exact_as_eager(p, by_kernels(p, tile, next(iter(WEIGHT_TILES))))


@pytest.mark.parametrize("tile", WEIGHT_TILES)
def test_every_tile_of_a_weight_gradient_computes_the_same(tile):
    p = problem("k4 s2 p1", shape=(1, 5, 3, 2, 2))
    grad = convolution_weight_grad(p.grad_y, p.x, p.weight.shape, (2, 2), (1, 1), True, tile)
    assert_as_exact_as_eager(p, {"grad_weight": grad})


def test_a_weight_gradient_of_the_other_convolution(small_tiles):
    p = problem("k4 s2 p1").to(torch.float64)
    weight = p.weight.requires_grad_()
    (expected,) = torch.autograd.grad(F.conv2d(p.grad_y, weight, None, 2, 1), weight, p.x)
    found = convolution_weight_grad(p.x.float(), p.grad_y.float(), weight.shape, (2, 2), (1, 1), False, "small")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_any_layout_is_taken_and_channels_last_comes_back(small_tiles, layout):
    p = problem("k4 s2 p1", shape=(1, 5, 4, 2, 2))
    moved = replace(p, x=p.x.contiguous(memory_format=layout), weight=p.weight.contiguous(memory_format=layout))
    y = convolution(moved.x, moved.weight, None, *p.settings, "small")
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, convolution(p.x, p.weight, None, *p.settings, "small"))


# ── Statistics, and what comes before ────────────────────────────────────────────────────────────────────────────────


def copied(x: Tensor, tile: str = "small") -> tuple[Tensor, Tensor, Tensor]:
    """y and its moments where y is four times x, which a sum of products cannot round."""
    weight = torch.ones(1, 1, 2, 2, device=DEVICE, dtype=x.dtype)
    return convolution_moments(x, weight, (2, 2), (0, 0), True, (0, 0), tile)


@pytest.mark.parametrize("center", [0.0, 1e4, -1e6])
@pytest.mark.parametrize("most", [512, 2], ids=["together", "some at a time"])
def test_statistics_survive_a_huge_mean(small_tiles, monkeypatch, center, most):
    monkeypatch.setattr(_norm, "MAX_SPLITS", most)
    x = torch.randn(3, 1, 4, 5, device=DEVICE) + center
    y, mean, var = copied(x)
    assert torch.equal(y, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2**-23, atol=1e-6)
    torch.testing.assert_close(var.double(), exact_var, rtol=2e-6, atol=0)


def test_statistics_survive_a_first_image_unlike_the_others(small_tiles):
    x = torch.randn(5, 1, 4, 4, device=DEVICE)
    x[0] += 3e4
    _, _, var = copied(x)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=2e-6, atol=0)


def test_statistics_are_of_y_as_it_is_rounded(small_tiles):
    y, mean, var = copied(torch.randn(2, 1, 4, 4, device=DEVICE).to(torch.bfloat16) + 300)
    exact_var, exact_mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


def test_a_constant_has_no_variance(small_tiles):
    _, mean, var = copied(torch.full((2, 1, 3, 3), -1e4, device=DEVICE))
    assert (mean.item(), var.item()) == (-1e4, 0.0)


@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "prelu"])
def test_x_is_normalised_and_activated_on_its_way_in(small_tiles, act):
    p = problem("k4 s2 p1", act=act, center=1e4, shape=(2, 5, 3, 2, 3))
    assert_as_exact_as_eager(p, by_kernels(p, "small", "small"))


def test_what_comes_in_is_what_batch_norm_act_would_have_written(small_tiles):
    """Bit for bit: the gradients of the two layers may be computed from either."""
    from fastgan_kernels.norm_act import batch_norm_act_forward

    p = problem("k4 s2 p1", torch.bfloat16, act="leaky_relu", shape=(1, 5, 3, 3, 2))
    mean, var, weight, bias, slopes, *act = p.before
    written, _, _ = batch_norm_act_forward(p.x, weight, bias, None, slopes, mean, var, False, *act)

    def both(x: Tensor, before: tuple | None) -> tuple[Tensor, Tensor]:
        stride, padding, transposed, _ = p.settings
        y = convolution(x, p.weight, None, *p.settings, "small", before=before)
        return y, convolution_weight_grad(
            p.grad_y, x, p.weight.shape, stride, padding, transposed, "small", before=before
        )

    assert all(map(torch.equal, both(p.x, p.before), both(written, None)))


@pytest.fixture
def norms_taken_in(small_tiles, monkeypatch):
    """Chains leave their norms to the kernels, here on the CPU too, and weights' gradients as well."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(chains, "_loads_by_kernels", lambda x: True)
    monkeypatch.setattr(conv_norm_act, "_fastest_form", lambda _, before, *__: _Form("small", before is not None))
    monkeypatch.setattr(_conv_cuda, "choose", lambda *_: "small")
    kernels = {
        "convolution_moments": lambda x, weight, *rest: _conv_cuda.convolution_moments(x, weight, rest[:-1], rest[-1]),
        "convolution_behind_norm": conv_norm_act._cuda_behind_norm,
        "convolution_weight_grad_behind_norm": conv_norm_act._cuda_weight_grad_behind_norm,
    }
    ran = []
    for name, kernel in kernels.items():
        monkeypatch.setitem(KERNELS[name], DEVICE, lambda *args, n=name, k=kernel: (ran.append(n), k(*args))[1])
    return ran


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chain_s_norms_are_taken_in_by_the_next_convolution_and_its_weight_gradient(dtype, norms_taken_in):
    torch.manual_seed(0)
    layers = [nn.ConvTranspose2d(5, 6, 4, 2, 1, bias=False), nn.BatchNorm2d(6), nn.LeakyReLU(SLOPE)]
    layers += [nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    stock = nn.Sequential(*layers).to(DEVICE, dtype)
    fused, exact = fastgan.fuse(copy.deepcopy(stock)), copy.deepcopy(stock).double()
    x = torch.randn(1, 5, 3, 2, device=DEVICE, dtype=dtype)
    found = []
    for model, given in ((stock, x), (fused, x), (exact, x.double())):
        leaf = given.clone().requires_grad_()
        y = model(leaf)
        y.square().mean().backward()
        statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        found.append([y, leaf.grad, *(p.grad for p in model.parameters()), *statistics])
    for eager, ours, true in zip(*found, strict=True):
        allowed = 2 * (eager.double() - true).norm() + torch.finfo(dtype).eps * true.norm()
        assert (ours.double() - true).norm() <= allowed
    assert norms_taken_in == [
        "convolution_moments", "convolution_behind_norm", "convolution_weight_grad_behind_norm",
    ]  # fmt: skip


# ── The choice among forms ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fastest", ["vendor", "small"])
@pytest.mark.parametrize("transposed", [True, False], ids=["conv_transpose2d", "conv2d"])
def test_whichever_form_is_measured_to_be_faster_computes(small_tiles, monkeypatch, tmp_path, fastest, transposed):
    monkeypatch.setenv("FASTGAN_AUTOTUNE", "1")
    monkeypatch.setenv("FASTGAN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(_conv_cuda, "takes", lambda *_: True)
    for tiles in ("tiles", "weight_tiles"):
        monkeypatch.setattr(conv, tiles, lambda dtype: ["small"])
    monkeypatch.setattr(
        _autotune, "_measure", lambda candidates, _: {name: float(name != fastest) for name in candidates}
    )
    _autotune.reset()
    p = problem("k4 s2 p1", shape=(1, 4, 5, 2, 2))
    x, grad_y = (p.x, p.grad_y) if transposed else (p.grad_y, p.x)
    settings = ((2, 2), (1, 1), (1, 1), transposed, (0, 0), 1)
    y = _conv_cuda.convolution(x, p.weight, None, settings)
    torch.testing.assert_close(y, torch.convolution(x, p.weight, None, *settings), rtol=1e-4, atol=1e-4)
    expected = torch.ops.aten.convolution_backward(grad_y, x, p.weight, None, *settings, [True, True, False])[:2]
    found = _conv_cuda.backward(grad_y, x, p.weight, settings)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    grad_weight = _conv_cuda.weight_grad(grad_y, x, p.weight.shape, settings)
    torch.testing.assert_close(grad_weight, expected[1], rtol=1e-4, atol=1e-4)
    chosen = [(operator, next(iter(times))) for operator, times in _autotune.chosen()]
    of_x = [("convolution", fastest)] * 2  # the gradient in x is a convolution too
    assert sorted(chosen) == [*of_x, ("convolution_weight_grad", fastest)]
    _autotune.reset()


# ── Ahead of time, and CUDA ──────────────────────────────────────────────────────────────────────────────────────────


def compiled_cases() -> Iterator[tuple[str, Callable]]:
    for dtype in (torch.bfloat16, torch.float32):  # the latter as TF32, which is all of it that has a choice
        p, behind_norm = (problem("k4 s2 p1", dtype, act, shape=(2, 64, 32, 4, 4)) for act in (None, "leaky_relu"))
        stride, padding, transposed, _ = p.settings
        for tile in conv.tiles(dtype):
            yield (
                f"rows {dtype} {tile}",
                partial(convolution, p.grad_y, p.weight, None, stride, padding, False, (0, 0), tile, True),
            )
        for tile in conv.tiles(dtype, moments=True):
            yield f"rows {dtype} {tile} moments", partial(convolution_moments, p.x, p.weight, *p.settings, tile, True)
        for tile in conv.tiles(dtype, moments=True, behind_norm=True):
            yield (
                f"rows {dtype} {tile} moments, behind a norm",
                partial(convolution_moments, p.x, p.weight, *p.settings, tile, True, behind_norm.before),
            )
        shape = p.weight.shape
        for tile, before in itertools.product(conv.weight_tiles(dtype), (None, behind_norm.before)):
            yield (
                f"rows {dtype} {tile} weight, {'behind a norm' if before else 'alone'}",
                partial(convolution_weight_grad, p.grad_y, p.x, shape, stride, padding, transposed, tile, True, before),
            )
    # An integer argument of 1 is a constant to the compiler; and so many tiles that their moments are merged first.
    layers = (("k4 s1 p0 from 1×1", "prelu", (3, 24, 16, 1, 1)), ("k3 s2 p1 op1", None, (1, 24, 16, 160, 160)))
    for layer, act, shape in layers:
        p = problem(layer, torch.float16, act, shape=shape)
        yield f"bare {layer}", partial(by_kernels, p, "64x64x64", "64x64x64")


needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@needs_cuda
@pytest.mark.parametrize("layer", ["k4 s2 p1", "k3 s2 p1 op1"])
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_tile_computes_a_layer_of_a_real_size(dtype, act, layer):
    p = problem(layer, dtype, act, shape=(16, 256, 128, 16, 16))
    weight_tiles = itertools.cycle(conv.weight_tiles(dtype))
    for tile in conv.tiles(dtype, moments=True, behind_norm=act is not None):
        assert_as_exact_as_eager(p, by_kernels(p, tile, next(weight_tiles), allow_tf32=True))
    stride, padding, *_ = p.settings
    for tile in conv.tiles(dtype):
        grad_x = convolution(p.grad_y, p.weight, None, stride, padding, False, (0, 0), tile, allow_tf32=True)
        assert_as_exact_as_eager(p, {"grad_x": grad_x})


@needs_cuda
def test_a_captured_graph_replays_everything_bit_for_bit():
    p = problem("k4 s2 p1", torch.bfloat16, shape=(8, 128, 64, 16, 16))
    run = partial(by_kernels, p, "64x64x64", "64x64x64")
    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
