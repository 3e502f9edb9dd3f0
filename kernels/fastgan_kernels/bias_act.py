"""Bias, activation, gain and clamp in one operator, with its first and second derivatives.

    y = clamp(gain * act(x + b)),    act: linear, relu, lrelu, tanh, sigmoid, elu, selu, softplus or swish

Every order is one pass, in which the gradients of b are summed as well. The data are cut into tiles, and the tiles of a
channel (an index of the axis that b lies along) dealt out to programs, each of which leaves one partial sum:

    planes    memory is (outer, channels, inner): a tile is a piece of some planes of one channel
    rows      memory is (outer, channels): a tile is some rows of neighbouring channels
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan_kernels._norm import PROGRAMS, ROW_CHANNELS, channels, load, tile

# Eight elements to a thread: one 16-byte load in bfloat16. Of float64, four: eight of them spill.
_TILE = 2048
_ELEMENTS_PER_WARP = 256

_PIECEWISE_LINEAR = ("linear", "relu", "lrelu")


# ---------------------------------------------------------------------------------------------------------- mathematics


@triton.jit
def _exponential(x, ACC: tl.constexpr):
    """exp(x) and exp(x) - 1 of x <= 0: 2^k exp(r), where r is small, and exp(r) - 1 a short Taylor series."""
    IS_DOUBLE: tl.constexpr = ACC.primitive_bitwidth == 64
    TERMS: tl.constexpr = 13 if IS_DOUBLE else 7
    x = tl.where(x < -746, -746.0, x) if IS_DOUBLE else tl.where(x < -104, -104.0, x)
    k = tl.floor(x * 1.4426950408889634 + 0.5)
    # ln 2 in two parts, of which k times the first is exact.
    if IS_DOUBLE:
        r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    else:
        r = (x - k * 0.693145751953125) - k * 1.428606820309417e-06
    series = tl.full(x.shape, 1.0, ACC)
    for i in tl.static_range(TERMS - 1):
        series = series * (r * (1.0 / (TERMS - i))) + 1.0
    power = tl.exp2(k)
    rest = r * series * power
    return power + rest, rest + (power - 1.0)


@triton.jit
def _log1p(z, ACC: tl.constexpr):
    """log(1 + z) of 0 <= z <= 1, as 2 artanh(z / (2 + z))."""
    TERMS: tl.constexpr = 17 if ACC.primitive_bitwidth == 64 else 8
    s = z / (z + 2.0)
    series = tl.zeros(z.shape, ACC)
    for i in tl.static_range(TERMS):
        series = series * (s * s) + 1.0 / (2 * (TERMS - i) - 1)
    return 2.0 * s * series


@triton.jit
def _smooth(u, ACT: tl.constexpr, ACC: tl.constexpr):
    """act(u), act'(u) and act''(u), with torch's conventions: elu has no second derivative at 0, softplus is u above 20."""
    if ACT == "elu" or ACT == "selu":
        SCALE: tl.constexpr = 1.0507009873554805 if ACT == "selu" else 1.0
        ALPHA: tl.constexpr = 1.7580993408473766 if ACT == "selu" else 1.0  # times the scale
        e, em1 = _exponential(tl.where(u > 0, 0.0, u), ACC)
        value = tl.where(u <= 0, ALPHA * em1, SCALE * u)
        first = tl.where(u <= 0, ALPHA * e, SCALE)
        second = tl.where(u < 0, ALPHA * e, 0.0)
    elif ACT == "tanh":
        e, em1 = _exponential(-2.0 * tl.abs(u), ACC)
        value = -em1 / (1.0 + e)
        value = tl.where(u < 0, -value, value)
        first = 4.0 * e / ((1.0 + e) * (1.0 + e))
        second = -2.0 * value * first
    else:
        z, _ = _exponential(-tl.abs(u), ACC)
        near = 1.0 / (1.0 + z)
        sigmoid = tl.where(u < 0, z * near, near)
        rest = tl.where(u < 0, near, z * near)
        slope = sigmoid * rest
        if ACT == "sigmoid":
            value, first, second = sigmoid, slope, slope * (rest - sigmoid)
        elif ACT == "softplus":
            value = tl.where(u > 20, u, tl.where(u < 0, 0.0, u) + _log1p(z, ACC))
            first = tl.where(u > 20, 1.0, sigmoid)
            second = tl.where(u >= 20, 0.0, slope)
        else:
            value = u * sigmoid
            first = sigmoid * (1.0 + u * rest)
            second = slope * (2.0 + u * (rest - sigmoid))
    return value, first, second


@triton.jit
def _piecewise(side, value, alpha, ACT: tl.constexpr, ACC: tl.constexpr):
    """act'(side) * value. A NaN passes as in torch."""
    if ACT == "relu":
        value = tl.where(side <= 0, 0.0, value)
    elif ACT == "lrelu":
        value = tl.where(side > 0, value, value * tl.full(value.shape, alpha, ACC))
    return value


@triton.jit
def _inside(y, value, clamp, CLAMPS: tl.constexpr, ACC: tl.constexpr):
    """value where the clamp leaves y as it is, else 0, also where y is NaN."""
    if CLAMPS:
        value = tl.where(tl.abs(y) < tl.full(value.shape, clamp, ACC), value, 0.0)
    return value


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _forward_kernel(x, b, y, alpha: tl.float64, gain: tl.float64, clamp: tl.float64, shape, tiles, ACT: tl.constexpr,
                    SMOOTH: tl.constexpr, CLAMPS: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr,
                    WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    group, c, c_ok = channels(shape, ROWS, WIDTH)
    bias = load(b, c, c_ok, 0.0, ACC)
    t = tl.program_id(1)
    while t < tiles:
        at, ok = tile(t, group, shape, ROWS, HEIGHT, WIDTH)
        u = load(x, at, ok, 0.0, ACC) + bias
        if SMOOTH:
            v, _, _ = _smooth(u, ACT, ACC)
        else:
            v = _piecewise(u, u, alpha, ACT, ACC)
        v *= tl.full(v.shape, gain, ACC)
        if CLAMPS:
            limit = tl.full(v.shape, clamp, ACC)
            v = tl.where(v > limit, limit, tl.where(v < -limit, -limit, v))
        tl.store(y + at, v, ok)
        t += tl.num_programs(1)


@triton.jit
def _backward_kernel(grad_y, side, b, grad_x, partial, alpha: tl.float64, gain: tl.float64, clamp: tl.float64, shape,
                     tiles, ACT: tl.constexpr, SMOOTH: tl.constexpr, CLAMPS: tl.constexpr, ROWS: tl.constexpr,
                     HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    group, c, c_ok = channels(shape, ROWS, WIDTH)
    bias = load(b, c, c_ok, 0.0, ACC)
    total = tl.zeros([HEIGHT, WIDTH], ACC)
    t = tl.program_id(1)
    while t < tiles:
        at, ok = tile(t, group, shape, ROWS, HEIGHT, WIDTH)
        g = load(grad_y, at, ok, 0.0, ACC)
        s = load(side, at, ok, 0.0, ACC)
        factor = tl.full(g.shape, gain, ACC)
        if SMOOTH:
            value, first, _ = _smooth(s + bias, ACT, ACC)
            g = _inside(value * factor, first * g, clamp, CLAMPS, ACC)
        else:
            g = _inside(s, _piecewise(s, g, alpha, ACT, ACC), clamp, CLAMPS, ACC)
        g = tl.where(ok, g * factor, 0.0)
        if grad_x is not None:
            tl.store(grad_x + at, g, ok)
        total += g
        t += tl.num_programs(1)
    if partial is not None:
        sums = tl.sum(total, 0 if ROWS else None, keep_dims=True)
        tl.store(partial + tl.program_id(1) * shape[1] + c, sums, c_ok)


@triton.jit
def _double_backward_kernel(ggx, ggb, grad_y, side, b, g_grad_y, g_x, partial, alpha: tl.float64, gain: tl.float64,
                            clamp: tl.float64, shape, tiles, ACT: tl.constexpr, SMOOTH: tl.constexpr,
                            CLAMPS: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                            ACC: tl.constexpr):  # fmt: skip
    group, c, c_ok = channels(shape, ROWS, WIDTH)
    bias = load(b, c, c_ok, 0.0, ACC)
    slant = load(ggb, c, c_ok, 0.0, ACC)
    total = tl.zeros([HEIGHT, WIDTH], ACC)
    t = tl.program_id(1)
    while t < tiles:
        at, ok = tile(t, group, shape, ROWS, HEIGHT, WIDTH)
        v = load(ggx, at, ok, 0.0, ACC) + slant
        s = load(side, at, ok, 0.0, ACC)
        factor = tl.full(v.shape, gain, ACC)
        if SMOOTH:
            value, first, second = _smooth(s + bias, ACT, ACC)
            tl.store(g_grad_y + at, _inside(value * factor, first * v, clamp, CLAMPS, ACC) * factor, ok)
            if g_x is not None or partial is not None:
                g = second * v * load(grad_y, at, ok, 0.0, ACC)
                g = tl.where(ok, _inside(value * factor, g, clamp, CLAMPS, ACC) * factor, 0.0)
                if g_x is not None:
                    tl.store(g_x + at, g, ok)
                total += g
        else:
            g = _inside(s, _piecewise(s, v, alpha, ACT, ACC), clamp, CLAMPS, ACC)
            tl.store(g_grad_y + at, g * factor, ok)
        t += tl.num_programs(1)
    if partial is not None:
        sums = tl.sum(total, 0 if ROWS else None, keep_dims=True)
        tl.store(partial + tl.program_id(1) * shape[1] + c, sums, c_ok)


# --------------------------------------------------------------------------------------------------------------- launch


class _Plan:
    """How dense memory (outer, channels, inner) is cut into tiles and programs."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        n, c, s = shape
        rows, halving = s == 1, 2 if dtype == torch.float64 else 1
        tile = _TILE // halving
        outer, inner = (n, c) if rows else (n, s)
        width = min(triton.next_power_of_2(max(inner, 1)), ROW_CHANNELS if rows else tile)
        height = min(triton.next_power_of_2(max(outer, 1)), tile // width)
        down, across = triton.cdiv(outer, height), triton.cdiv(inner, width)
        groups, tiles = (across, down) if rows else (c, down * across)
        self.splits = max(1, min(tiles, triton.cdiv(PROGRAMS, max(groups, 1))))
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.grid = (groups, self.splits)
        self.options: dict[str, Any] = {
            "shape": shape,
            "tiles": tiles,
            "ROWS": rows,
            "HEIGHT": height,
            "WIDTH": width,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "num_warps": min(max(height * width * halving // _ELEMENTS_PER_WARP, 1), 8),
        }


_cached_plan = lru_cache(maxsize=4096)(_Plan)


class _Call:
    """A launch whose tensors are laid out and cut as `like` is; has_channels: an argument has a value for each channel."""

    def __init__(self, like: Tensor, has_channels: bool, dim: int, act: str, clamp: float | None) -> None:
        self.channels_last = like.dim() > 3 and not like.is_contiguous() and like.stride(1) == 1
        self.like = self.dense(like)
        self.channels = like.shape[dim] if has_channels else 1
        inner = self.like.stride(dim) if self.channels > 1 else self.like.numel()
        outer = self.like.numel() // max(self.channels * inner, 1)
        self.plan = _cached_plan((outer, self.channels, inner), like.dtype)
        self.options = {
            **self.plan.options,
            "ACT": act,
            "SMOOTH": act not in _PIECEWISE_LINEAR,
            "CLAMPS": clamp is not None,
        }

    def dense(self, t: Tensor | None) -> Any:
        if t is None or not self.channels_last:
            return None if t is None else t.contiguous()
        return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)

    def partial(self, needed: bool) -> Any:
        """Room for every program's sums."""
        if not needed:
            return None
        return self.like.new_empty((self.plan.splits, self.channels), dtype=self.plan.dtype)

    def total(self, partial: Tensor | None) -> Tensor:
        return self.like.new_empty(0, dtype=self.plan.dtype) if partial is None else partial.sum(0)


def _contiguous(t: Tensor | None) -> Any:
    return None if t is None else t.contiguous()


def bias_act_forward(
    x: Tensor, b: Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> Tensor:
    """y = clamp(gain * act(x + b)), in x's shape, dtype and layout.

    x: float32, bfloat16, float16 or float64. b: (x.shape[dim],), in any of these dtypes. gain and alpha are not negative.
    """
    call = _Call(x, b is not None, dim, act, clamp)
    y = torch.empty_like(call.like)
    with torch.cuda.device_of(x):
        _forward_kernel[call.plan.grid](
            call.like, _contiguous(b), y, alpha, gain, 0.0 if clamp is None else clamp, **call.options
        )
    return y


def bias_act_backward(
    grad_y: Tensor,
    side: Tensor | None,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    needs_x: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_b); what is not needed comes back empty, and is not computed.

    grad_x = s grad_y and grad_b its sums, where s = gain * act'(x + b) if |y| < clamp, else 0. side is y of linear, relu and
    lrelu, x of the other activations, and may be None where s is a constant. grad_b has the dtype of accumulation: float64
    for float64, else float32.
    """
    call = _Call(grad_y if side is None else side, b is not None or needs_b, dim, act, clamp)
    grad_x = torch.empty_like(call.like) if needs_x else None
    partial = call.partial(needs_b)
    with torch.cuda.device_of(grad_y):
        _backward_kernel[call.plan.grid](
            call.dense(grad_y), None if side is None else call.like, _contiguous(b), grad_x, partial,
            alpha, gain, 0.0 if clamp is None else clamp, **call.options,
        )  # fmt: skip
    return grad_y.new_empty(0) if grad_x is None else grad_x, call.total(partial)


def bias_act_double_backward(
    ggx: Tensor | None,
    ggb: Tensor | None,
    grad_y: Tensor,
    side: Tensor | None,
    b: Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
    needs_x: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(ggx grad_x) + sum(ggb grad_b) in grad_y, x and b, of which the last two may not be needed.

    In the terms of bias_act_backward, with v = ggx + ggb: g_grad_y = s v, g_x = gain * act''(x + b) v grad_y if |y| < clamp,
    else 0, and g_b its sums. Either gg may be None. Of linear, relu and lrelu g_x and g_b must not be needed.
    """
    call = _Call(grad_y if side is None else side, b is not None or ggb is not None, dim, act, clamp)
    g_grad_y = torch.empty_like(call.like)
    g_x = torch.empty_like(call.like) if needs_x else None
    partial = call.partial(needs_b)
    with torch.cuda.device_of(grad_y):
        _double_backward_kernel[call.plan.grid](
            call.dense(ggx), _contiguous(ggb), call.dense(grad_y), None if side is None else call.like, _contiguous(b),
            g_grad_y, g_x, partial, alpha, gain, 0.0 if clamp is None else clamp, **call.options,
        )  # fmt: skip
    return g_grad_y, grad_y.new_empty(0) if g_x is None else g_x, call.total(partial)
