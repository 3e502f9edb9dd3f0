"""Units: what shares a mean and a variance within one sample. How they are cut into tiles, and into programs; their
statistics and sums.

The data are cut into tiles, units × rows × columns:

    planes    (contiguous)     a row is a channel, a column a pixel
    rows      (channels_last)  a row is a pixel, a column a channel
    elements  (either)         one row; a column is an element of a sample, with a weight and a bias of its own

A unit that fits one tile is read once: one program holds it in its registers while it sums and while it applies. Of a
larger one several programs leave partial sums in a buffer, which are added in a fixed order before a second launch
applies. There a program keeps to some channels, or to some elements of every sample, whose parameters' gradients it sums
on the way.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan_kernels._norm import MAX_SPLITS, PROGRAMS, ROW_CHANNELS, dense, is_channels_last, load

# Elements to a tile: of a large unit, of one whose elements have parameters of their own, so that more programs share
# them, and at most of a unit that is held in registers, with as many warps as leave these to each thread: every order
# holds more tensors than the one before.
_TILE = 2048
_ELEMENT_TILE = 1024
_WHOLE = {"forward": 16384, "backward": 8192, "double backward": 4096}
_WHOLE_WARPS = {"forward": 16, "backward": 16, "double backward": 8}
_ELEMENTS_PER_WARP = 256
# What one access to HBM brings.
_ROW_BYTES = 64
# Each program that sums gradients of elements leaves as many partial sums as it has elements: no more programs than four
# to each multiprocessor of an H100.
_SUMMING_PROGRAMS = 528
_ADDED_ROWS, _ADDED_COLUMNS = 16, 128
# CUDA's limit of a grid's second dimension.
_MAX_GRID = 65535


# ---------------------------------------------------------------------------------------------------------------- tiles


@triton.jit
def owner(shape, blocks, UNITS: tl.constexpr):
    """The program's sample and groups, and its block among the `blocks` of these."""
    groups = shape[0]
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(groups, UNITS)
    unit = program // blocks
    g = unit % across * UNITS + tl.arange(0, UNITS)[:, None, None]
    return unit // across, g, program % blocks


@triton.jit
def tile_at(n, g, k, p, shape, LAYOUT: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets, in int64 and never negative, and mask of channel block k and pixel block p of the groups g of sample n."""
    G, S, C = shape
    row = tl.arange(0, HEIGHT)[None, :, None]
    col = tl.arange(0, WIDTH)[None, None, :]
    if LAYOUT == "rows":
        row += p * HEIGHT
        if WIDTH < GROUP:  # else k is 0, which the compiler cannot know
            col = col + k * WIDTH
        at = (n * S + row) * C + g * GROUP + col
        ok = (g < G) & (row < S) & (col < GROUP)
    else:
        row += k * HEIGHT
        col += p * WIDTH
        at = (n * C + g * GROUP + row) * S + col
        ok = (g < G) & (row < GROUP) & (col < S)
    return at, ok


@triton.jit
def tile_size(k, p, shape, LAYOUT: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """How many elements of each unit are in a tile."""
    if LAYOUT == "rows":
        rows, cols = shape[1] - p * HEIGHT, GROUP - k * WIDTH
    else:
        rows, cols = GROUP - k * HEIGHT, shape[1] - p * WIDTH
    return tl.minimum(rows, HEIGHT) * tl.minimum(cols, WIDTH)


@triton.jit
def applied_tile(i, shape, blocks, LAYOUT: tl.constexpr, UNITS: tl.constexpr):
    """Sample, groups, channel block and pixel block of step i of a program that applies."""
    n, g, k = owner(shape, blocks, UNITS)
    p = i.to(tl.int64)
    if LAYOUT == "elements":
        n, p = p, tl.program_id(0).to(tl.int64)
    return n, g, k, p


# ----------------------------------------------------------------------------------------------------------------- sums


@triton.jit
def unit_sum(tile):
    return tl.sum(tl.sum(tile, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def load_sums(sums, FIELD: tl.constexpr, n, g, shape, units, ACC: tl.constexpr):
    return load(sums, FIELD * units + n * shape[0] + g, g < shape[0], 0.0, ACC)


@triton.jit
def store_parameter_sums(partial, FIELD: tl.constexpr, n, c, c_ok, tile, samples, parameters, LAYOUT: tl.constexpr):
    """What a program adds to its parameters' gradients, as a row of partial: one row for each split, and of channels for
    each split and sample."""
    split = tl.program_id(1).to(tl.int64)
    row = split if LAYOUT == "elements" else split * samples + n
    rows = tl.num_programs(1) if LAYOUT == "elements" else tl.num_programs(1) * samples
    tl.store(partial + (FIELD * rows.to(tl.int64) + row) * parameters + c, _parameter_sum(tile, LAYOUT), c_ok)


@triton.jit
def _parameter_sum(tile, LAYOUT: tl.constexpr):
    if LAYOUT != "elements":
        tile = tl.sum(tile, 1 if LAYOUT == "rows" else 2, keep_dims=True)
    return tile


@triton.jit
def _add_kernel(partial, first, second, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The sums over the rows of partial (1 or 2, rows, columns), in order."""
    field = tl.program_id(1)
    c = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros([HEIGHT, WIDTH], partial.dtype.element_ty)
    row = tl.arange(0, HEIGHT)[:, None].to(tl.int64)
    done = 0
    while done < rows:
        at = (field.to(tl.int64) * rows + done + row) * columns + c
        total += tl.load(partial + at, (done + row < rows) & (c < columns), 0.0)
        done += HEIGHT
    total = tl.sum(total, 0, keep_dims=True)
    if second is None or field == 0:
        tl.store(first + c, total, c < columns)
    else:
        tl.store(second + c, total, c < columns)


# ----------------------------------------------------------------------------------------------------------- statistics


@triton.jit
def find_statistics(x, ok, mean, var, n, g, shape, eps, count, ACC: tl.constexpr):
    """Those of units that are held whole, stored as well."""
    shift, offset, spread = _moments(x, ok, count, ACC)
    exact = shift.to(mean.dtype.element_ty) + offset.to(mean.dtype.element_ty)
    unit = n * shape[0] + g
    tl.store(mean + unit, exact, g < shape[0])
    tl.store(var + unit, spread, g < shape[0])
    return _statistics(exact, spread, eps, count, ACC)


@triton.jit
def _moments(x, ok, count, ACC: tl.constexpr):
    """Mean, as a shift and an offset, and biased variance of units that are held whole: two passes over registers."""
    m = tl.full([1, 1, 1], count, ACC)
    shift = unit_sum(x) / m
    offset = unit_sum(tl.where(ok, x - shift, 0.0)) / m
    d = tl.where(ok, x - shift - offset, 0.0)
    return shift, offset, unit_sum(d * d) / m


@triton.jit
def store_moments(partial, units, n, g, shape, count, shift, total, square, ACC: tl.constexpr):
    """A program's row of what `combine` takes, of units of which it has read `count` elements each: total and square are
    the sums of x - shift and of its square."""
    m = count.to(ACC)
    offset = unit_sum(total) / m
    ok = g < shape[0]
    at = partial + tl.program_id(1).to(tl.int64) * units + n * shape[0] + g
    field = tl.num_programs(1).to(tl.int64) * units
    tl.store(at, tl.full(g.shape, 0.0, ACC) + m, ok)
    tl.store(at + field, shift, ok)
    tl.store(at + 2 * field, offset, ok)
    tl.store(at + 3 * field, unit_sum(square) - m * offset * offset, ok)


@triton.jit
def _statistics(mean, var, eps, count, ACC: tl.constexpr):
    """The mean as rounded, what rounding took from it, and (var + eps)^-1/2: 0 for a unit of one element.

    That is its own mean, and with 0 in place of what eps decides its gradients are exactly 0.
    """
    center = mean.to(ACC)
    r = tl.rsqrt(var.to(ACC) + tl.full(var.shape, eps, ACC))
    return center, (mean - center.to(mean.dtype)).to(ACC), tl.where(count > 1, r, 0.0)


@triton.jit
def load_statistics(mean, var, n, g, shape, eps, count, ACC: tl.constexpr):
    unit = n * shape[0] + g
    ok = g < shape[0]
    return _statistics(tl.load(mean + unit, ok, 0.0), tl.load(var + unit, ok, 0.0), eps, count, ACC)


# --------------------------------------------------------------------------------------------------------------- launch


class Plan:
    """How one order of tensors of one shape and layout is cut into tiles and programs."""

    def __init__(
        self, order: str, size: torch.Size, groups: int, channels_last: bool, per_element: bool, dtype: torch.dtype
    ) -> None:
        n, c, s = size[0], size[1], size[2:].numel()
        self.channels_last = channels_last
        if per_element:
            groups, c, s = 1, 1, c * s
        d = c // groups
        rows = channels_last and not per_element
        self.samples, self.units, self.parameters = n, n * groups, s if per_element else c
        self.count = float(d * s)
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32

        outer, inner = (s, d) if rows else (d, s)
        height, width = triton.next_power_of_2(outer), triton.next_power_of_2(inner)
        most_units = triton.next_power_of_2(groups)
        narrow = min(most_units, triton.next_power_of_2(triton.cdiv(_ROW_BYTES, d * dtype.itemsize)) if rows else 1)
        self.whole = narrow * height * width <= _WHOLE[order] // (4 if dtype == torch.float64 else 1)
        if self.whole:
            units = min(most_units, max(narrow, _TILE // (height * width)))
        else:
            tile = _ELEMENT_TILE if per_element else _TILE
            width = min(width, ROW_CHANNELS if rows else tile)
            units = min(most_units, max(1, ROW_CHANNELS // width)) if rows else 1
            height = min(height, max(1, tile // (units * width)))
        down, across = triton.cdiv(outer, height), triton.cdiv(inner, width)
        channel_blocks, pixel_blocks = (across, down) if rows else (down, across)

        owners, tiles = n * triton.cdiv(groups, units), channel_blocks * pixel_blocks
        self.splits = max(1, min(tiles, MAX_SPLITS, triton.cdiv(PROGRAMS, max(owners, 1))))
        self.reduce_grid = (owners, self.splits)
        if per_element:
            steps, programs = n, pixel_blocks
            most = _MAX_GRID if order == "forward" else triton.cdiv(_SUMMING_PROGRAMS, programs)
        else:
            steps, programs = pixel_blocks, owners * channel_blocks
            most = triton.cdiv(PROGRAMS, max(programs, 1))
        self.apply_grid = (programs, min(steps, most))
        self.partial_rows = min(steps, most) * (1 if per_element else n)

        elements = units * height * width
        common: dict[str, Any] = {
            "shape": (groups, s, c),
            "LAYOUT": "elements" if per_element else "rows" if rows else "planes",
            "GROUP": d,
            "UNITS": units,
            "HEIGHT": height,
            "WIDTH": width,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "num_warps": min(max(elements // _ELEMENTS_PER_WARP, 1), _WHOLE_WARPS[order]),
        }
        self.reduce_options = {"units": self.units, "tiles": tiles, "pixel_blocks": pixel_blocks, **common}
        self.apply_options = {
            "count": self.count, "steps": steps, "blocks": channel_blocks, "WHOLE": self.whole, **common
        }  # fmt: skip
        # All the registers that there are: of its own accord ptxas spills, to have more warps at a time.
        self.registers = {"maxnreg": min(255, 2048 // common["num_warps"])} if torch.version.hip is None else {}
        self.sum_options = {"samples": n, "parameters": self.parameters, "units": self.units, **self.registers}

    def dense(self, *tensors: Tensor | None) -> list[Any]:
        """The tensors, copied where their memory is not in the plan's order."""
        return dense(self.channels_last, *tensors)

    def parameter(self, *tensors: Tensor | None) -> list[Any]:
        """Likewise parameters, which have the order of a sample where they belong to elements."""
        if not self.channels_last:
            return dense(False, *tensors)
        return [t if t is None else t.contiguous() if t.dim() == 1 else dense(True, t[None])[0] for t in tensors]


_cached_plan = lru_cache(maxsize=4096)(Plan)


def plan_of(order: str, x: Tensor, groups: int, per_element: bool = False) -> Plan:
    return _cached_plan(order, x.shape, groups, is_channels_last(x), per_element, x.dtype)


def add_rows(partial: Tensor, found: list[Tensor]) -> None:
    """found[i] = the sums over the rows of partial[i], of which there are one or two, in order."""
    count, rows, columns = partial.shape
    _add_kernel[(triton.cdiv(columns, _ADDED_COLUMNS), count)](
        partial, found[0], found[1] if count > 1 else None, rows, columns,
        HEIGHT=min(_ADDED_ROWS, triton.next_power_of_2(rows)), WIDTH=_ADDED_COLUMNS,
    )  # fmt: skip
