"""Normalisation by the statistics of one sample, residual and activation in one operator, with its first and second
derivatives.

    y = act((x - mean) / sqrt(var + eps) * weight + bias + residual),    act in {"none", "relu", "leaky_relu"}

A unit is what shares a mean and a variance: a group of neighbouring channels of one sample, a channel in instance norm, a
whole sample in layer norm. How it is cut into tiles and programs is told in _units.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgan_kernels._norm import activate, combine, dense, load
from fastgan_kernels._units import (
    Plan,
    add_rows,
    applied_tile,
    find_statistics,
    load_statistics,
    load_sums,
    owner,
    plan_of,
    store_moments,
    store_parameter_sums,
    tile_at,
    tile_size,
    unit_sum,
)

# ----------------------------------------------------------------------------------------------------- input and output


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


# ---------------------------------------------------------------------------------------------------------- mathematics


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


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _moments_kernel(x, partial, units, shape, tiles, pixel_blocks, LAYOUT: tl.constexpr, GROUP: tl.constexpr,
                    UNITS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Count, mean as a shift and an offset, and sum of squared deviations over each program's tiles.

    The shift is the mean of the first tile. As that is part of the data, cancellation can cost the variance no more
    than a factor of the number of tiles.
    """
    n, group, _ = owner(shape, 1, UNITS)
    t = tl.program_id(1).to(tl.int64)
    k, p = t // pixel_blocks, t % pixel_blocks
    at, ok = tile_at(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    size = tile_size(k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    shift = unit_sum(load(x, at, ok, 0.0, ACC)) / size.to(ACC)
    count = size * 0
    total = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    square = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    while t < tiles:
        k, p = t // pixel_blocks, t % pixel_blocks
        at, ok = tile_at(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        d = tl.where(ok, load(x, at, ok, 0.0, ACC) - shift, 0.0)
        count += tile_size(k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        total += d
        square += d * d
        t += tl.num_programs(1)
    store_moments(partial, units, n, group, shape, count, shift, total, square, ACC)


@triton.jit
def _forward_kernel(x, weight, bias, residual, mean, var, y, eps: tl.float64, slope: tl.float64, count: tl.float64,
                    shape, steps, blocks, WHOLE: tl.constexpr, ACT: tl.constexpr, LAYOUT: tl.constexpr,
                    GROUP: tl.constexpr, UNITS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                    ACC: tl.constexpr):  # fmt: skip
    i = tl.program_id(1)
    n, group, k, p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
    c, c_ok = _parameters(group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    w = load(weight, c, c_ok, 1.0, ACC)
    b = load(bias, c, c_ok, 0.0, ACC)
    while i < steps:
        n, group, k, p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
        at, ok = tile_at(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        values = load(x, at, ok, 0.0, ACC)
        if WHOLE:
            statistics = find_statistics(values, ok, mean, var, n, group, shape, eps, count, ACC)
        else:
            statistics = load_statistics(mean, var, n, group, shape, eps, count, ACC)
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
    n, group, _ = owner(shape, 1, UNITS)
    statistics = load_statistics(mean, var, n, group, shape, eps, count, ACC)
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
        at, ok = tile_at(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
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
    tl.store(at, unit_sum(h_sum), u_ok)
    tl.store(at + field, unit_sum(hx_sum), u_ok)
    if DOUBLE:
        tl.store(at + 2 * field, unit_sum(v_sum), u_ok)
        tl.store(at + 3 * field, unit_sum(vx_sum), u_ok)
        tl.store(at + 4 * field, unit_sum(vh_sum), u_ok)
        tl.store(at + 5 * field, unit_sum(m_sum), u_ok)
        tl.store(at + 6 * field, unit_sum(mx_sum), u_ok)


@triton.jit
def _backward_kernel(grad_y, x, weight, bias, residual, mean, var, sums, grad_x, grad_residual, partial,
                     eps: tl.float64, slope: tl.float64, count: tl.float64, samples, parameters, units, shape, steps,
                     blocks, WHOLE: tl.constexpr, ACT: tl.constexpr, LAYOUT: tl.constexpr, GROUP: tl.constexpr,
                     UNITS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    i = tl.program_id(1)
    n, group, k, p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
    c, c_ok = _parameters(group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    w = load(weight, c, c_ok, 1.0, ACC)
    b = load(bias, c, c_ok, 0.0, ACC)
    g_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    gx_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    while i < steps:
        n, group, k, p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
        at, ok = tile_at(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        statistics = load_statistics(mean, var, n, group, shape, eps, count, ACC)
        xh, _pre, g = _gradient(grad_y, x, residual, w, b, statistics, slope, at, ok, ACT, ACC)
        if partial is not None:
            g_sum += g
            gx_sum += g * xh
        if grad_residual is not None:
            tl.store(grad_residual + at, g, ok)
        if grad_x is not None:
            h = w * g
            if WHOLE:
                h_sum = unit_sum(h)
                hx_sum = unit_sum(h * xh)
            else:
                h_sum = load_sums(sums, 0, n, group, shape, units, ACC)
                hx_sum = load_sums(sums, 1, n, group, shape, units, ACC)
            m = tl.full([1, 1, 1], count, ACC)
            tl.store(grad_x + at, statistics[2] * (h - h_sum / m - xh * (hx_sum / m)), ok)
        i += tl.num_programs(1)
    if partial is not None:
        store_parameter_sums(partial, 0, n, c, c_ok, gx_sum, samples, parameters, LAYOUT)
        store_parameter_sums(partial, 1, n, c, c_ok, g_sum, samples, parameters, LAYOUT)


@triton.jit
def _double_backward_kernel(ggx, ggw, ggb, ggr, grad_y, x, weight, bias, residual, mean, var, sums, g_grad_y, g_x,
                            partial, eps: tl.float64, slope: tl.float64, count: tl.float64, samples, parameters, units,
                            shape, steps, blocks, WHOLE: tl.constexpr, ACT: tl.constexpr, LAYOUT: tl.constexpr,
                            GROUP: tl.constexpr, UNITS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                            ACC: tl.constexpr):  # fmt: skip
    i = tl.program_id(1)
    n, group, k, p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
    c, c_ok = _parameters(group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    w = load(weight, c, c_ok, 1.0, ACC)
    b = load(bias, c, c_ok, 0.0, ACC)
    dw = load(ggw, c, c_ok, 0.0, ACC)
    db = load(ggb, c, c_ok, 0.0, ACC)
    gw_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    size = tl.full([1, 1, 1], count, ACC)
    while i < steps:
        n, group, k, p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
        at, ok = tile_at(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        statistics = load_statistics(mean, var, n, group, shape, eps, count, ACC)
        r = statistics[2]
        xh, pre, g = _gradient(grad_y, x, residual, w, b, statistics, slope, at, ok, ACT, ACC)
        v = load(ggx, at, ok, 0.0, ACC)
        h = w * g
        m = dw * g
        if WHOLE:
            h_mean = unit_sum(h) / size
            hx_mean = unit_sum(h * xh) / size
            v_mean = unit_sum(v) / size
            vx_mean = unit_sum(v * xh) / size
            vh_mean = unit_sum(v * h) / size
            m_mean = unit_sum(m) / size
            mx_mean = unit_sum(m * xh) / size
        else:
            h_mean = load_sums(sums, 0, n, group, shape, units, ACC) / size
            hx_mean = load_sums(sums, 1, n, group, shape, units, ACC) / size
            v_mean = load_sums(sums, 2, n, group, shape, units, ACC) / size
            vx_mean = load_sums(sums, 3, n, group, shape, units, ACC) / size
            vh_mean = load_sums(sums, 4, n, group, shape, units, ACC) / size
            m_mean = load_sums(sums, 5, n, group, shape, units, ACC) / size
            mx_mean = load_sums(sums, 6, n, group, shape, units, ACC) / size

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
    store_parameter_sums(partial, 0, n, c, c_ok, gw_sum, samples, parameters, LAYOUT)


# --------------------------------------------------------------------------------------------------------------- launch


def _plan(order: str, x: Tensor, groups: int, *parameters: Tensor | None) -> Plan:
    # A sample of channels of one element, in one group, is one of elements that have parameters of their own.
    single = groups == 1 and x.shape[1:].numel() == x.shape[1]
    per_element = single or any(p is not None and p.dim() > 1 for p in parameters)
    return plan_of(order, x, groups, per_element)


class _ParameterGradients:
    """Gradients of `count` parameters: what each program adds to them, and their sum in the order and the dtype of the
    parameters."""

    def __init__(self, plan: Plan, x: Tensor, weight: Tensor | None, bias: Tensor | None, count: int) -> None:
        self.plan, self.x = plan, x
        given = next((p for p in (weight, bias) if p is not None), None)
        self.shape = x.shape[1:2] if given is None else given.shape
        self.dtype = plan.dtype if weight is None else weight.dtype
        self.partial = x.new_empty((count, plan.partial_rows, plan.parameters), dtype=plan.dtype)

    def added(self) -> list[Tensor]:
        count, _, columns = self.partial.shape
        like = self.x[:1] if len(self.shape) > 1 else self.x.new_empty(columns)
        found = [torch.empty_like(like, dtype=self.dtype) for _ in range(count)]
        add_rows(self.partial, found)
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
    plan: Plan,
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
