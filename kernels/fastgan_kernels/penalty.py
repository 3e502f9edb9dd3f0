"""Two bilinear operators on the samples of a batch: Σ x·y over each, and each times a number.

A sample is a row of a matrix (N, S), which is cut into tiles of rows and columns. Where there are too few rows for the
GPU, several programs add up one row's products, and leave their sums in a buffer which is added in a fixed order.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan_kernels._norm import MAX_SPLITS, PROGRAMS, dense, is_channels_last

# Eight elements to a thread: one 16-byte load in bfloat16.
_TILE = 2048
_ELEMENTS_PER_WARP = 256


@triton.jit
def _rows(HEIGHT: tl.constexpr):
    """The program's rows."""
    return tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)[:, None]


@triton.jit
def _tile(t, shape, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets, in int64, and mask of tile t of these."""
    N, S = shape
    row = _rows(HEIGHT)
    col = t.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    return row * S + col, (row < N) & (col < S)


@triton.jit
def _dot_kernel(x, y, sums, shape, tiles, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    t = tl.program_id(1)
    total = tl.zeros([HEIGHT, WIDTH], ACC)
    while t < tiles:
        at, ok = _tile(t, shape, HEIGHT, WIDTH)
        total += tl.load(x + at, ok, 0.0).to(ACC) * tl.load(y + at, ok, 0.0).to(ACC)
        t += tl.num_programs(1)
    row = _rows(HEIGHT)
    tl.store(sums + row * tl.num_programs(1) + tl.program_id(1), tl.sum(total, 1, keep_dims=True), row < shape[0])


@triton.jit
def _scale_kernel(x, factors, y, shape, tiles, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    row = _rows(HEIGHT)
    factor = tl.load(factors + row, row < shape[0], 0.0).to(ACC)
    t = tl.program_id(1)
    while t < tiles:
        at, ok = _tile(t, shape, HEIGHT, WIDTH)
        tl.store(y + at, factor * tl.load(x + at, ok, 0.0).to(ACC), ok)
        t += tl.num_programs(1)


class _Plan:
    """How N samples of S elements are cut into tiles and programs."""

    def __init__(self, samples: int, elements: int, dtype: torch.dtype) -> None:
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        width = min(triton.next_power_of_2(elements), _TILE)
        height = min(triton.next_power_of_2(samples), _TILE // width)
        blocks, tiles = triton.cdiv(samples, height), triton.cdiv(elements, width)
        self.splits = min(tiles, MAX_SPLITS, triton.cdiv(PROGRAMS, blocks))
        self.grid = (blocks, self.splits)
        self.options: dict[str, Any] = {
            "shape": (samples, elements),
            "tiles": tiles,
            "HEIGHT": height,
            "WIDTH": width,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "num_warps": max(height * width // _ELEMENTS_PER_WARP, 1),
        }


_cached_plan = lru_cache(maxsize=4096)(_Plan)


def _plan(x: Tensor) -> _Plan:
    return _cached_plan(x.shape[0], x.shape[1:].numel(), x.dtype)


def sample_dot(x: Tensor, y: Tensor) -> Tensor:
    """Σ x·y over all axes but the first, (N, \\*), (N, \\*) -> (N,), in float32 (float64 for float64).

    x, y: of one shape and dtype, float32, bfloat16, float16 or float64; y is copied where its layout is not x's.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() == 0:
        return x.new_zeros(x.shape[0], dtype=dtype)
    x, y = dense(is_channels_last(x), x, y)
    plan = _plan(x)
    sums = x.new_empty((x.shape[0], plan.splits), dtype=dtype)
    with torch.cuda.device_of(x):
        _dot_kernel[plan.grid](x, y, sums, **plan.options)
    return sums.sum(1) if plan.splits > 1 else sums.view(-1)


def sample_scale(x: Tensor, factors: Tensor) -> Tensor:
    """Each sample times its factor, (N, \\*), (N,) -> (N, \\*), in x's dtype and layout.

    The product is rounded once: factors, of any of sample_dot's dtypes, are taken to the dtype of accumulation.
    """
    x, factors = dense(is_channels_last(x), x)[0], factors.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    plan = _plan(x)
    with torch.cuda.device_of(x):
        _scale_kernel[plan.grid](x, factors, y, **plan.options)
    return y
