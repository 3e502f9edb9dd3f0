"""What the norms' kernels share, some of it with others: how memory is cut into tiles and read, the activation, and how the
statistics of several programs become one."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Eight programs to each of the 132 multiprocessors of an H100 or H200.
PROGRAMS = 1056
# What one program can combine in its registers: partial results, and columns of them.
MAX_SPLITS = 512
_COMBINED_COLUMNS = 8
# Channels to a tile of rows: 64 bytes in bfloat16, one access to HBM.
ROW_CHANNELS = 32


@triton.jit
def channels(shape, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The program's channel group, the channels in it, and which of these exist."""
    group = tl.program_id(0).to(tl.int64)
    c = group * WIDTH + tl.arange(0, WIDTH)[None, :] if ROWS else group + tl.arange(0, 1)[None, :]
    return group, c, c < shape[1]


@triton.jit
def tile(t, group, shape, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets, in int64 and never negative, and mask of tile t of a channel group."""
    N, C, S = shape
    row = tl.arange(0, HEIGHT)[:, None]
    col = tl.arange(0, WIDTH)[None, :]
    if ROWS:
        row += t.to(tl.int64) * HEIGHT
        col += group * WIDTH
        at = row * C + col
        ok = (row < N) & (col < C)
    else:
        across = tl.cdiv(S, WIDTH)
        row += (t // across).to(tl.int64) * HEIGHT
        col += (t % across).to(tl.int64) * WIDTH
        at = (row * C + group) * S + col
        ok = (row < N) & (col < S)
    return at, ok


@triton.jit
def load(pointer, at, ok, absent, ACC: tl.constexpr):
    return tl.full(at.shape, absent, ACC) if pointer is None else tl.load(pointer + at, mask=ok, other=0).to(ACC)


@triton.jit
def activate(pre, value, slope, ACT: tl.constexpr, ACC: tl.constexpr):
    """act'(pre) * value. As act is piecewise linear, act(pre) is activate(pre, pre). A NaN passes, as in torch."""
    return activate_by(pre, value, tl.full([1, 1], slope, ACC), ACT)


@triton.jit
def activate_by(pre, value, slopes, ACT: tl.constexpr):
    """The same with a tile of slopes, of which "prelu" has one for each channel."""
    if ACT == "relu":
        value = tl.where(pre <= 0, 0.0, value)
    elif ACT != "none":
        value = tl.where(pre > 0, value, value * slopes)
    return value


@triton.jit
def affine_of(mean, var, weight, bias, prelu_weight, c, c_ok, eps, slope, ACC: tl.constexpr):
    """What is done to each element of a channel: its mean, 1 / deviation, weight, bias and the activation's slope."""
    r = tl.rsqrt(var + tl.full(var.shape, eps, ACC))
    slopes = tl.full(c.shape, slope, ACC) if prelu_weight is None else load(prelu_weight, c, c_ok, 0.0, ACC)
    return mean, r, load(weight, c, c_ok, 1.0, ACC), load(bias, c, c_ok, 0.0, ACC), slopes


@triton.jit
def _merge(partial, first, c, columns, splits, SPLITS: tl.constexpr):
    """Count, shift, offset and square of the splits from `first` on together, by Chan's formula. Some may be empty."""
    p = first + tl.arange(0, SPLITS)[:, None]
    at = partial + p * columns + c
    ok = (p < splits) & (c < columns)
    field = splits * columns
    n = tl.load(at, ok, 0.0)
    shift = tl.load(at + field, ok, 0.0)
    offset = tl.load(at + 2 * field, ok, 0.0)
    square = tl.load(at + 3 * field, ok, 0.0)
    count = tl.sum(n, 0, keep_dims=True)
    some = tl.maximum(count, 1.0)
    # Means relative to one of the shifts: subtracting nearly equal shifts is exact, however huge these are.
    anchor = tl.where(count > 0, tl.max(tl.where(n > 0, shift, -float("inf")), 0, keep_dims=True), 0.0)
    m = tl.where(n > 0, shift - anchor + offset, 0.0)
    center = tl.sum(n * m, 0, keep_dims=True) / some
    square = tl.sum(square + n * (m - center) * (m - center), 0, keep_dims=True)
    return count, anchor, center, square


@triton.jit
def _merge_kernel(partial, merged, columns, splits, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """merged (4, ⌈splits / SPLITS⌉, columns): what partial is, of so many splits together."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    row = tl.program_id(1)
    count, shift, offset, square = _merge(partial, row * SPLITS, c, columns, splits, SPLITS)
    at = merged + row * columns + c
    field = tl.num_programs(1) * columns
    tl.store(at, count, c < columns)
    tl.store(at + field, shift, c < columns)
    tl.store(at + 2 * field, offset, c < columns)
    tl.store(at + 3 * field, square, c < columns)


@triton.jit
def _combine_kernel(partial, mean, var, columns, splits, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """Mean and biased variance of each column from those of its splits."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    count, shift, offset, square = _merge(partial, 0, c, columns, splits, SPLITS)
    tl.store(mean + c, shift.to(mean.dtype.element_ty) + offset.to(mean.dtype.element_ty), c < columns)
    tl.store(var + c, square / count, c < columns)


def combine(partial: Tensor, mean: Tensor, var: Tensor) -> None:
    """mean and var, of as many elements as partial has columns, from its count, shift, offset and square of each split.

    partial: (4, splits, columns). The mean of a split is shift + offset; its square is Σ (x - mean)².
    """
    _, splits, columns = partial.shape
    blocks = triton.cdiv(columns, _COMBINED_COLUMNS)
    while splits > MAX_SPLITS:
        rows = triton.cdiv(splits, MAX_SPLITS)
        merged = partial.new_empty((4, rows, columns))
        _merge_kernel[(blocks, rows)](
            partial, merged, columns, splits, SPLITS=MAX_SPLITS, WIDTH=_COMBINED_COLUMNS, num_warps=8
        )
        partial, splits = merged, rows
    _combine_kernel[(blocks,)](
        partial, mean, var, columns, splits,
        SPLITS=triton.next_power_of_2(splits), WIDTH=_COMBINED_COLUMNS, num_warps=8,
    )  # fmt: skip


def is_channels_last(x: Tensor) -> bool:
    return x.dim() in (4, 5) and not x.is_contiguous() and x.stride(1) == 1


def dense(rows: bool, *tensors: Tensor | None) -> list[Any]:
    """The tensors, copied where their memory is not in order; in rows, with their channels innermost."""
    return [None if t is None else _rows(t) if rows else t.contiguous() for t in tensors]


def _rows(t: Tensor) -> Tensor:
    if t.dim() < 4:
        return t.contiguous()
    return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
