"""Batch normalisation, residual and activation in one operator, with its first and second derivatives.

    y = act((x - mean) / sqrt(var + eps) * weight + bias + residual),    act in {"none", "relu", "leaky_relu", "prelu"}

Every order is one pass that sums over each channel, and one that applies per-channel coefficients to each element.
The data are cut into tiles, and the tiles of a channel dealt out to one program or to several:

    planes (contiguous)       a tile is images × pixels of one channel
    rows   (channels_last)    a tile is pixels × neighbouring channels

One program makes both passes, in a single launch. Several leave partial sums in a buffer, which are added in a fixed
order before the second pass.
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
    activate_by,
    affine_of,
    channels,
    combine,
    dense,
    is_channels_last,
    load,
    tile,
)

# Eight elements to a thread: one 16-byte load in bfloat16, and no register spilled in any kernel.
_TILE = 2048
_ELEMENTS_PER_WARP = 256
# A program waits for memory once per tile and pass; up to here that costs less than two more launches.
_TILES_IN_ONE_PROGRAM = 8


# ---------------------------------------------------------------------------------------------------------- mathematics


@triton.jit
def _normalise(x, residual, affine, at, ok, ACC: tl.constexpr):
    """The normalised xh, and what the activation is applied to."""
    mean, r, w, b, _ = affine
    xh = (load(x, at, ok, 0.0, ACC) - mean) * r
    return xh, xh * w + b + load(residual, at, ok, 0.0, ACC)


@triton.jit
def _gradient(grad_y, x, residual, affine, at, ok, ACT: tl.constexpr, ACC: tl.constexpr):
    of_y = load(grad_y, at, ok, 0.0, ACC)
    xh, pre = _normalise(x, residual, affine, at, ok, ACC)
    return xh, pre, of_y, activate_by(pre, of_y, affine[4], ACT)


@triton.jit
def _sum(tile, ROWS: tl.constexpr):
    return tl.sum(tile, 0 if ROWS else None, keep_dims=True)


@triton.jit
def _moments(x, group, shape, tiles, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Count, mean as a shift and an offset, and sum of squared deviations over the program's tiles.

    The shift is the mean of the first tile. As that is part of the data, cancellation can cost the variance no more
    than a factor of the number of tiles.
    """
    t = tl.program_id(1)
    at, ok = tile(t, group, shape, ROWS, HEIGHT, WIDTH)
    shift = _sum(load(x, at, ok, 0.0, ACC), ROWS) / _sum(ok.to(ACC), ROWS)
    count = tl.zeros([HEIGHT, WIDTH], ACC)
    total = tl.zeros([HEIGHT, WIDTH], ACC)
    square = tl.zeros([HEIGHT, WIDTH], ACC)
    while t < tiles:
        at, ok = tile(t, group, shape, ROWS, HEIGHT, WIDTH)
        d = tl.where(ok, load(x, at, ok, 0.0, ACC) - shift, 0.0)
        count += ok.to(ACC)
        total += d
        square += d * d
        t += tl.num_programs(1)
    n = _sum(count, ROWS)
    offset = _sum(total, ROWS) / n
    return n, shift, offset, _sum(square, ROWS) - n * offset * offset


@triton.jit
def _sums(grad_y, x, residual, ggx, affine, group, shape, tiles, ACT: tl.constexpr, ROWS: tl.constexpr,
          HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Sums over the program's tiles of g, g·xh and, with v = ggx, of v, v·xh, v·g; without it, of what prelu_weight gets."""
    g_sum = tl.zeros([HEIGHT, WIDTH], ACC)
    gx_sum = tl.zeros([HEIGHT, WIDTH], ACC)
    v_sum = tl.zeros([HEIGHT, WIDTH], ACC)
    vx_sum = tl.zeros([HEIGHT, WIDTH], ACC)
    vg_sum = tl.zeros([HEIGHT, WIDTH], ACC)
    p_sum = tl.zeros([HEIGHT, WIDTH], ACC)
    t = tl.program_id(1)
    while t < tiles:
        at, ok = tile(t, group, shape, ROWS, HEIGHT, WIDTH)
        xh, pre, of_y, g = _gradient(grad_y, x, residual, affine, at, ok, ACT, ACC)
        g_sum += g
        gx_sum += g * xh
        if ACT == "prelu" and ggx is None:
            p_sum += tl.where(pre > 0, 0.0, of_y * pre)
        if ggx is not None:
            v = load(ggx, at, ok, 0.0, ACC)
            v_sum += v
            vx_sum += v * xh
            vg_sum += v * g
        t += tl.num_programs(1)
    g, gx, p = _sum(g_sum, ROWS), _sum(gx_sum, ROWS), _sum(p_sum, ROWS)
    return g, gx, p, _sum(v_sum, ROWS), _sum(vx_sum, ROWS), _sum(vg_sum, ROWS)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _moments_kernel(x, partial, shape, tiles, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                    ACC: tl.constexpr):  # fmt: skip
    group, c, c_ok = channels(shape, ROWS, WIDTH)
    n, shift, offset, square = _moments(x, group, shape, tiles, ROWS, HEIGHT, WIDTH, ACC)
    at = partial + tl.program_id(1) * shape[1] + c
    field = tl.num_programs(1) * shape[1]
    tl.store(at, n, c_ok)
    tl.store(at + field, shift, c_ok)
    tl.store(at + 2 * field, offset, c_ok)
    tl.store(at + 3 * field, square, c_ok)


@triton.jit
def _forward_kernel(x, weight, bias, residual, prelu_weight, mean, var, y, eps: tl.float64, slope: tl.float64,
                    shape, tiles, REDUCE: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr,
                    WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    group, c, c_ok = channels(shape, ROWS, WIDTH)
    if REDUCE:
        n, shift, offset, square = _moments(x, group, shape, tiles, ROWS, HEIGHT, WIDTH, ACC)
        center = shift + offset
        spread = square / n
        tl.store(mean + c, center, c_ok)
        tl.store(var + c, spread, c_ok)
    else:
        center = load(mean, c, c_ok, 0.0, ACC)
        spread = load(var, c, c_ok, 0.0, ACC)
    affine = affine_of(center, spread, weight, bias, prelu_weight, c, c_ok, eps, slope, ACC)
    t = tl.program_id(1)
    while t < tiles:
        at, ok = tile(t, group, shape, ROWS, HEIGHT, WIDTH)
        _, pre = _normalise(x, residual, affine, at, ok, ACC)
        tl.store(y + at, activate_by(pre, pre, affine[4], ACT), ok)
        t += tl.num_programs(1)


@triton.jit
def _sums_kernel(grad_y, x, weight, bias, residual, prelu_weight, mean, var, ggx, partial, eps: tl.float64,
                 slope: tl.float64, shape, tiles, ACT: tl.constexpr, ROWS: tl.constexpr,
                 HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    group, c, c_ok = channels(shape, ROWS, WIDTH)
    center = load(mean, c, c_ok, 0.0, ACC)
    spread = load(var, c, c_ok, 0.0, ACC)
    affine = affine_of(center, spread, weight, bias, prelu_weight, c, c_ok, eps, slope, ACC)
    g, gx, p, v, vx, vg = _sums(grad_y, x, residual, ggx, affine, group, shape, tiles, ACT, ROWS, HEIGHT, WIDTH, ACC)
    at = partial + tl.program_id(1) * shape[1] + c
    field = tl.num_programs(1) * shape[1]
    tl.store(at, g, c_ok)
    tl.store(at + field, gx, c_ok)
    if ACT == "prelu" and ggx is None:
        tl.store(at + 2 * field, p, c_ok)
    if ggx is not None:
        tl.store(at + 2 * field, v, c_ok)
        tl.store(at + 3 * field, vx, c_ok)
        tl.store(at + 4 * field, vg, c_ok)


@triton.jit
def _backward_kernel(grad_y, x, weight, bias, residual, prelu_weight, mean, var, sums, grad_x, grad_weight, grad_bias,
                     grad_residual, grad_prelu_weight, eps: tl.float64, slope: tl.float64, count: tl.float64,
                     shape, tiles, TRAINING: tl.constexpr, REDUCE: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr,
                     HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    group, c, c_ok = channels(shape, ROWS, WIDTH)
    center = load(mean, c, c_ok, 0.0, ACC)
    spread = load(var, c, c_ok, 0.0, ACC)
    affine = affine_of(center, spread, weight, bias, prelu_weight, c, c_ok, eps, slope, ACC)
    if REDUCE:
        g_sum, gx_sum, p_sum, _, _, _ = _sums(
            grad_y, x, residual, None, affine, group, shape, tiles, ACT, ROWS, HEIGHT, WIDTH, ACC
        )
    else:
        g_sum = load(sums, c, c_ok, 0.0, ACC)
        gx_sum = load(sums, c + shape[1], c_ok, 0.0, ACC)
        p_sum = load(sums if ACT == "prelu" else None, c + 2 * shape[1], c_ok, 0.0, ACC)
    if grad_weight is not None:  # noqa: SIM102, decided when compiling; the next line when running
        if tl.program_id(1) == 0:
            tl.store(grad_weight + c, gx_sum, c_ok)
            tl.store(grad_bias + c, g_sum, c_ok)
            if grad_prelu_weight is not None:
                tl.store(grad_prelu_weight + c, p_sum, c_ok)
    if grad_x is not None or grad_residual is not None:
        _, r, w, _, _ = affine
        m = tl.full(c.shape, count, ACC)
        t = tl.program_id(1)
        while t < tiles:
            at, ok = tile(t, group, shape, ROWS, HEIGHT, WIDTH)
            xh, _pre, _of_y, g = _gradient(grad_y, x, residual, affine, at, ok, ACT, ACC)
            if grad_residual is not None:
                tl.store(grad_residual + at, g, ok)
            if grad_x is not None:
                if TRAINING:
                    g -= g_sum / m + xh * (gx_sum / m)
                tl.store(grad_x + at, w * r * g, ok)
            t += tl.num_programs(1)


@triton.jit
def _double_backward_kernel(ggx, ggw, ggb, ggr, grad_y, x, weight, bias, residual, prelu_weight, mean, var, sums,
                            g_grad_y, g_x, g_weight, g_prelu_weight, eps: tl.float64, slope: tl.float64,
                            count: tl.float64, shape, tiles, TRAINING: tl.constexpr, REDUCE: tl.constexpr,
                            ACT: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                            ACC: tl.constexpr):  # fmt: skip
    group, c, c_ok = channels(shape, ROWS, WIDTH)
    center = load(mean, c, c_ok, 0.0, ACC)
    spread = load(var, c, c_ok, 0.0, ACC)
    affine = affine_of(center, spread, weight, bias, prelu_weight, c, c_ok, eps, slope, ACC)
    _, r, w, _, _ = affine
    scale = w * r
    dw = load(ggw, c, c_ok, 0.0, ACC)
    db = load(ggb, c, c_ok, 0.0, ACC)
    if REDUCE:
        g_sum, gx_sum, _, v_sum, vx_sum, vg_sum = _sums(
            grad_y, x, residual, ggx, affine, group, shape, tiles, ACT, ROWS, HEIGHT, WIDTH, ACC
        )
    else:
        g_sum = load(sums, c, c_ok, 0.0, ACC)
        gx_sum = load(sums, c + shape[1], c_ok, 0.0, ACC)
        v_sums = sums if ggx is not None else None
        v_sum = load(v_sums, c + 2 * shape[1], c_ok, 0.0, ACC)
        vx_sum = load(v_sums, c + 3 * shape[1], c_ok, 0.0, ACC)
        vg_sum = load(v_sums, c + 4 * shape[1], c_ok, 0.0, ACC)

    gw = r * vg_sum
    g_mean = tl.zeros(c.shape, ACC)
    gx_mean = tl.zeros(c.shape, ACC)
    v_mean = tl.zeros(c.shape, ACC)
    vx_mean = tl.zeros(c.shape, ACC)
    curvature = tl.zeros(c.shape, ACC)
    if TRAINING:
        m = tl.full(c.shape, count, ACC)
        g_mean = g_sum / m
        gx_mean = gx_sum / m
        v_mean = v_sum / m
        vx_mean = vx_sum / m
        k = vg_sum / m - v_mean * g_mean - vx_mean * gx_mean
        gw = r * m * k
        curvature = gx_mean * (dw - 2 * scale * vx_mean) + scale * k
    if tl.program_id(1) == 0:
        tl.store(g_weight + c, gw, c_ok)

    slant = dw - scale * vx_mean
    p_sum = tl.zeros([HEIGHT, WIDTH], ACC)
    t = tl.program_id(1)
    while t < tiles:
        at, ok = tile(t, group, shape, ROWS, HEIGHT, WIDTH)
        xh, pre, of_y, g = _gradient(grad_y, x, residual, affine, at, ok, ACT, ACC)
        v = load(ggx, at, ok, 0.0, ACC) - v_mean
        gg = scale * v + slant * xh + db + load(ggr, at, ok, 0.0, ACC)
        tl.store(g_grad_y + at, activate_by(pre, gg, affine[4], ACT), ok)
        if g_prelu_weight is not None:
            p_sum += tl.where(pre > 0, 0.0, of_y * gg)
        gx = slant * (g - g_mean)
        if TRAINING:
            gx -= scale * gx_mean * v + xh * curvature
        tl.store(g_x + at, r * gx, ok)
        t += tl.num_programs(1)
    if g_prelu_weight is not None:  # of each program, to be added up
        tl.store(g_prelu_weight + tl.program_id(1) * shape[1] + c, _sum(p_sum, ROWS), c_ok)


# --------------------------------------------------------------------------------------------------------------- launch


class _Plan:
    """How tensors of one shape and layout are cut into tiles and programs; reduces: sums over a channel are needed."""

    def __init__(self, size: torch.Size, channels_last: bool, dtype: torch.dtype, reduces: bool) -> None:
        n, c, s = size[0], size[1], size[2:].numel()
        self.rows = channels_last or s == 1
        self.channels, self.count = c, float(n * s)
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32

        outer, inner = (n * s, c) if self.rows else (n, s)
        width = min(triton.next_power_of_2(max(inner, 1)), ROW_CHANNELS if self.rows else _TILE)
        height = min(triton.next_power_of_2(max(outer, 1)), _TILE // width)
        down, across = triton.cdiv(outer, height), triton.cdiv(inner, width)
        groups, tiles = (across, down) if self.rows else (c, down * across)
        alone = reduces and tiles <= _TILES_IN_ONE_PROGRAM
        self.splits = 1 if alone else max(1, min(tiles, MAX_SPLITS, triton.cdiv(PROGRAMS, max(groups, 1))))
        self.reduces_first = reduces and self.splits > 1
        self.reduces_within = reduces and self.splits == 1

        self.grid = (groups, self.splits)
        self.options: dict[str, Any] = {
            "shape": (outer, c, 1) if self.rows else (n, c, s),
            "tiles": tiles,
            "ROWS": self.rows,
            "HEIGHT": height,
            "WIDTH": width,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "num_warps": min(max(height * width // _ELEMENTS_PER_WARP, 1), 8),
        }

    def dense(self, *tensors: Tensor | None) -> list[Any]:
        """The tensors, copied where their memory is not in the plan's order."""
        return dense(self.rows, *tensors)

    def slopes(self, prelu_weight: Tensor | None) -> Tensor | None:
        """One for each channel."""
        return None if prelu_weight is None else prelu_weight.expand(self.channels).contiguous()


_cached_plan = lru_cache(maxsize=4096)(_Plan)


def _plan(x: Tensor, reduces: bool) -> _Plan:
    return _cached_plan(x.shape, is_channels_last(x), x.dtype, reduces)


def batch_norm_act_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    prelu_weight: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    eps: float,
    act: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), as (y, mean, var).

    x: (N, C, *spatial), float32, bfloat16, float16 or float64; y has its dtype and layout, residual its shape.
    weight, bias, mean, var: (C,), in any of these dtypes. act: "none", "relu", "leaky_relu" or "prelu", whose slopes are
    prelu_weight, (C,) or (1,).

    Without mean and var, the batch's own are taken, var biased, and come back in the dtype of accumulation: float64 for
    float64, else float32. Where they are given, two empty tensors come back in their place; in training they are the
    batch's own all the same, which makes no difference here.
    """
    finds = mean is None
    plan = _plan(x, reduces=finds)
    x, residual = plan.dense(x, residual)
    weight, bias, mean, var = dense(False, weight, bias, mean, var)
    y = torch.empty_like(x)
    batch_mean, batch_var = (x.new_empty(plan.channels if finds else 0, dtype=plan.dtype) for _ in range(2))
    if finds:
        mean, var = batch_mean, batch_var
    with torch.cuda.device_of(x):
        if plan.reduces_first:
            partial = x.new_empty((4, plan.splits, plan.channels), dtype=plan.dtype)
            _moments_kernel[plan.grid](x, partial, **plan.options)
            combine(partial, mean, var)
        _forward_kernel[plan.grid](
            x, weight, bias, residual, plan.slopes(prelu_weight), mean, var, y, eps, negative_slope,
            REDUCE=plan.reduces_within, ACT=act, **plan.options,
        )  # fmt: skip
    return y, batch_mean, batch_var


def batch_norm_act_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    prelu_weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    act: str,
    negative_slope: float,
    needs_x: bool,
    needs_params: bool,
    needs_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad_x, grad_weight, grad_bias, grad_residual, grad_prelu_weight).

    What is not needed comes back empty, and is not computed.

    With r = (var + eps)^-1/2, xh = (x - mean) r, g = act'(xh weight + bias + residual) grad_y, and M elements to a
    channel:

        grad_residual = g,  grad_bias = sum g,  grad_weight = sum g xh,
        grad_x = weight r (g - grad_bias / M - xh grad_weight / M)  in training,  weight r g  otherwise,
        grad_prelu_weight = sum grad_y (xh weight + bias + residual)  of the elements where that is not positive.

    Shapes and dtypes are those of the forward; training says that mean and var are the batch's own. grad_weight and
    grad_bias have weight's dtype or, without a weight, that of accumulation.
    """
    plan = _plan(x, reduces=needs_params or (training and needs_x))
    grad_y, x, residual = plan.dense(grad_y, x, residual)
    slopes = plan.slopes(prelu_weight)
    inputs = (grad_y, x, *dense(False, weight, bias), residual, slopes, *dense(False, mean, var))
    dtype = plan.dtype if weight is None else weight.dtype
    grad_x, grad_residual = (torch.empty_like(x) if needed else None for needed in (needs_x, needs_residual))
    grad_weight, grad_bias = (x.new_empty(plan.channels, dtype=dtype) if needs_params else None for _ in range(2))
    needs_slopes = slopes is not None and needs_params
    grad_slopes = x.new_empty(plan.channels, dtype=plan.dtype) if needs_slopes else None
    grads = (grad_x, grad_weight, grad_bias, grad_residual, grad_slopes)
    with torch.cuda.device_of(x):
        _backward_kernel[plan.grid](
            *inputs, _split_sums(plan, inputs, None, eps, act, negative_slope), *grads, eps, negative_slope, plan.count,
            TRAINING=training, REDUCE=plan.reduces_within, ACT=act, **plan.options,
        )  # fmt: skip
    *found, grad_slopes = (x.new_empty(0) if grad is None else grad for grad in grads)
    grad_x, grad_weight, grad_bias, grad_residual = found
    return grad_x, grad_weight, grad_bias, grad_residual, _summed(grad_slopes, prelu_weight)


def batch_norm_act_double_backward(
    ggx: Tensor | None,
    ggw: Tensor | None,
    ggb: Tensor | None,
    ggr: Tensor | None,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    prelu_weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
    act: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of sum(ggx grad_x) + sum(ggw grad_weight) + sum(ggb grad_bias) + sum(ggr grad_residual).

    They are with respect to grad_y, x, weight and prelu_weight, and any gg may be None. In the terms of
    batch_norm_act_backward, with v = ggx, means written E, s = act', a = ggw - weight r E[v xh] and
    K = E[v g] - E[v] E[g] - E[v xh] E[g xh], in training:

        g_grad_y = s (weight r (v - E[v]) + a xh + ggb + ggr),    g_weight = r M K,
        g_x = r (a (g - E[g]) - weight r E[g xh] (v - E[v]) - xh (E[g xh] (ggw - 2 weight r E[v xh]) + weight r K)),

    and otherwise

        g_grad_y = s (weight r v + ggw xh + ggb + ggr),    g_weight = r sum(v g),    g_x = r ggw g;

    g_prelu_weight is the sum of grad_y g_grad_y / s of the elements where the activation's input is not positive.

    ggx and ggr have x's shape, ggw and ggb (C,). g_weight is (C,), in weight's dtype or, without a weight, that of
    accumulation.
    """
    plan = _plan(x, reduces=training or ggx is not None)
    ggx, ggr, grad_y, x, residual = plan.dense(ggx, ggr, grad_y, x, residual)
    ggw, ggb = dense(False, ggw, ggb)
    slopes = plan.slopes(prelu_weight)
    inputs = (grad_y, x, *dense(False, weight, bias), residual, slopes, *dense(False, mean, var))
    g_grad_y, g_x = torch.empty_like(x), torch.empty_like(x)
    g_weight = x.new_empty(plan.channels, dtype=plan.dtype if weight is None else weight.dtype)
    g_slopes = None if slopes is None else x.new_empty((plan.splits, plan.channels), dtype=plan.dtype)
    with torch.cuda.device_of(x):
        _double_backward_kernel[plan.grid](
            ggx, ggw, ggb, ggr, *inputs, _split_sums(plan, inputs, ggx, eps, act, negative_slope),
            g_grad_y, g_x, g_weight, g_slopes, eps, negative_slope, plan.count,
            TRAINING=training, REDUCE=plan.reduces_within, ACT=act, **plan.options,
        )  # fmt: skip
    return g_grad_y, g_x, g_weight, _summed(x.new_empty(0) if g_slopes is None else g_slopes.sum(0), prelu_weight)


def _summed(grad: Tensor, prelu_weight: Tensor | None) -> Tensor:
    """A gradient for each channel as that of `prelu_weight`, where it is needed."""
    if prelu_weight is None or grad.numel() == 0:
        return grad
    return (grad.sum(0, keepdim=True) if prelu_weight.numel() == 1 else grad).to(prelu_weight.dtype)


def _split_sums(
    plan: _Plan, inputs: tuple, ggx: Tensor | None, eps: float, act: str, negative_slope: float
) -> Tensor | None:
    """Every channel's sums, (2, 3 or 5, C), where more than one program adds them."""
    if not plan.reduces_first:
        return None
    x = inputs[1]
    fields = 5 if ggx is not None else 3 if act == "prelu" else 2
    partial = x.new_empty((fields, plan.splits, plan.channels), dtype=plan.dtype)
    _sums_kernel[plan.grid](*inputs, ggx, partial, eps, negative_slope, ACT=act, **plan.options)
    return partial.sum(1)
