"""Mean and deviation of every plane, which `adain_from_features` takes from a style, exact at every order."""

import math

import torch
from torch import Tensor

from fastgan import backend
from fastgan.ops._autograd import is_transformed, operators, register_gradient
from fastgan.ops._kernels import register_kernel, tell_openmp
from fastgan.ops._norm import NormCall, empty_sample_statistics, stock_is_faster
from fastgan.ops._tensors import accumulation_dtype, dense, is_channels_last

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`plane_statistics` in plain torch."""
    wide = x.to(accumulation_dtype(x.dtype)).flatten(2)
    mean = wide.mean(-1, keepdim=True)
    return mean.squeeze(-1), ((wide - mean).square().mean(-1) + eps).sqrt()


def _backward_reference(x: Tensor, mean: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    mean, slope, offset = (_over_planes(t, x) for t in (mean, slope, offset))
    return ((x - mean) * slope + offset).to(x.dtype)


def _over_planes(statistic: Tensor, x: Tensor) -> Tensor:
    return statistic.view(*statistic.shape, *[1] * (x.dim() - 2))


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# Statistics are (N, C), in the type of accumulation.

torch.library.define(
    "fastgan::plane_statistics",
    "(Tensor x, float eps) -> (Tensor mean, Tensor deviation)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fastgan::plane_statistics_backward",
    "(Tensor x, Tensor mean, Tensor slope, Tensor offset) -> Tensor grad_x",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.register_fake("fastgan::plane_statistics")
def _(x, eps):
    mean, deviation = (x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype)) for _ in range(2))
    return mean, deviation


@torch.library.register_fake("fastgan::plane_statistics_backward")
def _(x, mean, slope, offset):
    return torch.empty_like(dense(x, is_channels_last(x)))


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# Made of operations that are differentiable themselves, in x and in the statistics, which are x's own.


def _save_forward(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], *output)


def _backward(ctx, grad_mean, grad_deviation):
    x, mean, deviation = ctx.saved_tensors
    size = math.prod(x.shape[2:])
    slope, offset = grad_deviation / (size * deviation), grad_mean / size
    return operators.plane_statistics_backward(x, mean, slope, offset), None


register_gradient("plane_statistics", _backward, _save_forward)


def _save_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])


def _double_backward(ctx, gg):
    x, mean, slope = ctx.saved_tensors
    wide = gg.to(mean.dtype)
    total = wide.flatten(2).sum(-1)
    g_slope = (wide * (x - _over_planes(mean, x))).flatten(2).sum(-1)
    return (wide * _over_planes(slope, x)).to(x.dtype), -slope * total, g_slope, total


register_gradient("plane_statistics_backward", _double_backward, _save_backward)


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# On the CPU; on CUDA the definition, which is two passes over a style that nothing else reads.


def _call(x: Tensor, mean: Tensor, var: Tensor) -> NormCall:
    return NormCall(x, None, None, None, mean, var, True, 0.0, "none", 0.0, groups=x.shape[1])


def _cpp_forward(x, eps):
    tell_openmp()
    mean, var = empty_sample_statistics(x, x.shape[1])
    call = _call(x, mean, var)
    call.C.plane_statistics(call.arguments)
    acc = accumulation_dtype(x.dtype)
    return mean.to(acc, copy=True), (var + eps).sqrt_().to(acc)


def _cpp_backward(x, mean, slope, offset):
    tell_openmp()
    call = _call(x, mean, mean)
    grad_x = torch.empty_like(call.x)
    slope, offset = call.parameter(slope), call.parameter(offset)
    call.C.plane_statistics_backward(call.arguments, slope.data_ptr(), offset.data_ptr(), grad_x.data_ptr())
    return grad_x


torch.library.impl("fastgan::plane_statistics", "CompositeExplicitAutograd", reference)
torch.library.impl("fastgan::plane_statistics_backward", "CompositeExplicitAutograd", _backward_reference)
register_kernel("plane_statistics", "cpu", _cpp_forward)
register_kernel("plane_statistics_backward", "cpu", _cpp_backward)


# ── The function ─────────────────────────────────────────────────────────────────────────────────────────────────────


_SMALL = 1 << 18


def plane_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(μ, √(σ² + eps)) of each plane of x (N, C, \\*), biased, float32 (float64 for float64), both (N, C)."""
    if is_transformed() or backend.serving(x.device.type) != "cpp" or stock_is_faster(x, _SMALL, small_channels_last=0):
        return reference(x, eps)
    return operators.plane_statistics(x, eps)
