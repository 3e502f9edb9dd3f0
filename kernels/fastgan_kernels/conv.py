"""Both convolutions as implicit matrix products in channels_last, with the statistics of a batch norm that follows, and with
one that comes before.

    y[o] = Σ weight[k] · x[i]   over the k for which   o = i · stride − padding + k   (transposed)
                                                    or i = o · stride − padding + k   (not),   along both axes

A program computes a tile of positions × output channels, and sums over taps × input channels, a block of channels at a
time. The positions of a transposed convolution are those of one phase: of all o with the same (o + padding) mod stride,
which have the same taps. So no product is with an inserted zero. All phases are in one grid, neighbours, which read the
same x at about the same time. An image of one pixel meets every tap at a position of its own, whatever the stride: then
each position is a phase.

On its way out a tile leaves, in float32, what `combine` makes a mean and a variance of, in a fixed order. On its way in x
may be normalised and activated as `batch_norm_act` does it, so that nobody has to write that tensor.

The gradient in x is the other kind of convolution. That in the weight is a sum over positions, in splits which are added in
a fixed order.

What has to move and to be computed, for P positions of all images at the small end (x of a transposed convolution, y of
the other), C and C' channels, and e bytes to an element: e · (x + weight + y) bytes, and 2·P·C·C'·kh·kw floating-point
operations, less those of taps that fall beside the image. The statistics add 16·C' bytes for each tile of positions, where
a pass over y would read e · y. The weight's gradient moves e · (x + y) bytes, and 8 for each of its elements in every split.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan_kernels._norm import activate_by, affine_of, combine, dense, load
from fastgan_kernels._units import add_rows


class Tile(NamedTuple):
    """What one program computes, and how much of the sums it loads at a time."""

    rows: int  # positions; input channels of a weight's gradient
    columns: int  # channels
    depth: int
    stages: int


# In float32 a depth counts half. Four warps to each: of eight, wrong results of pipelined convolutions have been reported.
TILES = {
    "128x128x64": Tile(128, 128, 64, 3),
    "128x64x64": Tile(128, 64, 64, 3),
    "64x128x64": Tile(64, 128, 64, 3),
    "64x64x64": Tile(64, 64, 64, 4),
    "128x32x32": Tile(128, 32, 32, 4),
}
WEIGHT_TILES = {
    "128x128x64": Tile(128, 128, 64, 3),
    "128x64x32": Tile(128, 64, 32, 3),
    "64x64x64": Tile(64, 64, 64, 3),
}
_WARPS = 4
# Programs that sum a weight's gradient: four to each multiprocessor of an H100, and so many steps to each at least.
_SUMMING_PROGRAMS = 528
_LEAST_STEPS = 8
# So much can be counted in 32 bits, past the end of what exists as well.
_MOST_IN_32_BITS = 1 << 30

Before = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float, str, float]
"""A batch norm and an activation of x: mean, var, weight, bias, prelu_weight, eps, act, negative_slope."""


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _phase(phase, axis: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """The first tap of a phase, the number of its taps, and how far its first input is from its first output."""
    first = (phase + PADDING[axis]) % STRIDE[axis]
    return first, (KERNEL[axis] - first + STRIDE[axis] - 1) // STRIDE[axis], (phase + PADDING[axis]) // STRIDE[axis]


@triton.jit
def _normalise(x, ok, mean, var, gain, offset, slopes, c, c_ok, eps, slope, ACT: tl.constexpr):
    """A tile of x as `batch_norm_act` leaves it, and zero where there is none; c are its columns."""
    center = load(mean, c, c_ok, 0.0, tl.float32)
    spread = load(var, c, c_ok, 0.0, tl.float32)
    center, r, w, b, slopes = affine_of(center, spread, gain, offset, slopes, c, c_ok, eps, slope, tl.float32)
    pre = (x.to(tl.float32) - center) * r * w + b
    return tl.where(ok, activate_by(pre, pre, slopes, ACT), 0.0).to(x.dtype)


@triton.jit
def _convolution_kernel(x, weight, bias, mean, var, gain, offset, slopes, y, partial, eps: tl.float64,
                        slope: tl.float64, image, out, positions, weight_strides, row_tiles, PHASES: tl.constexpr,
                        KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, TRANSPOSED: tl.constexpr,
                        ACT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                        DEPTH: tl.constexpr, INDEX: tl.constexpr):  # fmt: skip
    C, H, W = image
    OC, OH, OW = out
    N, QH, QW = positions
    of_input, of_output, of_tap = weight_strides
    program = tl.program_id(0).to(tl.int64)
    column_tiles = tl.cdiv(OC, COLUMNS)
    c = (program % column_tiles).to(tl.int32) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    phase = (program // column_tiles % (PHASES[0] * PHASES[1])).to(tl.int32)
    tile = program // column_tiles // (PHASES[0] * PHASES[1])
    # Counted from the tile's first image on, so that offsets have 32 bits.
    image_of_tile = tile * ROWS // (QH * QW)
    position = (tile * ROWS - image_of_tile * (QH * QW)).to(tl.int32) + tl.arange(0, ROWS)[:, None]
    n = position // (QH * QW)
    qy, qx = position // QW % QH, position % QW
    exists = n < tl.minimum(N - image_of_tile, ROWS + 1).to(tl.int32)
    x += image_of_tile * H * W * C
    y += image_of_tile * OH * OW * OC

    phase_y, phase_x = phase // PHASES[1], phase % PHASES[1]
    if TRANSPOSED:
        first_y, taps_y, shift_y = _phase(phase_y, 0, KERNEL, STRIDE, PADDING)
        first_x, taps_x, shift_x = _phase(phase_x, 1, KERNEL, STRIDE, PADDING)
        oy, ox = qy * STRIDE[0] + phase_y, qx * STRIDE[1] + phase_x
        start_y, start_x = qy + shift_y, qx + shift_x
    else:
        first_y, taps_y = 0, KERNEL[0]
        first_x, taps_x = 0, KERNEL[1]
        oy, ox = qy, qx
        start_y, start_x = qy * STRIDE[0] - PADDING[0], qx * STRIDE[1] - PADDING[1]

    # What a step adds to these is the same for the whole tile.
    first = tl.arange(0, DEPTH)
    of_position = ((n.to(INDEX) * H + start_y) * W + start_x) * C
    of_weights = first[:, None] * of_input + c * of_output
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    blocks = tl.cdiv(C, DEPTH)
    for step in range(taps_y * taps_x * blocks):
        tap = step // blocks
        block = step % blocks * DEPTH
        down, across = tap // taps_x, tap % taps_x
        tap_y, tap_x = down, across
        if TRANSPOSED:
            tap_y, tap_x = first_y + down * STRIDE[0], first_x + across * STRIDE[1]
            down, across = -down, -across
        iy, ix = start_y + down, start_x + across
        inside = exists & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
        # Clamped as well as masked: masked loads of negative offsets in pipelined loops have read wrong data.
        at = tl.where(inside, of_position + (down * W + across) * C, 0) + block
        k_ok = first < C - block
        of_x = tl.load(x + at + first[None, :], inside & k_ok[None, :], 0.0)
        if mean is not None:
            k = (block + first)[None, :]
            of_x = _normalise(of_x, inside & k_ok[None, :], mean, var, gain, offset, slopes, k, k < C, eps, slope, ACT)
        at = (tap_y * KERNEL[1] + tap_x) * of_tap + block * of_input
        of_weight = tl.load(weight + at + of_weights, k_ok[:, None] & (c < OC), 0.0)
        total = tl.dot(of_x, of_weight, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + c, c < OC, 0.0).to(tl.float32)

    ok = exists & (oy < OH) & (ox < OW)
    found = total.to(y.dtype.element_ty)
    tl.store(y + ((n.to(INDEX) * OH + oy) * OW + ox) * OC + c, found, ok & (c < OC))
    if partial is not None:
        _store_moments(partial, phase * row_tiles + tile, PHASES[0] * PHASES[1] * row_tiles, found, ok, c, OC)


@triton.jit
def _store_moments(partial, row, rows, found, ok, c, columns):
    """A row of what `combine` takes, of a tile as it has been rounded."""
    count = tl.sum(ok.to(tl.float32), 0, keep_dims=True)
    some = tl.maximum(count, 1.0)
    y = tl.where(ok, found.to(tl.float32), 0.0)
    shift = tl.sum(y, 0, keep_dims=True) / some
    d = tl.where(ok, y - shift, 0.0)
    offset = tl.sum(d, 0, keep_dims=True) / some
    tl.store(partial + row * columns + c, tl.zeros(c.shape, tl.float32) + count, c < columns)
    tl.store(partial + (row + rows) * columns + c, shift, c < columns)
    tl.store(partial + (row + 2 * rows) * columns + c, offset, c < columns)
    square = tl.sum(d * d, 0, keep_dims=True) - count * offset * offset
    tl.store(partial + (row + 3 * rows) * columns + c, square, c < columns)


@triton.jit
def _weight_grad_kernel(grad_y, x, mean, var, gain, offset, slopes, partial, eps: tl.float64, slope: tl.float64, image,
                        positions, span, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
                        TRANSPOSED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
                        COLUMNS: tl.constexpr, DEPTH: tl.constexpr, INDEX: tl.constexpr):  # fmt: skip
    """partial[split, r, tap, c] = Σ small[p, r] · large[p · stride − padding + tap, c] over the split's positions p.

    The large image is grad_y of a transposed convolution, else x.
    """
    C, H, W = image
    R, PH, PW, count = positions
    program = tl.program_id(0)
    taps: tl.constexpr = KERNEL[0] * KERNEL[1]
    column_tiles = tl.cdiv(C, COLUMNS)
    tap = program % taps
    c = program // taps % column_tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    r = program // taps // column_tiles * ROWS + tl.arange(0, ROWS)[:, None]
    split = tl.program_id(1).to(INDEX)
    end = tl.minimum((split + 1) * span, count)

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(span // DEPTH):
        start = split * span + step * DEPTH
        p = start + tl.arange(0, DEPTH)[None, :]
        small_ok = (p < end) & (r < R)
        of_small = tl.load((x if TRANSPOSED else grad_y) + p.to(tl.int64) * R + r, small_ok, 0.0)
        p = start + tl.arange(0, DEPTH)[:, None]
        row = p // PW
        n = row // PH
        iy = (row - n * PH) * STRIDE[0] - PADDING[0] + tap // KERNEL[1]
        ix = (p - row * PW) * STRIDE[1] - PADDING[1] + tap % KERNEL[1]
        inside = (p < end) & (iy >= 0) & (iy < H) & (ix >= 0) & (ix < W)
        at = tl.where(inside, ((n.to(tl.int64) * H + iy) * W + ix) * C, 0)
        large_ok = inside & (c < C)
        of_large = tl.load((grad_y if TRANSPOSED else x) + at + c, large_ok, 0.0)
        if mean is not None:
            if TRANSPOSED:
                of_small = _normalise(of_small, small_ok, mean, var, gain, offset, slopes, r, r < R, eps, slope, ACT)
            else:
                of_large = _normalise(of_large, large_ok, mean, var, gain, offset, slopes, c, c < C, eps, slope, ACT)
        total = tl.dot(of_small, of_large, total, input_precision=PRECISION)

    at = ((split.to(tl.int64) * R + r) * taps + tap) * C + c
    tl.store(partial + at, total, (r < R) & (c < C))


# --------------------------------------------------------------------------------------------------------------- launch


class _Plan:
    """How a convolution of one shape is cut into phases and tiles."""

    def __init__(
        self, x: torch.Size, weight: torch.Size, stride: tuple, padding: tuple, transposed: bool, output_padding: tuple
    ) -> None:
        (n, c, *size), kernel = x, tuple(weight[2:])
        if transposed:
            self.channels = weight[1]
            out = [(size[i] - 1) * stride[i] - 2 * padding[i] + kernel[i] + output_padding[i] for i in range(2)]
            stride = tuple(kernel[i] if size[i] == 1 else stride[i] for i in range(2))
            self.phases = tuple(min(stride[i], out[i]) for i in range(2))
            self.positions = (n, *(triton.cdiv(out[i], stride[i]) for i in range(2)))
        else:
            self.channels = weight[0]
            out = [(size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
            self.phases, self.positions = (1, 1), (n, *out)
        self.size = (n, self.channels, *out)
        self.options: dict[str, Any] = {
            "image": (c, *size),
            "out": (self.channels, *out),
            "positions": self.positions,
            "PHASES": self.phases,
            "KERNEL": kernel,
            "STRIDE": stride,
            "PADDING": padding,
            "TRANSPOSED": transposed,
        }


_plan = lru_cache(maxsize=4096)(_Plan)


def tiles(dtype: torch.dtype, moments: bool = False, behind_norm: bool = False) -> list[str]:
    """Those of TILES for which this GPU has registers enough: fewer if y's moments are found as well, or x normalised."""
    spilling = set()
    if moments or behind_norm or not _is_roomy(dtype):
        spilling.add("128x128x64")
    if behind_norm or (moments and _capability() == 10):
        spilling.add("128x64x64")
    return [name for name in TILES if name not in spilling]


def weight_tiles(dtype: torch.dtype) -> list[str]:
    """Those of WEIGHT_TILES, likewise."""
    return [name for name in WEIGHT_TILES if name != "128x128x64" or _is_roomy(dtype)]


def _is_roomy(dtype: torch.dtype) -> bool:
    """Whether operands go to the tensor cores from shared memory, and take no registers: in 16 bits, on Hopper."""
    return dtype.itemsize == 2 and _capability() == 9


def _capability() -> int:
    """Nvidia's major number of the GPU's compute capability: 9 is Hopper, 10 a Blackwell for data centres."""
    target = triton.runtime.driver.active.get_current_target()
    return target.arch // 10 if target.backend == "cuda" else 0


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    tile: str,
    allow_tf32: bool = False,
    before: Before | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d`, or `conv_transpose2d`, in one group and without dilation; y is channels_last.

    x: (N, C, H, W), float32, bfloat16 or float16, copied where it is not channels_last, and none of its sizes 0; weight,
    likewise, (C, C', kh, kw) if transposed, else (C', C, kh, kw), in x's dtype; bias: (C',). tile: of `tiles`.
    allow_tf32: whether float32 products may be of 10 bits; sums are float32 in any case. before: what is done to x first.
    """
    y, _ = _convolve(x, weight, bias, stride, padding, transposed, output_padding, tile, allow_tf32, before, False)
    return y


def convolution_moments(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    tile: str,
    allow_tf32: bool = False,
    before: Before | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, var): `convolution` without a bias, and y's mean and biased variance over all axes but 1, in float32.

    tile: of `tiles` with moments.
    """
    y, partial = _convolve(x, weight, None, stride, padding, transposed, output_padding, tile, allow_tf32, before, True)
    mean, var = (y.new_empty(y.shape[1], dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(x):
        combine(partial, mean, var)
    return y, mean, var


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, transposed: bool, output_padding, name: str,
    allow_tf32: bool, before: Before | None, needs_moments: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    plan = _plan(x.shape, weight.shape, tuple(stride), tuple(padding), transposed, tuple(output_padding))
    tile = TILES[name]
    x, weight = dense(True, x, weight)
    y = torch.empty(plan.size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    n, height, width = plan.positions
    row_tiles, phases = triton.cdiv(n * height * width, tile.rows), plan.phases[0] * plan.phases[1]
    partial = None
    if needs_moments:
        partial = x.new_empty((4, phases * row_tiles, plan.channels), dtype=torch.float32)
    # Rows of the weight's memory are taps, and its columns the channels of the axis 1.
    taps, columns = weight.shape[2:].numel(), weight.shape[1]
    strides = (taps * columns, 1) if transposed else (1, taps * columns)
    with torch.cuda.device_of(x):
        _convolution_kernel[(row_tiles * phases * triton.cdiv(plan.channels, tile.columns),)](
            x, weight, bias, y=y, partial=partial, row_tiles=row_tiles, weight_strides=(*strides, columns),
            INDEX=_index((tile.rows // (height * width) + 2) * max(x[0].numel(), y[0].numel())),
            **_before(before, x.shape[1]), **_products(x.dtype, allow_tf32, tile), **plan.options,
        )  # fmt: skip
    return y, partial


def convolution_weight_grad(
    grad_y: Tensor,
    x: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    transposed: bool,
    tile: str,
    allow_tf32: bool = False,
    before: Before | None = None,
) -> Tensor:
    """The gradient of `convolution` in its weight, channels_last, in x's dtype. tile: of `weight_tiles`."""
    grad_y, x = dense(True, grad_y, x)
    large, small = (grad_y, x) if transposed else (x, grad_y)
    options = _products(x.dtype, allow_tf32, WEIGHT_TILES[tile])
    rows, columns, *kernel = weight_shape
    grad = torch.empty(weight_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    n, _, height, width = small.shape
    count, taps = n * height * width, kernel[0] * kernel[1]
    programs = taps * triton.cdiv(columns, options["COLUMNS"]) * triton.cdiv(rows, options["ROWS"])
    steps = triton.cdiv(count, options["DEPTH"])
    splits = max(1, min(triton.cdiv(_SUMMING_PROGRAMS, programs), steps // _LEAST_STEPS))
    span = triton.cdiv(steps, splits) * options["DEPTH"]
    splits = triton.cdiv(count, span)
    partial = x.new_empty((1, splits, grad.numel()), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weight_grad_kernel[(programs, splits)](
            grad_y, x, partial=partial, image=(columns, *large.shape[2:]), positions=(rows, height, width, count),
            span=span, KERNEL=tuple(kernel), STRIDE=tuple(stride), PADDING=tuple(padding), TRANSPOSED=transposed,
            INDEX=_index(count), **_before(before, x.shape[1]), **options,
        )  # fmt: skip
        add_rows(partial, [grad])
    return grad


def _products(dtype: torch.dtype, allow_tf32: bool, tile: Tile) -> dict[str, Any]:
    """The options of a matrix product."""
    is_wide = dtype == torch.float32
    return {
        "PRECISION": "tf32" if is_wide and allow_tf32 else "ieee",
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth // 2 if is_wide else tile.depth,
        "num_warps": _WARPS,
        "num_stages": tile.stages,
        # Of its own accord ptxas spills, to have more warps at a time.
        **({"maxnreg": 255} if torch.version.hip is None else {}),
    }


def _index(most: int) -> Any:
    """The type to count in up to `most`: arithmetic in 64 bits takes several times as long."""
    return tl.int64 if most > _MOST_IN_32_BITS else tl.int32


def _before(before: Before | None, channels: int) -> dict[str, Any]:
    """The arguments that say what is done to x first."""
    names = ("mean", "var", "gain", "offset", "slopes")
    if before is None:
        return {**dict.fromkeys(names), "eps": 0.0, "slope": 0.0, "ACT": "none"}
    *vectors, prelu_weight, eps, act, slope = before
    slopes = None if prelu_weight is None else prelu_weight.expand(channels)
    return {**dict(zip(names, dense(False, *vectors, slopes), strict=True)), "eps": eps, "slope": slope, "ACT": act}
