"""Normalisation by the statistics of one sample, residual and activation in one operator, with its first and second
derivatives.

    y = act((x - mean) / sqrt(var + eps) * weight + bias + residual),    act in {"none", "relu", "leaky_relu"}

A unit is what shares a mean and a variance: a group of neighbouring channels of one sample, a channel in instance norm, a
whole sample in layer norm. The data are cut into tiles, units × rows × columns:

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

from fastgan_kernels._norm import (
    MAX_SPLITS,
    PROGRAMS,
    ROW_CHANNELS,
    activate,
    combine,
    dense,
    is_channels_last,
    load,
)

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


# ----------------------------------------------------------------------------------------------------- input and output


@triton.jit
def _owner(shape, blocks, UNITS: tl.constexpr):
    """The program's sample and groups, and its block among the `blocks` of these."""
    groups = shape[0]
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(groups, UNITS)
    unit = program // blocks
    g = unit % across * UNITS + tl.arange(0, UNITS)[:, None, None]
    return unit // across, g, program % blocks


@triton.jit
def _tile(n, g, k, p, shape, LAYOUT: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
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
def _tile_size(k, p, shape, LAYOUT: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """How many elements of each unit are in a tile."""
    if LAYOUT == "rows":
        rows, cols = shape[1] - p * HEIGHT, GROUP - k * WIDTH
    else:
        rows, cols = GROUP - k * HEIGHT, shape[1] - p * WIDTH
    return tl.minimum(rows, HEIGHT) * tl.minimum(cols, WIDTH)


@triton.jit
def _parameters(g, k, p, shape, LAYOUT: tl.constexpr, GROUP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets and mask of a tile's weights and biases."""
    G, S, _C = shape
    if LAYOUT == "elements":
        c = p * WIDTH + tl.arange(0, WIDTH)[None, None, :]
        ok = c < S
    else:
        if LAYOUT == "rows":
            channel = k * WIDTH + tl.arange(0, WIDTH)[None, None, :]
        else:
            channel = k * HEIGHT + tl.arange(0, HEIGHT)[None, :, None]
        c = g * GROUP + channel
        ok = (g < G) & (channel < GROUP)
    return c, ok


@triton.jit
def _applied_tile(i, shape, blocks, LAYOUT: tl.constexpr, UNITS: tl.constexpr):
    """Sample, groups, channel block and pixel block of step i of a program that applies."""
    n, g, k = _owner(shape, blocks, UNITS)
    p = i.to(tl.int64)
    if LAYOUT == "elements":
        n, p = p, tl.program_id(0).to(tl.int64)
    return n, g, k, p


# ---------------------------------------------------------------------------------------------------------- mathematics


@triton.jit
def _unit_sum(tile):
    return tl.sum(tl.sum(tile, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def _parameter_sum(tile, LAYOUT: tl.constexpr):
    if LAYOUT != "elements":
        tile = tl.sum(tile, 1 if LAYOUT == "rows" else 2, keep_dims=True)
    return tile


@triton.jit
def _moments(x, ok, count, ACC: tl.constexpr):
    """Mean, as a shift and an offset, and biased variance of units that are held whole: two passes over registers."""
    m = tl.full([1, 1, 1], count, ACC)
    shift = _unit_sum(x) / m
    offset = _unit_sum(tl.where(ok, x - shift, 0.0)) / m
    d = tl.where(ok, x - shift - offset, 0.0)
    return shift, offset, _unit_sum(d * d) / m


@triton.jit
def _statistics(mean, var, eps, count, ACC: tl.constexpr):
    """The mean as rounded, what rounding took from it, and (var + eps)^-1/2: 0 for a unit of one element.

    That is its own mean, and with 0 in place of what eps decides its gradients are exactly 0.
    """
    center = mean.to(ACC)
    r = tl.rsqrt(var.to(ACC) + tl.full(var.shape, eps, ACC))
    return center, (mean - center.to(mean.dtype)).to(ACC), tl.where(count > 1, r, 0.0)


@triton.jit
def _load_statistics(mean, var, n, g, shape, eps, count, ACC: tl.constexpr):
    unit = n * shape[0] + g
    ok = g < shape[0]
    return _statistics(tl.load(mean + unit, ok, 0.0), tl.load(var + unit, ok, 0.0), eps, count, ACC)


@triton.jit
def _normalise(x, residual, w, b, statistics, at, ok, ACC: tl.constexpr):
    """The normalised xh, and what the activation is applied to."""
    center, rest, r = statistics
    xh = (x - center - rest) * r
    return xh, xh * w + b + load(residual, at, ok, 0.0, ACC)


@triton.jit
def _gradient(grad_y, x, residual, w, b, statistics, slope, at, ok, ACT: tl.constexpr, ACC: tl.constexpr):
    g = load(grad_y, at, ok, 0.0, ACC)
    xh, pre = _normalise(load(x, at, ok, 0.0, ACC), residual, w, b, statistics, at, ok, ACC)
    return xh, pre, activate(pre, g, slope, ACT, ACC)


@triton.jit
def _load_sums(sums, FIELD: tl.constexpr, n, g, shape, units, ACC: tl.constexpr):
    return load(sums, FIELD * units + n * shape[0] + g, g < shape[0], 0.0, ACC)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _moments_kernel(x, partial, units, shape, tiles, pixel_blocks, LAYOUT: tl.constexpr, GROUP: tl.constexpr,
                    UNITS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Count, mean as a shift and an offset, and sum of squared deviations over each program's tiles.

    The shift is the mean of the first tile. As that is part of the data, cancellation can cost the variance no more
    than a factor of the number of tiles.
    """
    n, group, _ = _owner(shape, 1, UNITS)
    t = tl.program_id(1).to(tl.int64)
    k, p = t // pixel_blocks, t % pixel_blocks
    at, ok = _tile(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    size = _tile_size(k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    shift = _unit_sum(load(x, at, ok, 0.0, ACC)) / size.to(ACC)
    count = size * 0
    total = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    square = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    while t < tiles:
        k, p = t // pixel_blocks, t % pixel_blocks
        at, ok = _tile(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        d = tl.where(ok, load(x, at, ok, 0.0, ACC) - shift, 0.0)
        count += _tile_size(k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        total += d
        square += d * d
        t += tl.num_programs(1)
    m = count.to(ACC)
    offset = _unit_sum(total) / m
    u_ok = group < shape[0]
    at = partial + tl.program_id(1).to(tl.int64) * units + n * shape[0] + group
    field = tl.num_programs(1).to(tl.int64) * units
    tl.store(at, tl.full([UNITS, 1, 1], 0.0, ACC) + m, u_ok)
    tl.store(at + field, shift, u_ok)
    tl.store(at + 2 * field, offset, u_ok)
    tl.store(at + 3 * field, _unit_sum(square) - m * offset * offset, u_ok)


@triton.jit
def _forward_kernel(x, weight, bias, residual, mean, var, y, eps: tl.float64, slope: tl.float64, count: tl.float64,
                    shape, steps, blocks, WHOLE: tl.constexpr, ACT: tl.constexpr, LAYOUT: tl.constexpr,
                    GROUP: tl.constexpr, UNITS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                    ACC: tl.constexpr):  # fmt: skip
    i = tl.program_id(1)
    n, group, k, p = _applied_tile(i, shape, blocks, LAYOUT, UNITS)
    c, c_ok = _parameters(group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    w = load(weight, c, c_ok, 1.0, ACC)
    b = load(bias, c, c_ok, 0.0, ACC)
    while i < steps:
        n, group, k, p = _applied_tile(i, shape, blocks, LAYOUT, UNITS)
        at, ok = _tile(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        values = load(x, at, ok, 0.0, ACC)
        if WHOLE:
            shift, offset, spread = _moments(values, ok, count, ACC)
            exact = shift.to(mean.dtype.element_ty) + offset.to(mean.dtype.element_ty)
            u = n * shape[0] + group
            tl.store(mean + u, exact, group < shape[0])
            tl.store(var + u, spread, group < shape[0])
            statistics = _statistics(exact, spread, eps, count, ACC)
        else:
            statistics = _load_statistics(mean, var, n, group, shape, eps, count, ACC)
        _, pre = _normalise(values, residual, w, b, statistics, at, ok, ACC)
        tl.store(y + at, activate(pre, pre, slope, ACT, ACC), ok)
        i += tl.num_programs(1)


@triton.jit
def _sums_kernel(grad_y, x, weight, bias, residual, mean, var, ggx, ggw, partial, eps: tl.float64, slope: tl.float64,
                 count: tl.float64, units, shape, tiles, pixel_blocks, DOUBLE: tl.constexpr, ACT: tl.constexpr,
                 LAYOUT: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, HEIGHT: tl.constexpr,
                 WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Sums over each program's tiles of h = weight g and h xh and, if DOUBLE, of v = ggx, v xh, v h, and of m = ggw g and
    m xh."""
    n, group, _ = _owner(shape, 1, UNITS)
    statistics = _load_statistics(mean, var, n, group, shape, eps, count, ACC)
    h_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    hx_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    v_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    vx_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    vh_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    m_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    mx_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    t = tl.program_id(1).to(tl.int64)
    while t < tiles:
        k, p = t // pixel_blocks, t % pixel_blocks
        at, ok = _tile(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        c, c_ok = _parameters(group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        w = load(weight, c, c_ok, 1.0, ACC)
        b = load(bias, c, c_ok, 0.0, ACC)
        xh, _pre, g = _gradient(grad_y, x, residual, w, b, statistics, slope, at, ok, ACT, ACC)
        h_sum += w * g
        hx_sum += w * g * xh
        if ggx is not None:
            v = load(ggx, at, ok, 0.0, ACC)
            v_sum += v
            vx_sum += v * xh
            vh_sum += v * (w * g)
        if ggw is not None:
            m = load(ggw, c, c_ok, 0.0, ACC) * g
            m_sum += m
            mx_sum += m * xh
        t += tl.num_programs(1)
    u_ok = group < shape[0]
    at = partial + tl.program_id(1).to(tl.int64) * units + n * shape[0] + group
    field = tl.num_programs(1).to(tl.int64) * units
    tl.store(at, _unit_sum(h_sum), u_ok)
    tl.store(at + field, _unit_sum(hx_sum), u_ok)
    if DOUBLE:
        tl.store(at + 2 * field, _unit_sum(v_sum), u_ok)
        tl.store(at + 3 * field, _unit_sum(vx_sum), u_ok)
        tl.store(at + 4 * field, _unit_sum(vh_sum), u_ok)
        tl.store(at + 5 * field, _unit_sum(m_sum), u_ok)
        tl.store(at + 6 * field, _unit_sum(mx_sum), u_ok)


@triton.jit
def _store_parameter_sums(partial, FIELD: tl.constexpr, n, c, c_ok, tile, samples, parameters, LAYOUT: tl.constexpr):
    """What a program adds to its parameters' gradients, as a row of partial: one row for each split, and of channels for
    each split and sample."""
    split = tl.program_id(1).to(tl.int64)
    row = split if LAYOUT == "elements" else split * samples + n
    rows = tl.num_programs(1) if LAYOUT == "elements" else tl.num_programs(1) * samples
    tl.store(partial + (FIELD * rows.to(tl.int64) + row) * parameters + c, _parameter_sum(tile, LAYOUT), c_ok)


@triton.jit
def _backward_kernel(grad_y, x, weight, bias, residual, mean, var, sums, grad_x, grad_residual, partial,
                     eps: tl.float64, slope: tl.float64, count: tl.float64, samples, parameters, units, shape, steps,
                     blocks, WHOLE: tl.constexpr, ACT: tl.constexpr, LAYOUT: tl.constexpr, GROUP: tl.constexpr,
                     UNITS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    i = tl.program_id(1)
    n, group, k, p = _applied_tile(i, shape, blocks, LAYOUT, UNITS)
    c, c_ok = _parameters(group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    w = load(weight, c, c_ok, 1.0, ACC)
    b = load(bias, c, c_ok, 0.0, ACC)
    g_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    gx_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    while i < steps:
        n, group, k, p = _applied_tile(i, shape, blocks, LAYOUT, UNITS)
        at, ok = _tile(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        statistics = _load_statistics(mean, var, n, group, shape, eps, count, ACC)
        xh, _pre, g = _gradient(grad_y, x, residual, w, b, statistics, slope, at, ok, ACT, ACC)
        if partial is not None:
            g_sum += g
            gx_sum += g * xh
        if grad_residual is not None:
            tl.store(grad_residual + at, g, ok)
        if grad_x is not None:
            h = w * g
            if WHOLE:
                h_sum = _unit_sum(h)
                hx_sum = _unit_sum(h * xh)
            else:
                h_sum = _load_sums(sums, 0, n, group, shape, units, ACC)
                hx_sum = _load_sums(sums, 1, n, group, shape, units, ACC)
            m = tl.full([1, 1, 1], count, ACC)
            tl.store(grad_x + at, statistics[2] * (h - h_sum / m - xh * (hx_sum / m)), ok)
        i += tl.num_programs(1)
    if partial is not None:
        _store_parameter_sums(partial, 0, n, c, c_ok, gx_sum, samples, parameters, LAYOUT)
        _store_parameter_sums(partial, 1, n, c, c_ok, g_sum, samples, parameters, LAYOUT)


@triton.jit
def _double_backward_kernel(ggx, ggw, ggb, ggr, grad_y, x, weight, bias, residual, mean, var, sums, g_grad_y, g_x,
                            partial, eps: tl.float64, slope: tl.float64, count: tl.float64, samples, parameters, units,
                            shape, steps, blocks, WHOLE: tl.constexpr, ACT: tl.constexpr, LAYOUT: tl.constexpr,
                            GROUP: tl.constexpr, UNITS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                            ACC: tl.constexpr):  # fmt: skip
    i = tl.program_id(1)
    n, group, k, p = _applied_tile(i, shape, blocks, LAYOUT, UNITS)
    c, c_ok = _parameters(group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    w = load(weight, c, c_ok, 1.0, ACC)
    b = load(bias, c, c_ok, 0.0, ACC)
    dw = load(ggw, c, c_ok, 0.0, ACC)
    db = load(ggb, c, c_ok, 0.0, ACC)
    gw_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    size = tl.full([1, 1, 1], count, ACC)
    while i < steps:
        n, group, k, p = _applied_tile(i, shape, blocks, LAYOUT, UNITS)
        at, ok = _tile(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        statistics = _load_statistics(mean, var, n, group, shape, eps, count, ACC)
        r = statistics[2]
        xh, pre, g = _gradient(grad_y, x, residual, w, b, statistics, slope, at, ok, ACT, ACC)
        v = load(ggx, at, ok, 0.0, ACC)
        h = w * g
        m = dw * g
        if WHOLE:
            h_mean = _unit_sum(h) / size
            hx_mean = _unit_sum(h * xh) / size
            v_mean = _unit_sum(v) / size
            vx_mean = _unit_sum(v * xh) / size
            vh_mean = _unit_sum(v * h) / size
            m_mean = _unit_sum(m) / size
            mx_mean = _unit_sum(m * xh) / size
        else:
            h_mean = _load_sums(sums, 0, n, group, shape, units, ACC) / size
            hx_mean = _load_sums(sums, 1, n, group, shape, units, ACC) / size
            v_mean = _load_sums(sums, 2, n, group, shape, units, ACC) / size
            vx_mean = _load_sums(sums, 3, n, group, shape, units, ACC) / size
            vh_mean = _load_sums(sums, 4, n, group, shape, units, ACC) / size
            m_mean = _load_sums(sums, 5, n, group, shape, units, ACC) / size
            mx_mean = _load_sums(sums, 6, n, group, shape, units, ACC) / size

        pv = r * (v - v_mean - xh * vx_mean)
        gw_sum += g * pv
        gg = w * pv + dw * xh + db + load(ggr, at, ok, 0.0, ACC)
        tl.store(g_grad_y + at, activate(pre, gg, slope, ACT, ACC), ok)

        z = m - r * (vx_mean * h + hx_mean * v)
        z_mean = m_mean - r * (vx_mean * h_mean + hx_mean * v_mean)
        zx_mean = mx_mean - 2 * r * vx_mean * hx_mean
        curvature = zx_mean + r * (vh_mean - v_mean * h_mean - vx_mean * hx_mean)
        tl.store(g_x + at, r * (z - z_mean - xh * curvature), ok)
        i += tl.num_programs(1)
    _store_parameter_sums(partial, 0, n, c, c_ok, gw_sum, samples, parameters, LAYOUT)


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
    if second is None:
        tl.store(first + c, total, c < columns)
    else:
        tl.store(first + c, total, (c < columns) & (field == 0))
        tl.store(second + c, total, (c < columns) & (field == 1))


# --------------------------------------------------------------------------------------------------------------- launch


class _Plan:
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
        maxnreg = min(255, 2048 // common["num_warps"])
        self.sum_options = {"samples": n, "parameters": self.parameters, "units": self.units, "maxnreg": maxnreg}

    def dense(self, *tensors: Tensor | None) -> list[Any]:
        """The tensors, copied where their memory is not in the plan's order."""
        return dense(self.channels_last, *tensors)

    def parameter(self, *tensors: Tensor | None) -> list[Any]:
        """Likewise parameters, which have the order of a sample where they belong to elements."""
        if not self.channels_last:
            return dense(False, *tensors)
        return [t if t is None else t.contiguous() if t.dim() == 1 else dense(True, t[None])[0] for t in tensors]


_cached_plan = lru_cache(maxsize=4096)(_Plan)


def _plan(order: str, x: Tensor, groups: int, *parameters: Tensor | None) -> _Plan:
    # A sample of channels of one element, in one group, is one of elements that have parameters of their own.
    single = groups == 1 and x.shape[1:].numel() == x.shape[1]
    per_element = single or any(p is not None and p.dim() > 1 for p in parameters)
    return _cached_plan(order, x.shape, groups, is_channels_last(x), per_element, x.dtype)


class _ParameterGradients:
    """Gradients of `count` parameters: what each program adds to them, and their sum in the order and the dtype of the
    parameters."""

    def __init__(self, plan: _Plan, x: Tensor, weight: Tensor | None, bias: Tensor | None, count: int) -> None:
        self.plan, self.x = plan, x
        given = next((p for p in (weight, bias) if p is not None), None)
        self.shape = x.shape[1:2] if given is None else given.shape
        self.dtype = plan.dtype if weight is None else weight.dtype
        self.partial = x.new_empty((count, plan.partial_rows, plan.parameters), dtype=plan.dtype)

    def added(self) -> list[Tensor]:
        count, rows, columns = self.partial.shape
        like = self.x[:1] if len(self.shape) > 1 else self.x.new_empty(columns)
        found = [torch.empty_like(like, dtype=self.dtype) for _ in range(count)]
        _add_kernel[(triton.cdiv(columns, _ADDED_COLUMNS), count)](
            self.partial, found[0], found[1] if count > 1 else None, rows, columns,
            HEIGHT=min(_ADDED_ROWS, triton.next_power_of_2(rows)), WIDTH=_ADDED_COLUMNS,
        )  # fmt: skip
        return [grad.contiguous().view(self.shape) for grad in found]


def group_norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_groups: int,
    eps: float,
    act: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), as (y, mean, var).

    x: (N, C, *spatial), float32, bfloat16, float16 or float64; y has its dtype and layout, residual its shape.
    weight, bias: (C,) or, with one group, x's shape without N; in any of these dtypes.
    act: "none", "relu" or "leaky_relu".

    mean and var, which is biased, are (N, num_groups) in float64: rounded to float32, a huge mean is off by more than the
    values of a narrow unit differ.
    """
    plan = _plan("forward", x, num_groups, weight, bias)
    x, residual = plan.dense(x, residual)
    weight, bias = plan.parameter(weight, bias)
    y = torch.empty_like(x)
    mean, var = (x.new_empty((plan.samples, num_groups), dtype=torch.float64) for _ in range(2))
    with torch.cuda.device_of(x):
        if not plan.whole:
            partial = x.new_empty((4, plan.splits, plan.units), dtype=plan.dtype)
            _moments_kernel[plan.reduce_grid](x, partial, **plan.reduce_options)
            combine(partial, mean, var)
        _forward_kernel[plan.apply_grid](
            x, weight, bias, residual, mean, var, y, eps, negative_slope, ACT=act, **plan.apply_options
        )
    return y, mean, var


def group_norm_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    negative_slope: float,
    needs_x: bool,
    needs_params: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias, grad_residual); what is not needed comes back empty, and is not computed.

    With r = (var + eps)^-1/2, xh = (x - mean) r, g = act'(xh weight + bias + residual) grad_y, h = weight g, and means
    over a unit written E:

        grad_residual = g,  grad_bias = sum g,  grad_weight = sum g xh,  grad_x = r (h - E[h] - xh E[h xh]).

    Shapes and dtypes are those of the forward. grad_weight and grad_bias have weight's dtype or, without a weight, that
    of accumulation.
    """
    plan = _plan("backward", x, mean.shape[1], weight, bias)
    grad_y, x, residual = plan.dense(grad_y, x, residual)
    grads = _ParameterGradients(plan, x, weight, bias, 2) if needs_params else None
    inputs = (grad_y, x, *plan.parameter(weight, bias), residual, *dense(False, mean, var))
    grad_x, grad_residual = (torch.empty_like(x) if needed else None for needed in (needs_x, needs_residual))
    with torch.cuda.device_of(x):
        sums = None
        if needs_x and not plan.whole:
            sums = _split_sums(plan, inputs, None, None, eps, act, negative_slope, fields=2)
        _backward_kernel[plan.apply_grid](
            *inputs, sums, grad_x, grad_residual, None if grads is None else grads.partial, eps, negative_slope,
            ACT=act, **plan.sum_options, **plan.apply_options,
        )  # fmt: skip
        grad_weight, grad_bias = (None, None) if grads is None else grads.added()
    grad_x, grad_weight, grad_bias, grad_residual = (
        x.new_empty(0) if grad is None else grad for grad in (grad_x, grad_weight, grad_bias, grad_residual)
    )
    return grad_x, grad_weight, grad_bias, grad_residual


def group_norm_act_double_backward(
    ggx: Tensor | None,
    ggw: Tensor | None,
    ggb: Tensor | None,
    ggr: Tensor | None,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(ggx grad_x) + sum(ggw grad_weight) + sum(ggb grad_bias) + sum(ggr grad_residual).

    They are with respect to grad_y, x and weight, and any gg may be None. In the terms of group_norm_act_backward, with
    v = ggx, s = act', P(v) = r (v - E[v] - xh E[v xh]), which is its own adjoint, and

        z = ggw g - r (E[v xh] h + E[h xh] v),    K = E[v h] - E[v] E[h] - E[v xh] E[h xh]:

        g_grad_y = s (weight P(v) + ggw xh + ggb + ggr),    g_weight = sum g P(v),    g_x = P(z) - r^2 K xh.

    ggx and ggr have x's shape, ggw and ggb weight's, and so has g_weight, in weight's dtype or, without a weight, that of
    accumulation.
    """
    plan = _plan("double backward", x, mean.shape[1], weight, bias)
    ggx, ggr, grad_y, x, residual = plan.dense(ggx, ggr, grad_y, x, residual)
    grads = _ParameterGradients(plan, x, weight, bias, 1)
    ggw, ggb, weight, bias = plan.parameter(ggw, ggb, weight, bias)
    inputs = (grad_y, x, weight, bias, residual, *dense(False, mean, var))
    g_grad_y, g_x = torch.empty_like(x), torch.empty_like(x)
    with torch.cuda.device_of(x):
        sums = None
        if not plan.whole:
            sums = _split_sums(plan, inputs, ggx, ggw, eps, act, negative_slope, fields=7)
        _double_backward_kernel[plan.apply_grid](
            ggx, ggw, ggb, ggr, *inputs, sums, g_grad_y, g_x, grads.partial, eps, negative_slope,
            ACT=act, **plan.sum_options, **plan.apply_options,
        )  # fmt: skip
        (g_weight,) = grads.added()
    return g_grad_y, g_x, g_weight


def _split_sums(
    plan: _Plan,
    inputs: tuple,
    ggx: Tensor | None,
    ggw: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
    fields: int,
) -> Tensor:
    """Every unit's sums, (2 or 7, units)."""
    partial = inputs[1].new_empty((fields, plan.splits, plan.units), dtype=plan.dtype)
    _sums_kernel[plan.reduce_grid](
        *inputs, ggx, ggw, partial, eps, negative_slope, plan.count, DOUBLE=fields == 7, ACT=act, **plan.reduce_options
    )
    return partial.sum(1) if plan.splits > 1 else partial
