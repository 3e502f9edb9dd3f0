"""Pixel shuffle and the activation after it, and what their derivatives are made of.

    y[n, c, r*h + i, r*w + j] = f(x[n, c*r*r + i*r + j, h, w]),    f(v) = v where its side is above 0, else weight * v

Each order is one pass over y, which is cut into tiles of rows and columns; x lies in pieces under them. The tiles of a
channel, or of neighbouring ones, are dealt out to programs, each of which leaves one partial sum of the weight's gradient:

    planes    memory is (N, C, lines, pixels): a row is a line of y, a column a pixel
    rows      memory is (N, lines, pixels, C): a column is a channel, and a row a pixel of y, in the order of x: the r*r that
              share a pixel of x follow each other
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan_kernels._norm import PROGRAMS, ROW_CHANNELS, activate_by, channels, load

# Eight elements to a thread: one 16-byte load in bfloat16.
_TILE = 2048
_ELEMENTS_PER_WARP = 256


# ---------------------------------------------------------------------------------------------------------- mathematics


@triton.jit
def _apply(side, value, slope, ACT: tl.constexpr, POSITIVE: tl.constexpr):
    """f; unless POSITIVE 0 where the side is above 0."""
    value = activate_by(side, value, slope, ACT)
    return value if POSITIVE else tl.where(side > 0, 0.0, value)


@triton.jit
def _tile(t, shape, R: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets in x and in y, in int64 and never negative, and mask of tile t of the program's channels."""
    N, C, H, W = shape
    row = tl.arange(0, HEIGHT)[:, None]
    col = tl.arange(0, WIDTH)[None, :]
    group = tl.program_id(0).to(tl.int64)
    SQUARES: tl.constexpr = R * R
    if ROWS:
        row += t.to(tl.int64) * HEIGHT
        c = col + group * WIDTH
        k = row % SQUARES
        pixel = row // SQUARES
        line = pixel // W
        in_x = pixel * (C * SQUARES) + c * SQUARES + k
        in_y = ((line * R + k // R) * (W * R) + pixel % W * R + k % R) * C + c
        ok = (pixel < N * H * W) & (c < C)
    else:
        across = tl.cdiv(W * R, WIDTH)
        row += (t // across).to(tl.int64) * HEIGHT
        col += t % across * WIDTH
        n = row // (H * R)
        line = row % (H * R)
        plane = (n * C + group) * SQUARES
        in_x = ((plane + line % R * R + col % R) * H + line // R) * W + col // R
        in_y = ((n * C + group) * (H * R) + line) * (W * R) + col
        ok = (n < N) & (col < W * R)
    return in_x, in_y, ok


@triton.jit
def _slopes(weight, slope, c, c_ok, SINGLE: tl.constexpr, ACC: tl.constexpr):
    """What the negative side is multiplied by."""
    return load(weight, c * 0 if SINGLE else c, c_ok, slope, ACC)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _forward_kernel(x, side, weight, y, slope: tl.float64, shape, tiles, ACT: tl.constexpr, POSITIVE: tl.constexpr,
                    FINE: tl.constexpr, SINGLE: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr,
                    WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    _, c, c_ok = channels(shape, ROWS, WIDTH)
    slopes = _slopes(weight, slope, c, c_ok, SINGLE, ACC)
    t = tl.program_id(1)
    while t < tiles:
        in_x, in_y, ok = _tile(t, shape, R, ROWS, HEIGHT, WIDTH)
        value = load(x, in_x, ok, 0.0, ACC)
        s = value if side is None else load(side, in_y if FINE else in_x, ok, 0.0, ACC)
        tl.store(y + in_y, _apply(s, value, slopes, ACT, POSITIVE), ok)
        t += tl.num_programs(1)


@triton.jit
def _backward_kernel(grad_y, x, side, weight, grad_x, partial, slope: tl.float64, shape, tiles, ACT: tl.constexpr,
                     POSITIVE: tl.constexpr, FINE: tl.constexpr, SINGLE: tl.constexpr, R: tl.constexpr,
                     ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    _, c, c_ok = channels(shape, ROWS, WIDTH)
    slopes = _slopes(weight, slope, c, c_ok, SINGLE, ACC)
    total = tl.zeros([HEIGHT, WIDTH], ACC)
    t = tl.program_id(1)
    while t < tiles:
        in_x, in_y, ok = _tile(t, shape, R, ROWS, HEIGHT, WIDTH)
        g = load(grad_y, in_y, ok, 0.0, ACC)
        s = g if side is None else load(side, in_y if FINE else in_x, ok, 0.0, ACC)
        if partial is not None:
            total += tl.where(ok & ~(s > 0), g * load(x, in_x, ok, 0.0, ACC), 0.0)
        if grad_x is not None:
            tl.store(grad_x + in_x, _apply(s, g, slopes, ACT, POSITIVE), ok)
        t += tl.num_programs(1)
    if partial is not None:
        sums = tl.sum(total, 0 if ROWS else None, keep_dims=True)
        tl.store(partial + tl.program_id(1) * shape[1] + c, sums, c_ok)


# --------------------------------------------------------------------------------------------------------------- launch


class _Plan:
    """How y over x, of which shape is (N, C, H, W) with y's channels, is cut into tiles and programs."""

    def __init__(self, shape: tuple[int, int, int, int], factor: int, rows: bool, dtype: torch.dtype) -> None:
        n, c, h, w = shape
        outer, inner = (n * h * w * factor**2, c) if rows else (n * h * factor, w * factor)
        width = min(triton.next_power_of_2(inner), ROW_CHANNELS if rows else _TILE)
        height = min(triton.next_power_of_2(outer), _TILE // width)
        down, across = triton.cdiv(outer, height), triton.cdiv(inner, width)
        groups, tiles = (across, down) if rows else (c, down * across)
        self.splits = max(1, min(tiles, triton.cdiv(PROGRAMS, groups)))
        self.channels = c
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.grid = (groups, self.splits)
        self.options: dict[str, Any] = {
            "shape": shape,
            "tiles": tiles,
            "R": factor,
            "ROWS": rows,
            "HEIGHT": height,
            "WIDTH": width,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "num_warps": min(max(height * width // _ELEMENTS_PER_WARP, 1), 8),
        }


_cached_plan = lru_cache(maxsize=4096)(_Plan)


class _Call:
    """A launch on an x of this shape. channels_last: that x and y are, and all else is made so."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        side: Tensor | None,
        weight: Tensor | None,
        factor: int,
        act: str,
        positive: bool,
        channels_last: bool,
    ) -> None:
        n, channels, height, width = shape
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.coarse, self.fine = shape, (n, channels // factor**2, height * factor, width * factor)
        self.plan = _cached_plan((n, channels // factor**2, height, width), factor, channels_last, dtype)
        self.options = {
            **self.plan.options,
            "ACT": act,
            "POSITIVE": positive,
            "FINE": side is not None and tuple(side.shape) != tuple(shape),
            "SINGLE": weight is not None and weight.numel() == 1,
        }

    def dense(self, t: Tensor | None) -> Any:
        return None if t is None else t.contiguous(memory_format=self.layout)

    def empty(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=self.layout)


def pixel_shuffle_act_forward(
    x: Tensor,
    side: Tensor | None,
    weight: Tensor | None,
    upscale_factor: int,
    act: str,
    negative_slope: float,
    positive: bool,
    channels_last: bool,
) -> Tensor:
    """y = shuffle(f(x)), (N, C, r*H, r*W) of x (N, C*r*r, H, W), in channels_last or not.

    x: float32, bfloat16, float16 or float64. act: "none", "relu", "leaky_relu", or "prelu", with weight (1,) or (C,) in any
    of these dtypes. side: shaped as x or as y, of which the sign counts; None for x. positive: whether the positive side
    passes, else it is 0.
    """
    call = _Call(x.dtype, x.shape, side, weight, upscale_factor, act, positive, channels_last)
    y = call.empty(x, call.fine)
    with torch.cuda.device_of(x):
        _forward_kernel[call.plan.grid](
            call.dense(x), call.dense(side), None if weight is None else weight.contiguous(), y, negative_slope,
            **call.options,
        )  # fmt: skip
    return y


def pixel_shuffle_act_backward(
    grad_y: Tensor,
    x: Tensor | None,
    side: Tensor | None,
    weight: Tensor | None,
    upscale_factor: int,
    act: str,
    negative_slope: float,
    positive: bool,
    channels_last: bool,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_x, grad_weight); what is not needed comes back empty, and is not computed.

    grad_x = f(unshuffle(grad_y)), and grad_weight the sums of unshuffle(grad_y) * x where side is not above 0, in the dtype
    of accumulation: float64 for float64, else float32. side may be None for "none" only, x where no grad_weight is needed.
    """
    n, channels, height, width = grad_y.shape
    shape = (n, channels * upscale_factor**2, height // upscale_factor, width // upscale_factor)
    call = _Call(grad_y.dtype, shape, side, weight, upscale_factor, act, positive, channels_last)
    plan, grad_x, partial = call.plan, call.empty(grad_y, shape) if needs_x else None, None
    if needs_weight:
        partial = grad_y.new_empty((plan.splits, plan.channels), dtype=plan.dtype)
    with torch.cuda.device_of(grad_y):
        _backward_kernel[plan.grid](
            call.dense(grad_y), call.dense(x), call.dense(side), None if weight is None else weight.contiguous(),
            grad_x, partial, negative_slope, **call.options,
        )  # fmt: skip
    grad_weight = grad_y.new_empty(0, dtype=plan.dtype)
    if partial is not None:
        grad_weight = partial.sum().view(1) if call.options["SINGLE"] else partial.sum(0)
    return grad_y.new_empty(0) if grad_x is None else grad_x, grad_weight
