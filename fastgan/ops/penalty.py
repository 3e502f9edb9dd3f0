"""Norms of each sample of a batch: what gradient penalties are made of.

Two bilinear operators, each of whose gradients is one of the two: Σ x·y over each sample, and each sample times a number.
"""

import torch
from torch import Tensor

from fastgan.ops._autograd import is_transformed, operators, register_gradient
from fastgan.ops._kernels import register_kernels
from fastgan.ops._tensors import (
    DTYPES,
    accumulation_dtype,
    check_eps,
    check_input,
    dense,
    is_channels_last,
    remember_edges,
    will_use,
)

# ── Definition ───────────────────────────────────────────────────────────────────────────────────────────────────────


def dot_reference(x: Tensor, y: Tensor) -> Tensor:
    """(N, *), (N, *) -> (N,)"""
    acc = accumulation_dtype(x.dtype)
    return (x.to(acc) * y.to(acc)).unsqueeze(1).flatten(1).sum(1)


def scale_reference(x: Tensor, factors: Tensor) -> Tensor:
    """(N, *), (N,) -> (N, *)"""
    return (x.to(factors.dtype) * factors.view(-1, *[1] * (x.dim() - 1))).to(x.dtype)


# ── Schema ───────────────────────────────────────────────────────────────────────────────────────────────────────────

torch.library.define("fastgan::sample_dot", "(Tensor x, Tensor y) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define("fastgan::sample_scale", "(Tensor x, Tensor factors) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("fastgan::sample_dot")
def _(x, y):
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake("fastgan::sample_scale")
def _(x, factors):
    return torch.empty_like(dense(x, is_channels_last(x)))


# ── Gradient ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _save(ctx, inputs, output) -> None:
    ctx.is_square = inputs[0] is inputs[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)
    remember_edges(ctx, inputs)


def _dot_backward(ctx, grad):
    if grad is None:
        return None, None
    x, y = ctx.saved_tensors
    if ctx.is_square:
        return operators.sample_scale(x, 2 * grad), None
    grad_x = operators.sample_scale(y, grad) if will_use(ctx, 0) else None
    grad_y = operators.sample_scale(x, grad) if will_use(ctx, 1) else None
    return grad_x, grad_y


def _scale_backward(ctx, grad):
    if grad is None:
        return None, None
    x, factors = ctx.saved_tensors
    grad_x = operators.sample_scale(grad, factors) if will_use(ctx, 0) else None
    grad_factors = operators.sample_dot(grad, x) if will_use(ctx, 1) else None
    return grad_x, grad_factors


register_gradient("sample_dot", _dot_backward, _save)
register_gradient("sample_scale", _scale_backward, _save)


# ── Kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cpp_dot(x, y):
    from fastgan import _C

    x = dense(x, is_channels_last(x))
    y = dense(y, is_channels_last(x))
    sums = x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))
    _C.sample_dot(_samples(x), x.data_ptr(), y.data_ptr(), sums.data_ptr())
    return sums


def _cpp_scale(x, factors):
    from fastgan import _C

    x = dense(x, is_channels_last(x))
    factors, y = factors.to(accumulation_dtype(x.dtype)).contiguous(), torch.empty_like(x)
    _C.sample_scale(_samples(x), x.data_ptr(), factors.data_ptr(), y.data_ptr())
    return y


def _samples(x: Tensor):
    from fastgan import _C

    return _C.Samples(DTYPES[x.dtype], x.shape[0], x.numel() // max(x.shape[0], 1))


register_kernels("sample_dot", "penalty", "sample_dot", _cpp_dot, dot_reference)
register_kernels("sample_scale", "penalty", "sample_scale", _cpp_scale, scale_reference)


# ── The functions ────────────────────────────────────────────────────────────────────────────────────────────────────


def sample_squares(x: Tensor) -> Tensor:
    """The squared norm of each sample: Σ x² over all axes but the first, (N, \\*) -> (N,).

    x is float32, float64, bfloat16 or float16, of any strides. It is read once, and the result is float32 (float64 for
    float64). Deterministic, for any number of threads. Differentiable to every order; saved for backward: x.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x has no axis.
    """
    check_input(x)
    if x.dim() == 0:
        raise ValueError("x must have shape (N, *), not ()")
    return dot_reference(x, x) if is_transformed() else operators.sample_dot(x, x)


def sample_norms(x: Tensor, eps: float = 1e-12) -> Tensor:
    """The norm of each sample: √(Σ x² + eps). With eps in the root the gradient at x = 0 is 0, and not 0/0.

    All else is as in `sample_squares`.
    """
    check_eps(eps)
    return (sample_squares(x) + eps).sqrt()
