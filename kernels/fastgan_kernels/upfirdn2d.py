"""Upsampling by inserted zeros, a FIR filter and downsampling, polyphase: the inserted zeros are neither read nor computed.

    y[o] = Σ taps[k] · x[i]   over the k for which   o · down − pad + k = i · up,   along both axes

A program computes a tile of pixels × channels of one image. In planes (contiguous) that is one channel, in rows
(channels_last) neighbouring channels. Each pixel starts at its own first tap and steps by `up`, from input to input.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Four elements to a thread: their taps and offsets are all that the registers hold, and none is spilled.
_TILE = 512
_WARPS = 4
# Channels to a tile of rows: 128 bytes in bfloat16, and few enough that small images still fill it.
_ROW_CHANNELS = 64


@triton.jit
def _first_tap(o, down, pad, UP: tl.constexpr):
    """The first input at or behind the start of the filter, and the tap that lies on it."""
    start = o * down - pad
    phase = start % UP  # of the sign of start, as in C
    step = tl.where(phase > 0, UP - phase, -phase)
    return (start + step) // UP, step


@triton.jit
def _upfirdn2d_kernel(x, taps, y, shape, out, down, pad, tiles, UP_Y: tl.constexpr, UP_X: tl.constexpr,
                      TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr,
                      WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    C, H, W = shape
    OH, OW = out
    pixel_tiles, channel_tiles = tiles
    program = tl.program_id(0)
    image = (program // (pixel_tiles * channel_tiles)).to(tl.int64)
    rest = program % (pixel_tiles * channel_tiles)
    c = (rest % channel_tiles).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    pixel = (rest // channel_tiles).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    oy = pixel // OW
    ox = pixel % OW
    c_ok = c < C
    iy, ky = _first_tap(oy, down[0], pad[0], UP_Y)
    ix, kx = _first_tap(ox, down[1], pad[1], UP_X)
    total = tl.zeros([PIXELS, WIDTH], ACC)
    for j in range((TAPS_Y + UP_Y - 1) // UP_Y):
        row_ok = (ky + j * UP_Y < TAPS_Y) & (iy + j >= 0) & (iy + j < H) & (oy < OH)
        for i in range((TAPS_X + UP_X - 1) // UP_X):
            ok = row_ok & (kx + i * UP_X < TAPS_X) & (ix + i >= 0) & (ix + i < W)
            tap = tl.load(taps + (ky + j * UP_Y) * TAPS_X + kx + i * UP_X, ok, 0.0)
            at = tl.where(ok, (iy + j) * W + ix + i, 0)
            at = (image * H * W + at) * C + c if ROWS else (image * C + c) * H * W + at
            total += tap * tl.load(x + at, ok & c_ok, 0.0).to(ACC)
    at = (image * OH * OW + pixel) * C + c if ROWS else (image * C + c) * OH * OW + pixel
    tl.store(y + at, total, (oy < OH) & c_ok)


def upfirdn2d(x: Tensor, f: Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int], flip_filter: bool,
              gain: float) -> Tensor:  # fmt: skip
    """The operator; up and down are [x, y], the padding [x_before, x_after, y_before, y_after]."""
    taps = f.to(torch.float64 if x.dtype == torch.float64 else torch.float32) * gain ** (f.dim() / 2)
    taps = taps if flip_filter else taps.flip(list(range(f.dim())))
    left, right, top, bottom = padding
    if f.dim() == 2:
        return _resample(x, taps, up, down, padding)
    x = _resample(x, taps[None], (up[0], 1), (down[0], 1), (left, right, 0, 0))
    return _resample(x, taps[:, None], (1, up[1]), (1, down[1]), (0, 0, top, bottom))


def _resample(x: Tensor, taps: Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int]) -> Tensor:
    rows = not x.is_contiguous() and x.stride(1) == 1
    layout = torch.channels_last if rows else torch.contiguous_format
    x = x.contiguous(memory_format=layout)
    n, channels, height, width = x.shape
    taps_y, taps_x = taps.shape
    out_y = (height * up[1] + padding[2] + padding[3] - taps_y) // down[1] + 1
    out_x = (width * up[0] + padding[0] + padding[1] - taps_x) // down[0] + 1
    y = torch.empty(n, channels, out_y, out_x, dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel() == 0:
        return y
    across = min(_ROW_CHANNELS, triton.next_power_of_2(channels)) if rows else 1
    options: dict[str, Any] = {"ROWS": rows, "PIXELS": _TILE // across, "WIDTH": across, "num_warps": _WARPS}
    tiles = (triton.cdiv(out_y * out_x, _TILE // across), triton.cdiv(channels, across))
    _upfirdn2d_kernel[(n * tiles[0] * tiles[1],)](
        x, taps.contiguous(), y, (channels, height, width), (out_y, out_x), tuple(down[::-1]),
        (padding[2], padding[0]), tiles, UP_Y=up[1], UP_X=up[0], TAPS_Y=taps_y, TAPS_X=taps_x,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32, **options,
    )  # fmt: skip
    return y
