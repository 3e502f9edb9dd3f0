"""Adaptive instance normalisation, after the noise, bias and activation that StyleGAN has before it, in one operator, with
its first and second derivatives.

    out = scale (y - mean) / sqrt(var + eps) + shift,    y = act(x + noise_weight noise + bias)

A unit is a plane: one channel of one sample, with a scale and a shift of its own. How it is cut into tiles and programs is
told in _units.py. y is computed anew wherever it is needed, from x, and never stored.
"""

from typing import Any

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
def _noise_at(n, p, noise_step, shape, LAYOUT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets and mask of pixel block p of the noise, which all channels share; noise_step is 0 where all samples do."""
    if LAYOUT == "rows":
        pixel = p * HEIGHT + tl.arange(0, HEIGHT)[None, :, None]
    else:
        pixel = p * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    return n * noise_step + pixel, pixel < shape[1]


@triton.jit
def _noise_tile(noise, noise_step, n, p, shape, LAYOUT: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                ACC: tl.constexpr):  # fmt: skip
    at, ok = _noise_at(n, p, noise_step, shape, LAYOUT, HEIGHT, WIDTH)
    return load(noise, at, ok, 0.0, ACC)


@triton.jit
def _style(parameter, n, g, shape, absent, ACC: tl.constexpr):
    return load(parameter, n * shape[0] + g, g < shape[0], absent, ACC)


@triton.jit
def _values(x, weight, b, z, at, ok, slope, ACT: tl.constexpr, ACC: tl.constexpr):
    """What the activation is applied to, and what it gives: 0 where there is no data."""
    pre = load(x, at, ok, 0.0, ACC) + weight * z + b
    return pre, tl.where(ok, activate(pre, pre, slope, ACT, ACC), 0.0)


@triton.jit
def _tangent(ggx, db, dn, z, pre, at, ok, slope, ACT: tl.constexpr, ACC: tl.constexpr):
    """act' times what the three seeds move x by."""
    return tl.where(ok, activate(pre, load(ggx, at, ok, 0.0, ACC) + dn * z + db, slope, ACT, ACC), 0.0)


# -------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _moments_kernel(x, noise_weight, bias, noise, partial, slope: tl.float64, noise_step, units, shape, tiles,
                    pixel_blocks, ACT: tl.constexpr, LAYOUT: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr,
                    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Count, mean as a shift and an offset, and sum of squared deviations of y over each program's tiles.

    The shift is the mean of the first tile, as in group_norm_act.
    """
    n, group, _ = owner(shape, 1, UNITS)
    weight = load(noise_weight, group, group < shape[0], 1.0, ACC)
    b = load(bias, group, group < shape[0], 0.0, ACC)
    t = tl.program_id(1).to(tl.int64)
    at, ok = tile_at(n, group, 0, t, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    z = _noise_tile(noise, noise_step, n, t, shape, LAYOUT, HEIGHT, WIDTH, ACC)
    _pre, y = _values(x, weight, b, z, at, ok, slope, ACT, ACC)
    size = tile_size(0, t, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
    shift = unit_sum(y) / size.to(ACC)
    count = size * 0
    total = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    square = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    while t < tiles:
        at, ok = tile_at(n, group, 0, t, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        z = _noise_tile(noise, noise_step, n, t, shape, LAYOUT, HEIGHT, WIDTH, ACC)
        _pre, y = _values(x, weight, b, z, at, ok, slope, ACT, ACC)
        d = tl.where(ok, y - shift, 0.0)
        count += tile_size(0, t, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        total += d
        square += d * d
        t += tl.num_programs(1)
    store_moments(partial, units, n, group, shape, count, shift, total, square, ACC)


@triton.jit
def _forward_kernel(x, noise_weight, bias, noise, mean, var, scale, shift, out, eps: tl.float64, slope: tl.float64,
                    noise_step, count: tl.float64, shape, steps, blocks, WHOLE: tl.constexpr, ACT: tl.constexpr,
                    LAYOUT: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, HEIGHT: tl.constexpr,
                    WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    i = tl.program_id(1)
    n, group, k, _p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
    weight = load(noise_weight, group, group < shape[0], 1.0, ACC)
    b = load(bias, group, group < shape[0], 0.0, ACC)
    s = _style(scale, n, group, shape, 1.0, ACC)
    moved = _style(shift, n, group, shape, 0.0, ACC)
    while i < steps:
        n, group, k, p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
        at, ok = tile_at(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        z = _noise_tile(noise, noise_step, n, p, shape, LAYOUT, HEIGHT, WIDTH, ACC)
        _pre, y = _values(x, weight, b, z, at, ok, slope, ACT, ACC)
        if WHOLE:
            center, rest, r = find_statistics(y, ok, mean, var, n, group, shape, eps, count, ACC)
        else:
            center, rest, r = load_statistics(mean, var, n, group, shape, eps, count, ACC)
        tl.store(out + at, (y - center - rest) * r * s + moved, ok)
        i += tl.num_programs(1)


@triton.jit
def _sums_kernel(grad_out, x, noise_weight, bias, noise, mean, var, ggx, gg_noise_weight, gg_bias, partial,
                 eps: tl.float64, slope: tl.float64, noise_step, count: tl.float64, units, shape, tiles, pixel_blocks,
                 DOUBLE: tl.constexpr, ACT: tl.constexpr, LAYOUT: tl.constexpr, GROUP: tl.constexpr,
                 UNITS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Sums over each program's tiles of g and g yh and, if DOUBLE, of u, u yh and u g."""
    n, group, _ = owner(shape, 1, UNITS)
    g_ok = group < shape[0]
    center, rest, r = load_statistics(mean, var, n, group, shape, eps, count, ACC)
    weight, b = load(noise_weight, group, g_ok, 1.0, ACC), load(bias, group, g_ok, 0.0, ACC)
    dn, db = load(gg_noise_weight, group, g_ok, 0.0, ACC), load(gg_bias, group, g_ok, 0.0, ACC)
    g_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    gy_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    u_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    uy_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    ug_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    t = tl.program_id(1).to(tl.int64)
    while t < tiles:
        at, ok = tile_at(n, group, 0, t, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        z = _noise_tile(noise, noise_step, n, t, shape, LAYOUT, HEIGHT, WIDTH, ACC)
        pre, y = _values(x, weight, b, z, at, ok, slope, ACT, ACC)
        yh = (y - center - rest) * r
        g = load(grad_out, at, ok, 0.0, ACC)
        g_sum += g
        gy_sum += g * yh
        if DOUBLE:
            u = _tangent(ggx, db, dn, z, pre, at, ok, slope, ACT, ACC)
            u_sum += u
            uy_sum += u * yh
            ug_sum += u * g
        t += tl.num_programs(1)
    at = partial + tl.program_id(1).to(tl.int64) * units + n * shape[0] + group
    field = tl.num_programs(1).to(tl.int64) * units
    tl.store(at, unit_sum(g_sum), g_ok)
    tl.store(at + field, unit_sum(gy_sum), g_ok)
    if DOUBLE:
        tl.store(at + 2 * field, unit_sum(u_sum), g_ok)
        tl.store(at + 3 * field, unit_sum(uy_sum), g_ok)
        tl.store(at + 4 * field, unit_sum(ug_sum), g_ok)


@triton.jit
def _backward_kernel(grad_out, x, noise_weight, bias, noise, mean, var, scale, sums, grad_x, grad_scale, grad_shift,
                     noise_weight_rows, bias_rows, eps: tl.float64, slope: tl.float64, noise_step, count: tl.float64,
                     samples, parameters, units, shape, steps, blocks, WHOLE: tl.constexpr, ACT: tl.constexpr,
                     LAYOUT: tl.constexpr, GROUP: tl.constexpr, UNITS: tl.constexpr, HEIGHT: tl.constexpr,
                     WIDTH: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    i = tl.program_id(1)
    n, group, k, _p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
    g_ok = group < shape[0]
    weight, b = load(noise_weight, group, g_ok, 1.0, ACC), load(bias, group, g_ok, 0.0, ACC)
    s = _style(scale, n, group, shape, 1.0, ACC)
    size = tl.full([1, 1, 1], count, ACC)
    b_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    n_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    while i < steps:
        n, group, k, p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
        at, ok = tile_at(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        z = _noise_tile(noise, noise_step, n, p, shape, LAYOUT, HEIGHT, WIDTH, ACC)
        pre, y = _values(x, weight, b, z, at, ok, slope, ACT, ACC)
        center, rest, r = load_statistics(mean, var, n, group, shape, eps, count, ACC)
        yh = (y - center - rest) * r
        g = load(grad_out, at, ok, 0.0, ACC)
        if WHOLE:
            g_sum = unit_sum(g)
            gy_sum = unit_sum(g * yh)
        else:
            g_sum = load_sums(sums, 0, n, group, shape, units, ACC)
            gy_sum = load_sums(sums, 1, n, group, shape, units, ACC)
        if grad_scale is not None and i == 0:
            tl.store(grad_scale + n * shape[0] + group, gy_sum, g_ok)
            tl.store(grad_shift + n * shape[0] + group, g_sum, g_ok)
        grad = activate(pre, s * r * (g - g_sum / size - yh * (gy_sum / size)), slope, ACT, ACC)
        if grad_x is not None:
            tl.store(grad_x + at, grad, ok)
        if bias_rows is not None:
            b_sum += tl.where(ok, grad, 0.0)
        if noise_weight_rows is not None:
            n_sum += tl.where(ok, grad, 0.0) * z
        i += tl.num_programs(1)
    if bias_rows is not None:
        store_parameter_sums(bias_rows, 0, n, group, g_ok, b_sum, samples, parameters, LAYOUT)
    if noise_weight_rows is not None:
        store_parameter_sums(noise_weight_rows, 0, n, group, g_ok, n_sum, samples, parameters, LAYOUT)


@triton.jit
def _double_backward_kernel(grad_out, x, noise_weight, bias, noise, mean, var, ggx, gg_noise_weight, gg_bias, scale,
                            gg_scale, gg_shift, sums, g_grad_out, g_x, g_scale, noise_weight_rows, bias_rows,
                            eps: tl.float64, slope: tl.float64, noise_step, count: tl.float64, samples, parameters,
                            units, shape, steps, blocks, WHOLE: tl.constexpr, ACT: tl.constexpr, LAYOUT: tl.constexpr,
                            GROUP: tl.constexpr, UNITS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                            ACC: tl.constexpr):  # fmt: skip
    i = tl.program_id(1)
    n, group, k, _p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
    g_ok = group < shape[0]
    weight, b = load(noise_weight, group, g_ok, 1.0, ACC), load(bias, group, g_ok, 0.0, ACC)
    dn, db = load(gg_noise_weight, group, g_ok, 0.0, ACC), load(gg_bias, group, g_ok, 0.0, ACC)
    s = _style(scale, n, group, shape, 1.0, ACC)
    ds, dt = _style(gg_scale, n, group, shape, 0.0, ACC), _style(gg_shift, n, group, shape, 0.0, ACC)
    size = tl.full([1, 1, 1], count, ACC)
    b_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    n_sum = tl.zeros([UNITS, HEIGHT, WIDTH], ACC)
    while i < steps:
        n, group, k, p = applied_tile(i, shape, blocks, LAYOUT, UNITS)
        at, ok = tile_at(n, group, k, p, shape, LAYOUT, GROUP, HEIGHT, WIDTH)
        z = _noise_tile(noise, noise_step, n, p, shape, LAYOUT, HEIGHT, WIDTH, ACC)
        pre, y = _values(x, weight, b, z, at, ok, slope, ACT, ACC)
        center, rest, r = load_statistics(mean, var, n, group, shape, eps, count, ACC)
        yh = (y - center - rest) * r
        g = load(grad_out, at, ok, 0.0, ACC)
        u = _tangent(ggx, db, dn, z, pre, at, ok, slope, ACT, ACC)
        if WHOLE:
            g_mean = unit_sum(g) / size
            gy_mean = unit_sum(g * yh) / size
            u_mean = unit_sum(u) / size
            uy_mean = unit_sum(u * yh) / size
            ug_mean = unit_sum(u * g) / size
        else:
            g_mean = load_sums(sums, 0, n, group, shape, units, ACC) / size
            gy_mean = load_sums(sums, 1, n, group, shape, units, ACC) / size
            u_mean = load_sums(sums, 2, n, group, shape, units, ACC) / size
            uy_mean = load_sums(sums, 3, n, group, shape, units, ACC) / size
            ug_mean = load_sums(sums, 4, n, group, shape, units, ACC) / size

        curvature = r * (ug_mean - u_mean * g_mean - uy_mean * gy_mean)
        if i == 0:
            tl.store(g_scale + n * shape[0] + group, size * curvature, g_ok)
        tl.store(g_grad_out + at, s * r * (u - u_mean - yh * uy_mean) + ds * yh + dt, ok)

        of_g, of_u = ds - s * r * uy_mean, s * r * gy_mean
        of_yh = of_g * gy_mean - of_u * uy_mean + s * curvature
        grad = activate(pre, r * (of_g * (g - g_mean) - of_u * (u - u_mean) - yh * of_yh), slope, ACT, ACC)
        tl.store(g_x + at, grad, ok)
        if bias_rows is not None:
            b_sum += tl.where(ok, grad, 0.0)
        if noise_weight_rows is not None:
            n_sum += tl.where(ok, grad, 0.0) * z
        i += tl.num_programs(1)
    if bias_rows is not None:
        store_parameter_sums(bias_rows, 0, n, group, g_ok, b_sum, samples, parameters, LAYOUT)
    if noise_weight_rows is not None:
        store_parameter_sums(noise_weight_rows, 0, n, group, g_ok, n_sum, samples, parameters, LAYOUT)


# --------------------------------------------------------------------------------------------------------------- launch


class _ParameterGradients:
    """Gradients of noise_weight and bias, where there are these: what each program adds to them, and their sums."""

    def __init__(self, plan: Plan, x: Tensor, *parameters: Tensor | None) -> None:
        self.grads = [None if p is None else p.new_empty(p.shape) for p in parameters]
        self.found = [grad for grad in self.grads if grad is not None]
        self.partial = x.new_empty((len(self.found), plan.partial_rows, plan.parameters), dtype=plan.dtype)
        rest = iter(self.partial)
        self.rows = [None if grad is None else next(rest) for grad in self.grads]

    def added(self) -> list[Tensor | None]:
        if self.found:
            add_rows(self.partial, self.found)
        return self.grads


def _settings(noise: Tensor | None, slope: float, act: str) -> dict[str, Any]:
    step = 0 if noise is None or noise.shape[0] == 1 else noise[0].numel()
    return {"slope": slope, "noise_step": step, "ACT": act}


def adain_forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    noise_weight: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    eps: float,
    act: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """out = scale (y - mean) / sqrt(var + eps) + shift with y = act(x + noise_weight noise + bias), as (out, mean, var).

    x: (N, C, *spatial), float32, bfloat16, float16 or float64; out has its dtype and layout.
    scale, shift: (N, C). noise_weight, bias: (C,). noise: (N, 1, *spatial) or (1, 1, *spatial). In any of these dtypes.
    act: "none", "relu" or "leaky_relu".

    mean and var, which is biased, are (N, C) in float64: rounded to float32, a huge mean is off by more than the values
    of a narrow plane differ.
    """
    plan = plan_of("forward", x, x.shape[1])
    (x,) = plan.dense(x)
    scale, shift, noise_weight, bias, noise = dense(False, scale, shift, noise_weight, bias, noise)
    settings = _settings(noise, negative_slope, act)
    out = torch.empty_like(x)
    mean, var = (x.new_empty(scale.shape, dtype=torch.float64) for _ in range(2))
    with torch.cuda.device_of(x):
        if not plan.whole:
            partial = x.new_empty((4, plan.splits, plan.units), dtype=plan.dtype)
            _moments_kernel[plan.reduce_grid](
                x, noise_weight, bias, noise, partial, **plan.registers, **settings, **plan.reduce_options
            )
            combine(partial, mean, var)
        _forward_kernel[plan.apply_grid](
            x, noise_weight, bias, noise, mean, var, scale, shift, out, eps, **settings, **plan.apply_options
        )
    return out, mean, var


def adain_backward(
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    noise_weight: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    negative_slope: float,
    needs_x: bool,
    needs_style: bool,
    needs_parameters: bool,
) -> tuple[Tensor, ...]:
    """(grad_x, grad_scale, grad_shift, grad_noise_weight, grad_bias); what is not needed, or has no parameter, comes back
    empty, and is not computed.

    With r = (var + eps)^-1/2, yh = (y - mean) r, g = grad_out, s = act'(x + noise_weight noise + bias), sums and means
    over a plane written sum and E, and P(v) = r (v - E[v] - yh E[v yh]):

        grad_x = s scale P(g),  grad_scale = sum g yh,  grad_shift = sum g,

    and over the planes of a channel grad_bias = sum grad_x, grad_noise_weight = sum noise grad_x. Shapes and dtypes are
    those of the forward.
    """
    plan = plan_of("backward", x, x.shape[1])
    grad_out, x = plan.dense(grad_out, x)
    scale, noise_weight, bias, noise, mean, var = dense(False, scale, noise_weight, bias, noise, mean, var)
    inputs, settings = (grad_out, x, noise_weight, bias, noise, mean, var), _settings(noise, negative_slope, act)
    grad_x = torch.empty_like(x) if needs_x else None
    grad_scale, grad_shift = (t.new_empty(t.shape) if needs_style else None for t in (scale, shift))
    parameters = _ParameterGradients(plan, x, *((noise_weight, bias) if needs_parameters else (None, None)))
    with torch.cuda.device_of(x):
        sums = None if plan.whole else _split_sums(plan, inputs, (None, None, None), eps, settings, fields=2)
        _backward_kernel[plan.apply_grid](
            *inputs, scale, sums, grad_x, grad_scale, grad_shift, *parameters.rows, eps,
            **settings, **plan.sum_options, **plan.apply_options,
        )  # fmt: skip
        found = (grad_x, grad_scale, grad_shift, *parameters.added())
    return tuple(x.new_empty(0) if grad is None else grad for grad in found)


def adain_double_backward(
    ggx: Tensor | None,
    gg_scale: Tensor | None,
    gg_shift: Tensor | None,
    gg_noise_weight: Tensor | None,
    gg_bias: Tensor | None,
    grad_out: Tensor,
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    noise_weight: Tensor | None,
    bias: Tensor | None,
    noise: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    negative_slope: float,
) -> tuple[Tensor, ...]:
    """Gradients of sum(ggx grad_x) + sum(gg_scale grad_scale) + sum(gg_shift grad_shift)
    + sum(gg_noise_weight grad_noise_weight) + sum(gg_bias grad_bias).

    They are with respect to grad_out, x, scale, noise_weight and bias, and any gg may be None. In the terms of
    adain_backward, with

        u = s (ggx + gg_noise_weight noise + gg_bias),    K = E[u g] - E[u] E[g] - E[u yh] E[g yh],
        z = gg_scale g - r scale (E[u yh] g + E[g yh] u):

        g_grad_out = scale P(u) + gg_scale yh + gg_shift,    g_scale = sum g P(u),    g_x = s (P(z) - r^2 scale K yh),

    and over the planes of a channel g_bias = sum g_x, g_noise_weight = sum noise g_x: empty where there is no such
    parameter.
    """
    plan = plan_of("double backward", x, x.shape[1])
    ggx, grad_out, x = plan.dense(ggx, grad_out, x)
    scale, noise_weight, bias, noise, mean, var = dense(False, scale, noise_weight, bias, noise, mean, var)
    gg_scale, gg_shift, gg_noise_weight, gg_bias = dense(False, gg_scale, gg_shift, gg_noise_weight, gg_bias)
    inputs, settings = (grad_out, x, noise_weight, bias, noise, mean, var), _settings(noise, negative_slope, act)
    seeds = (ggx, gg_noise_weight, gg_bias)
    g_grad_out, g_x, g_scale = torch.empty_like(x), torch.empty_like(x), torch.empty_like(scale)
    parameters = _ParameterGradients(plan, x, noise_weight, bias)
    with torch.cuda.device_of(x):
        sums = None if plan.whole else _split_sums(plan, inputs, seeds, eps, settings, fields=5)
        _double_backward_kernel[plan.apply_grid](
            *inputs, *seeds, scale, gg_scale, gg_shift, sums, g_grad_out, g_x, g_scale, *parameters.rows, eps,
            **settings, **plan.sum_options, **plan.apply_options,
        )  # fmt: skip
        found = (g_grad_out, g_x, g_scale, *parameters.added())
    return tuple(x.new_empty(0) if grad is None else grad for grad in found)


def _split_sums(plan: Plan, inputs: tuple, seeds: tuple, eps: float, settings: dict, fields: int) -> Tensor:
    """Every plane's sums, (2 or 5, planes)."""
    partial = inputs[1].new_empty((fields, plan.splits, plan.units), dtype=plan.dtype)
    _sums_kernel[plan.reduce_grid](
        *inputs, *seeds, partial, eps, count=plan.count, DOUBLE=fields == 5, **plan.registers, **settings,
        **plan.reduce_options,
    )  # fmt: skip
    return partial.sum(1) if plan.splits > 1 else partial
